"""Each way to damage a checkpoint gives the right exception, and a message that names file, tensor and field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anyfp4.checkpoint.reader import Checkpoint
from tests.checkpoint.damage import CASES, Case
from tests.checkpoint.small import ATTENTION, LINEARS, small


def read_everything(checkpoint: Checkpoint) -> None:
    for module, shape in LINEARS.items():
        checkpoint.linear(module, shape)
    checkpoint.kv_scales(ATTENTION)
    for name in checkpoint.unread():
        checkpoint.tensor(name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.layout}: {case.name}")
def test_damage(case: Case, tmp_path: Path) -> None:
    folder = case.write(tmp_path / "model")
    if case.on_open:
        with pytest.raises(case.error, match=case.match) as raised:
            Checkpoint(folder)
    else:
        with Checkpoint(folder) as checkpoint, pytest.raises(case.error, match=case.match) as raised:
            read_everything(checkpoint)
    assert type(raised.value) is case.error
    assert str(folder) in str(raised.value)  # every message names the file, with its folder


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_undamaged(layout: str, tmp_path: Path) -> None:
    with Checkpoint(small(layout).write(tmp_path)) as checkpoint:
        read_everything(checkpoint)
        assert checkpoint.unread() == []


def test_there_are_enough_ways() -> None:
    assert len(CASES) >= 25
    assert len({(case.layout, case.name) for case in CASES}) == len(CASES)
    assert all(re.compile(case.match) for case in CASES)


def test_not_a_folder(tmp_path: Path) -> None:
    from anyfp4.errors import CheckpointFileError

    with pytest.raises(CheckpointFileError, match="does not exist"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointFileError, match="is not a folder"):
        Checkpoint(tmp_path / "file")
