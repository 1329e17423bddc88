"""Writes docs/cli.md from the commands themselves: ``python -m anyfp4.entrypoints.cli_reference``.

It reads the signatures of the command functions, not the help that a terminal shows, so neither the terminal's width,
nor the environment, nor the version of typer can change the page.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from typer.models import ArgumentInfo, OptionInfo

from anyfp4.entrypoints.cli import app

COMMAND = "python -m anyfp4.entrypoints.cli_reference"
_KINDS = {int: "number", float: "number", str: "text", Path: "path"}


@dataclass(frozen=True)
class Parameter:
    """One argument or option of a command.

    Attributes:
        names: as they are typed; of an argument, its placeholder.
        takes: what kind of value; empty for a switch.
        default: as shown; empty if there is none worth showing.
        required: whether it must be given.
    """

    names: tuple[str, ...]
    takes: str
    default: str
    help: str
    required: bool
    is_argument: bool


def commands() -> dict[str, Callable[..., Any]]:
    """The function of each command, in the order of their definition."""
    found = {}
    for command in app.registered_commands:
        if command.callback is not None and not command.hidden:
            found[command.name or command.callback.__name__.replace("_", "-")] = command.callback
    return found


def parameters(function: Callable[..., Any]) -> list[Parameter]:
    """A command's parameters."""
    found = []
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        annotation, info = typing.get_args(parameter.annotation)
        if not info.hidden:
            found.append(_parameter(name, annotation, info, parameter.default))
    return found


def _parameter(name: str, annotation: Any, info: ArgumentInfo | OptionInfo, default: Any) -> Parameter:
    required = default is inspect.Parameter.empty
    kind, several = _kind(annotation)
    is_argument = isinstance(info, ArgumentInfo)
    words = name.replace("_", "-")
    # in `Annotated`, the first name of Option("--a", "-a") arrives in the place of the default
    given = [d for d in (info.default, *(info.param_decls or ())) if isinstance(d, str)]
    if is_argument:
        names: tuple[str, ...] = (str(info.metavar or name.upper()),)
    elif given:
        names = tuple(n.strip() for d in given for n in d.split("/"))
    else:
        names = (f"--{words}", f"--no-{words}") if kind is bool else (f"--{words}",)
    help_text, mark, named = (info.help or "").rpartition("[default: ")
    if not mark:
        help_text, named = info.help or "", ""
    return Parameter(
        names=names,
        takes=_takes(kind) + (", may be repeated" if several else ""),
        default="required" if required and not is_argument else named.strip().removesuffix("]") or _shown(default),
        help=" ".join(help_text.split()),
        required=required,
        is_argument=is_argument,
    )


def _kind(annotation: Any) -> tuple[Any, bool]:
    """The type of one value, and whether there can be several."""
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    return annotation, False


def _takes(kind: Any) -> str:
    if kind is bool:
        return ""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(f"`{choice.value}`" for choice in kind)
    return _KINDS[kind]


def _shown(default: Any) -> str:
    if default is inspect.Parameter.empty or default is None or isinstance(default, bool):
        return ""
    return f"`{default.value if isinstance(default, Enum) else default}`"


def reference() -> str:
    """The text of docs/cli.md."""
    functions = commands()
    parts = [
        "# Commands",
        f"Made by `{COMMAND}`; do not edit.",
        "\n".join(f"- [`anyfp4 {name}`](#anyfp4-{name}): {_summary(f)}" for name, f in functions.items()),
        "An error that anyfp4 foresaw is one line on stderr and exit code 1; an option that does not exist, or a value "
        "of the wrong kind, exits with 2. `anyfp4 --version` prints the version. Environment variables are listed in "
        "[environment.md](environment.md).",
    ]
    parts += [_section(name, function) for name, function in functions.items()]
    return "\n\n".join(parts) + "\n"


def _paragraphs(function: Callable[..., Any]) -> list[str]:
    """The paragraphs of a docstring, each in one line."""
    return [" ".join(p.split()) for p in inspect.getdoc(function).split("\n\n")]  # type: ignore[union-attr]


def _summary(function: Callable[..., Any]) -> str:
    """The first sentence of the docstring."""
    return _paragraphs(function)[0].partition(". ")[0].removesuffix(".")


def _section(name: str, function: Callable[..., Any]) -> str:
    every = parameters(function)
    arguments = [p for p in every if p.is_argument]
    options = [p for p in every if not p.is_argument]
    usage = ["anyfp4", name, *(a.names[0] if a.required else f"[{a.names[0]}]" for a in arguments), "[OPTIONS]"]
    parts = [f"## anyfp4 {name}", *_paragraphs(function), f"```\n{' '.join(usage)}\n```"]
    if arguments:
        rows = [_row(f"`{a.names[0]}`", a.help) for a in arguments]
        parts.append("\n".join(["| argument | |", "|---|---|", *rows]))
    if options:
        rows = [_row(", ".join(f"`{n}`" for n in o.names), o.takes, o.default, o.help) for o in options]
        parts.append("\n".join(["| option | takes | default | |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> None:
    """Writes the page into the source tree that this module lies in."""
    page = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
    if not page.parent.is_dir():
        sys.exit(f"{page.parent} is not there: run this in a source tree")
    page.write_text(reference(), encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
