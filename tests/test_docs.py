"""Documentation that can be checked is checked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anyfp4.envs import VARIABLES

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def test_every_variable_is_documented() -> None:
    listed = (ROOT / "docs" / "environment.md").read_text()
    expected = [f"- `{name}`: {text}" for name, text in sorted(VARIABLES.items())]
    assert [line for line in listed.splitlines() if line.startswith("- `")] == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
