"""Calling a command as a user does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from anyfp4.entrypoints import cli


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs ``anyfp4 WORDS``: (exit code, stdout, stderr)."""

    def run(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["anyfp4", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            cli.main()
            sys.exit(0)
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run
