"""One way to damage a checkpoint, and the tools to do it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anyfp4.errors import (
    AnyFP4Error,
)
from tests.checkpoint.small import (
    HIDDEN,
    INTER,
    LAYER,
    UP,
    Small,
    small,
)

CT, MO = "compressed-tensors", "modelopt"
NORM, NORM2 = "model.norm.weight", f"{LAYER}.input_layernorm.weight"
DENSE = torch.zeros(INTER, HIDDEN, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One way.

    Attributes:
        name: a short description.
        edit: changes the checkpoint before it is written.
        error: the exception's class.
        match: regular expression of its message.
        layout: of the checkpoint to start from.
        after: changes the written folder.
        on_open: whether opening must fail; otherwise opening must work and reading must fail.
    """

    name: str
    edit: Callable[[Small], object]
    error: type[AnyFP4Error]
    match: str
    layout: str = CT
    after: Callable[[Path], object] | None = None
    on_open: bool = True

    def write(self, folder: Path) -> Path:
        made = small(self.layout)
        self.edit(made)
        made.write(folder)
        if self.after is not None:
            self.after(folder)
        return folder


def nothing(_: Small) -> None:
    pass


def remove(name: str) -> Callable[[Small], object]:
    return lambda s: s.tensors.pop(name)


def replace(name: str, tensor: Tensor) -> Callable[[Small], object]:
    return lambda s: s.tensors.__setitem__(name, tensor)


def change(name: str, how: Callable[[Tensor], Tensor]) -> Callable[[Small], object]:
    return lambda s: s.tensors.__setitem__(name, how(s.tensors[name]))


def set_bits(name: str, bits: int) -> Callable[[Small], object]:
    """Sets the block scale of row 1, block 0."""

    def edit(s: Small) -> None:
        s.tensors[name].view(torch.uint8)[1, 0] = bits

    return edit


def config(*path: str, value: object) -> Callable[[Small], object]:
    """Sets a field of quantization_config."""

    def edit(s: Small) -> None:
        table = s.quantization_config
        assert table is not None
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = value

    return edit


def modelopt(field: str, value: object) -> Callable[[Small], object]:
    """Sets a field of ModelOpt's configuration in both files."""
    spelt = {"exclude_modules": "ignore", "kv_cache_quant_algo": "kv_cache_scheme"}.get(field, field)

    def edit(s: Small) -> None:
        assert s.quantization_config is not None
        assert s.hf_quant_config is not None
        s.quantization_config[spelt] = value
        s.hf_quant_config["quantization"][field] = value

    return edit


def both(*edits: Callable[[Small], object]) -> Callable[[Small], object]:
    def edit(s: Small) -> None:
        for each in edits:
            each(s)

    return edit


def sharded(s: Small) -> None:
    s.shards = {NORM: 1, NORM2: 1}


def index(how: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    """Changes the index's weight_map."""

    def after(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        content = json.loads(file.read_text())
        how(content["weight_map"])
        file.write_text(json.dumps(content))

    return after


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, keep: Callable[[int], int]) -> Callable[[Path], object]:
    def after(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: keep(len(data))])

    return after


def second_copy(folder: Path) -> None:
    """Puts a tensor of the first shard into the second too."""
    made = small(CT)
    made.tensors = {n: made.tensors[n] for n in (NORM, NORM2, f"{UP}.weight_packed")}
    made.write(folder / "other")
    (folder / "other" / "model.safetensors").rename(folder / SHARD2)


def mixed(layers: object) -> Callable[[Small], object]:
    return both(modelopt("quant_algo", "MIXED_PRECISION"), modelopt("quantized_layers", layers))


GROUP = ("config_groups", "group_0")
MODEL = "model.safetensors"
SHARD2 = "model-00002-of-00002.safetensors"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 59891280\n"
ONE = torch.ones(1)
NAN = torch.tensor(torch.nan)
