"""The real checkpoints, for tests marked ``checkpoint``: where they lie, and folders that are ready to be opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FULL = ("ct_nvfp4", "modelopt_nvfp4")
#: the first layer alone, with a small vocabulary
VARIANTS = (
    "variants/ct_nvfp4",
    "variants/ct_nvfp4a16",
    "variants/modelopt_nvfp4",
    "variants/modelopt_nvfp4_awq",
    "variants/modelopt_nvfp4_fp8kv",
    "variants/modelopt_nvfp4_mlponly",
    "variants/modelopt_w4a16_nvfp4",
)
#: refused: block size 32 with FP8 activations
REFUSED_VARIANT = "variants/modelopt_w4a8_nvfp4_fp8"


def checkpoints_root() -> Path:
    """The folder with the real checkpoints; skips the test where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "checkpoints"
    root = Path(os.environ.get("ANYFP4_TEST_CHECKPOINTS") or default)
    if not root.is_dir():
        pytest.skip(f"no real checkpoints at {root} (set ANYFP4_TEST_CHECKPOINTS)")
    return root


def real_checkpoint(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real checkpoint ``name``, links in place of its files.

    Files that several checkpoints share are links in the original, and version control may have flattened a link into
    a text file with its target's path; here they are links again.
    """
    source = checkpoints_root() / name
    if not source.is_dir():
        pytest.skip(f"no real checkpoint at {source}")
    folder = tmp_path_factory.mktemp(name.replace("/", "_"))
    for file in source.iterdir():
        (folder / file.name).symlink_to(_link_target(file) or file)
    return folder


def _link_target(file: Path) -> Path | None:
    if file.stat().st_size > 4096:
        return None
    text = file.read_bytes().decode(errors="replace").strip()
    if not text.startswith("../") or "\n" in text:
        return None
    target = (file.parent / text).resolve()
    return target if target.is_file() else None
