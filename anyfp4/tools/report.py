"""What the reports of ``verify`` and ``eval`` share: a self-contained HTML page, and facts about this machine."""

from __future__ import annotations

import contextlib
import datetime
import platform
from collections.abc import Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import anyfp4
from anyfp4 import device as devices
from anyfp4.errors import InvalidArgumentError
from anyfp4.models.decoder import Decoder
from anyfp4.tools.verify_run import default_threads

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #f3f4f6; margin: 0; }
main { max-width: 1360px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 12px; } h2 { font-size: 18px; margin: 32px 0 10px; }
.verdict { border-left: 6px solid #059669; background: #ecfdf5; padding: 12px 16px; font-size: 17px; font-weight: 600; }
.verdict.bad { border-color: #dc2626; background: #fef2f2; }
.verdict.open { border-color: #d97706; background: #fffbeb; }
table { border-collapse: collapse; background: #fff; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px; border: 1px solid #e5e7eb; }
th { background: #f9fafb; font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(560px, 100%), 1fr)); gap: 16px; }
.plots svg { width: 100%; height: auto; border: 1px solid #e5e7eb; background: #fff; }
.side { display: flex; flex-wrap: wrap; gap: 16px 28px; align-items: flex-start; }
h3 { font-size: 15px; margin: 0 0 6px; } summary { cursor: pointer; margin-bottom: 8px; }
ul { margin: 6px 0; padding-left: 22px; }
pre { background: #fff; border: 1px solid #e5e7eb; padding: 12px; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def page(title: str, verdict: str, state: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole HTML page that loads nothing.

    Args:
        title: its heading.
        verdict: one sentence below it.
        state: ``good``, ``bad`` or ``open``: its colour.
        sections: headings and HTML.
    """
    body = "".join(f"<h2>{escape(heading)}</h2>\n{html}\n" for heading, html in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f'<body><main><h1>{escape(title)}</h1>\n<div class="verdict {state}">{escape(verdict)}</div>\n'
        f"{body}</main></body></html>\n"
    )


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """An HTML table of plain text; without a header, the first column names the rows."""
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    lines = [f"<tr>{head}</tr>"] if header else []
    for row in rows:
        cells = [f"<td>{escape(cell)}</td>" for cell in row]
        if not header:
            cells[0] = f"<th>{escape(row[0])}</th>"
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def side_by_side(parts: Sequence[tuple[str, str]]) -> str:
    """Pieces of HTML with headings, next to each other where there is room."""
    columns = "".join(f"<div><h3>{escape(heading)}</h3>{html}</div>" for heading, html in parts)
    return f'<div class="side">{columns}</div>'


def folded(summary: str, html: str) -> str:
    """HTML that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def plots(svgs: Sequence[str]) -> str:
    """Plots side by side where there is room."""
    return f'<div class="plots">{"".join(svgs)}</div>'


def bullets(items: Sequence[str]) -> str:
    """A list of plain text."""
    return f"<ul>{''.join(f'<li>{escape(i)}</li>' for i in items)}</ul>"


def check_output(path: Path | None, flag: str, suffix: str) -> None:
    """Checks, before any work, that a report can be written there.

    Raises:
        InvalidArgumentError: it has another suffix, or the folder does not exist.
    """
    if path is None:
        return
    if path.suffix != suffix:
        raise InvalidArgumentError(f"{flag} {path}: the name must end in {suffix}, which is what is written")
    if not path.parent.is_dir():
        raise InvalidArgumentError(f"{flag} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise InvalidArgumentError(f"{flag} {path}: this is a folder")


def write(path: Path, text: str, flag: str) -> None:
    """Writes a report.

    Raises:
        InvalidArgumentError: the system refuses.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"{flag} {path}: {error.strerror}") from error


def environment(model: Decoder) -> dict[str, str]:
    """The machine and the versions of what ran on it: name -> value."""
    place = model.device
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}",
        "device": f"{place} ({devices.architecture(place)})",
        "backend": model.ops.name,
        "threads": str(default_threads()),
        "anyfp4": anyfp4.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if place.type == "cuda":
        facts["device"] += f", {torch.cuda.get_device_name(place)}"
    with contextlib.suppress(PackageNotFoundError):
        facts["transformers"] = version("transformers")
    return facts


def _processor() -> str:
    """The name of the CPU."""
    with contextlib.suppress(OSError):  # no such file outside Linux
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"
