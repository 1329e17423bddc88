"""docs/server.md names every field, path, code and flag that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from anyfp4.entrypoints.server import gate, protocol

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "server.md").read_text()
SOURCES = sorted((ROOT / "anyfp4" / "entrypoints" / "server").glob("*.py"))


def neutral(model: type[protocol.GenerationBody | protocol.ChatMessage]) -> set[str]:
    return {
        name
        for name, field in model.model_fields.items()
        if any(isinstance(item, protocol.Neutral) for item in field.metadata)
    }


@pytest.mark.parametrize("model", [protocol.CompletionBody, protocol.ChatBody])
def test_every_field_is_described(model: type[protocol.GenerationBody]) -> None:
    described = {
        name for row in re.findall(r"^\| (`.+?) \|", TEXT, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    others = {"parallel_tool_calls", "audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"}
    partly = neutral(model) | {"best_of"}
    assert set(model.model_fields) - partly <= described
    assert all(f"`{name}`" in TEXT for name in partly - others)


def test_every_path_is_described() -> None:
    for path in gate.PATHS:
        assert re.search(rf"`(GET|POST) {re.escape(path)}`", TEXT), path


def test_every_code_is_described() -> None:
    codes = set()
    for source in SOURCES:
        codes |= set(re.findall(r'code="(\w+)"', source.read_text()))
    assert len(codes) > 10
    listed = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| \d{3} \|.*?\|", TEXT, flags=re.MULTILINE))))
    assert codes - {"internal_error", "http_error"} <= listed


def test_flags_exist(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from anyfp4.entrypoints import cli

    monkeypatch.setattr(sys, "argv", ["anyfp4", "serve", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main()
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", TEXT)) <= known
