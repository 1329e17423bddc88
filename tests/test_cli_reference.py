"""docs/cli.md is what the commands say of themselves."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from anyfp4.entrypoints import cli
from anyfp4.entrypoints.cli_reference import COMMAND, commands, parameters, reference

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), f"docs/cli.md is out of date: run `{COMMAND}`"


def test_terminal_and_environment_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = reference()
    for name, value in {"COLUMNS": "30", "TERM": "dumb", "NO_COLOR": "1", "ANYFP4_NUMERICS": "blackwell"}.items():
        monkeypatch.setenv(name, value)
    assert reference() == before


@pytest.mark.parametrize("command", commands())
def test_it_names_what_help_names(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["anyfp4", command, "--help"])
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    firsts = [line.strip().split("  ")[0] for line in shown.splitlines() if re.match(" +-", line)]
    listed = {word for first in firsts for word in re.findall(r"(?<![\w-])--?[a-z][\w-]*", first)}
    documented = parameters(commands()[command])
    assert {name for p in documented if not p.is_argument for name in p.names} == listed - {"--help"}
    for p in documented:
        assert p.help and p.help.rstrip(".") in " ".join(shown.split())


def test_every_command_of_the_program_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["anyfp4", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out.partition("Commands")[2]
    listed = [line.split()[0] for line in shown.splitlines() if line.startswith("  ") and line[2:3].isalpha()]
    assert listed == list(commands())
