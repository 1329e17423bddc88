from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.checkpoint.writer import CheckpointWriter
from anyfp4.errors import InvalidArgumentError
from anyfp4.testing.bitwise import assert_same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn)


def example_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i, dtype in enumerate(DTYPES * 3):
        shape = ((), (3,), (5, 7))[i % 3]
        bits = torch.randint(0, 100, shape, generator=generator)
        tensors[f"model.layers.{i}.x"] = bits.to(dtype)
    return tensors


def write(out: Path, tensors: dict[str, torch.Tensor], **options: object) -> Path:
    with CheckpointWriter(out, **options) as writer:  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        return writer.finish()


def siblings(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    tensors = example_tensors()
    out = write(tmp_path / "model", tensors)
    assert siblings(out) == ["model.safetensors"]
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert_same_bits(file.get_tensor(name), tensor, name)


@pytest.mark.parametrize("limit", [1, 40, 100, 250])
def test_shards_and_index(tmp_path: Path, limit: int) -> None:
    tensors = example_tensors()
    out = write(tmp_path / "model", tensors, max_shard_bytes=limit)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    assert index["weight_map"].keys() == tensors.keys()
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert set(index["weight_map"].values()) == set(files)
    for name in files:
        with safe_open(out / name, "pt") as file:
            held = set(file.keys())
            assert held == {t for t, where in index["weight_map"].items() if where == name}
            assert len(held) == 1 or sum(sizes[t] for t in held) <= limit
            for tensor in held:
                assert_same_bits(file.get_tensor(tensor), tensors[tensor], tensor)


def test_the_reader_reads_it(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.norm.weight": torch.randn(8) for i in range(6)}
    with CheckpointWriter(tmp_path / "model", max_shard_bytes=64) as writer:
        writer.write_json("config.json", {"model_type": "llama"})
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        out = writer.finish()
    with Checkpoint(out) as checkpoint:
        assert checkpoint.names == set(tensors)
        assert checkpoint.config == {"model_type": "llama"}
        for name, tensor in tensors.items():
            assert_same_bits(checkpoint.tensor(name), tensor, name)


def test_views_and_shared_memory_are_copied(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    out = write(
        tmp_path / "model", {"rows": base[1:3], "columns": base[:, ::2], "turned": base.T, "a": base, "b": base}
    )
    with safe_open(out / "model.safetensors", "pt") as file:
        assert_same_bits(file.get_tensor("rows"), base[1:3])
        assert_same_bits(file.get_tensor("columns"), base[:, ::2])
        assert_same_bits(file.get_tensor("turned"), base.T)
        assert_same_bits(file.get_tensor("b"), base)


def test_nothing_is_visible_before_finish(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with CheckpointWriter(out, max_shard_bytes=1) as writer:
        writer.add("x", torch.zeros(4))
        assert not out.exists()
        writer.finish()
    assert siblings(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_run_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), CheckpointWriter(tmp_path / "model", max_shard_bytes=1) as writer:
        writer.add("x", torch.zeros(4))
        writer.add("y", torch.zeros(4))
        raise error
    assert siblings(tmp_path) == []


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "model") as writer:
        writer.add("x", torch.zeros(4))
    assert siblings(tmp_path) == []


def test_refuses_a_folder_in_use(tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    with pytest.raises(InvalidArgumentError, match=r"model is not empty"):
        CheckpointWriter(out)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match=r"file exists and is not a folder"):
        CheckpointWriter(tmp_path / "file", overwrite=True)
    assert siblings(tmp_path) == ["file", "model"]


def test_refuses_a_folder_that_filled_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with pytest.raises(InvalidArgumentError, match="not empty"), CheckpointWriter(out) as writer:
        out.mkdir()
        (out / "precious.txt").write_text("keep me")
        writer.finish()
    assert siblings(tmp_path) == ["model"]
    assert siblings(out) == ["precious.txt"]


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert siblings(write(tmp_path / "model", {"x": torch.zeros(1)})) == ["model.safetensors"]


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = tmp_path / "model"
    write(out, {"old": torch.zeros(1)})
    (out / "stale.json").write_text("{}")
    write(out, {"new": torch.ones(1)}, overwrite=True)
    assert siblings(out) == ["model.safetensors"]
    with safe_open(out / "model.safetensors", "pt") as file:
        assert list(file.keys()) == ["new"]
    assert siblings(tmp_path) == ["model"]


def test_a_failed_overwrite_keeps_the_old(tmp_path: Path) -> None:
    out = write(tmp_path / "model", {"old": torch.zeros(1)})
    with pytest.raises(RuntimeError), CheckpointWriter(out, overwrite=True) as writer:
        writer.add("new", torch.zeros(1))
        raise RuntimeError
    with safe_open(out / "model.safetensors", "pt") as file:
        assert list(file.keys()) == ["old"]


def test_refuses_a_name_twice_and_a_bad_limit(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="'x' was added twice"), CheckpointWriter(tmp_path / "m") as writer:
        writer.add("x", torch.zeros(1))
        writer.add("x", torch.zeros(1))
    with pytest.raises(InvalidArgumentError, match="max_shard_bytes must be positive, got 0"):
        CheckpointWriter(tmp_path / "m", max_shard_bytes=0)
    assert siblings(tmp_path) == []


def test_companions_are_copied_through_links(tmp_path: Path) -> None:
    blobs, source = tmp_path / "blobs", tmp_path / "source"
    blobs.mkdir()
    source.mkdir()
    (blobs / "abc").write_text('{"model": 1}')
    (source / "tokenizer.json").symlink_to(blobs / "abc")
    for name in ("chat_template.jinja", "LICENSE.txt", "config.json", "README.md", "model.safetensors"):
        (source / name).write_text(name)
    with CheckpointWriter(tmp_path / "model") as writer:
        assert writer.copy_companions(source) == ["LICENSE.txt", "chat_template.jinja", "tokenizer.json"]
        out = writer.finish()
    assert not (out / "tokenizer.json").is_symlink()
    assert (out / "tokenizer.json").read_text() == '{"model": 1}'


def test_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        out = write(tmp_path / "model", {"x": torch.zeros(1)})
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o755
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644
