"""From a model's name to its folder: folders, and ids found in a Hugging Face cache without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from anyfp4.checkpoint.locate import locate
from anyfp4.errors import InvalidArgumentError


def fake_cache(home: Path, model: Path) -> None:
    """A repository as huggingface_hub keeps it: blobs, a snapshot of links, a reference."""
    repository = home / "hub" / "models--some--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)


def run(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anyfp4.entrypoints.cli", *words]
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_an_id_works_from_the_cache_offline(tiny_model: Path, tmp_path: Path) -> None:
    fake_cache(tmp_path, tiny_model)
    done = run(tmp_path, "generate", "some/model", "hello", "--max-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert "3 new tokens" in done.stderr
    missing = run(tmp_path, "generate", "some/other", "hello")
    assert missing.returncode == 1 and missing.stderr.startswith("error: some/other: no such folder here")
    revision = run(tmp_path, "inspect", "some/model", "--revision", "v2")
    assert revision.returncode == 1 and "some/model" in revision.stderr and "Traceback" not in revision.stderr


def test_folders(tmp_path: Path) -> None:
    assert locate(tmp_path) == tmp_path
    with pytest.raises(InvalidArgumentError, match="a revision belongs to"):
        locate(tmp_path, revision="main")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InvalidArgumentError, match="is a file; give the folder"):
        locate(tmp_path / "model.safetensors")
    with pytest.raises(InvalidArgumentError, match="no such folder"):
        locate(tmp_path / "nothing")
    for name in ("gpt2", "a/b/c", "-x/y", ""):
        with pytest.raises(InvalidArgumentError):
            locate(name)
