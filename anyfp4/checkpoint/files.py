"""The safetensors files of a model folder: which there are, and what their headers say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from anyfp4.checkpoint.layout import TensorInfo
from anyfp4.errors import CheckpointConfigError, CheckpointFileError, TensorError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_PLACEHOLDER_BYTES = 4096


def check_not_placeholder(file: Path) -> None:
    """Refuses small text files that stand for the real file: Git-LFS pointers and flattened symbolic links.

    Raises:
        CheckpointFileError: it is one of them.
    """
    with file.open("rb") as stream:
        start = stream.read(_PLACEHOLDER_BYTES + 1)
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        raise CheckpointFileError("is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`", file=file)
    if len(start) > _PLACEHOLDER_BYTES or not re.fullmatch(rb"[\x20-\x7e]+\n?", start):
        return
    target = start.decode().strip()
    if re.search(r"[{}\[\]\"<>|]", target) or not ("/" in target or target.endswith(file.suffix)):
        return
    found = "exists" if (file.parent / target).exists() else "does not exist"
    raise CheckpointFileError(
        f"is a text file that holds the path {target!r}: a symbolic link that was flattened when it was copied; "
        f"put the file itself in its place (the path {found} here)",
        file=file,
    )


def scan(folder: Path, index: Mapping[str, Any] | None) -> dict[str, TensorInfo]:
    """The headers of all tensors of a model folder; no data is read.

    Args:
        folder: the model folder.
        index: the content of ``model.safetensors.index.json``, or None if there is none; then
            ``model.safetensors`` is the model, or all ``*.safetensors`` together.

    Raises:
        CheckpointFileError: a file is missing, truncated, or no safetensors file.
        CheckpointConfigError: the index is malformed, or names a file outside the folder.
        TensorError: index and files disagree about a tensor, or a tensor stands in two files.
    """
    if index is None:
        return merge(_files_without_index(folder))
    file = folder / INDEX_FILE
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointConfigError("weight_map must be an object that is not empty", file=file)
    for tensor, name in weight_map.items():
        _check_inside(name, tensor, file)
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).exists():
            count = sum(value == name for value in weight_map.values())
            raise CheckpointFileError(
                f"does not exist, but {INDEX_FILE} says that it holds {count} tensors", file=folder / name
            )
    infos = merge([folder / name for name in names])
    for tensor, name in weight_map.items():
        if tensor not in infos:
            raise TensorError(f"is missing, but {INDEX_FILE} says that it is here", file=folder / name, tensor=tensor)
        if infos[tensor].file != folder / name:
            raise TensorError(
                f"is here, but {INDEX_FILE} says that it is in {name}", file=infos[tensor].file, tensor=tensor
            )
    for tensor, info in infos.items():
        if tensor not in weight_map:
            raise TensorError(f"is not listed in {INDEX_FILE}", file=info.file, tensor=tensor)
    return infos


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointFileError: it is missing, truncated, or no safetensors file.
        TensorError: a tensor has a dtype that is not known.
    """
    _validate(file)
    entries, start = _parse_header(file)
    infos = {}
    for name, entry in entries.items():
        if entry["dtype"] not in _DTYPES:
            raise TensorError(f"has dtype {entry['dtype']}, which is not supported", file=file, tensor=name)
        begin, end = entry["data_offsets"]
        infos[name] = TensorInfo(_DTYPES[entry["dtype"]], tuple(entry["shape"]), end - begin, file, start + begin)
    return infos


def _validate(file: Path) -> None:
    """Lets safetensors itself judge the file; says in our words what is wrong."""
    if not file.exists():
        if file.is_symlink():
            raise CheckpointFileError(f"is a link to {file.readlink()}, which does not exist", file=file)
        raise CheckpointFileError("does not exist", file=file)
    if not file.is_file():
        raise CheckpointFileError("is not a file", file=file)
    try:
        with safe_open(file, framework="np"):
            pass
    except OSError as error:
        raise CheckpointFileError(f"cannot be opened: {error}", file=file) from error
    except SafetensorError as error:
        check_not_placeholder(file)
        raise CheckpointFileError(_explain(file, error), file=file) from error


def _parse_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header's entries by tensor, and where the data starts: 8 bytes of length, the header (JSON), the data."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _explain(file: Path, error: SafetensorError) -> str:
    size = file.stat().st_size
    if size < 8:
        return f"is not a safetensors file: it has only {size} bytes"
    with file.open("rb") as stream:
        length, first = int.from_bytes(stream.read(8), "little"), stream.read(1)
    if size < 8 + length:
        if first == b"{":
            return f"is truncated: its header alone should have {length} bytes, the file has {size}"
        return f"is not a safetensors file: {error}"
    try:
        entries, start = _parse_header(file)
        end = start + max(entry["data_offsets"][1] for entry in entries.values())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return f"is not a valid safetensors file: {error}"
    if size < end:
        return f"is truncated: its header describes {end} bytes, the file has {size}"
    if size > end:
        return f"is longer than its header says: {end} bytes, the file has {size}"
    return f"is not a valid safetensors file: {error}"


def _files_without_index(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).exists() or (folder / SINGLE_FILE).is_symlink():
        return [folder / SINGLE_FILE]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted({p.suffix for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf")})
        hint = f" (it has {', '.join(others)} files, which are not read here)" if others else ""
        raise CheckpointFileError(f"has no .safetensors files{hint}", file=folder)
    for file in files:
        numbered = re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.safetensors", file.name)
        if numbered is None:
            continue
        base, width, count = numbered[1], len(numbered[2]), numbered[3]
        for i in range(1, int(count) + 1):
            part = folder / f"{base}-{i:0{width}d}-of-{count}.safetensors"
            if not part.exists():
                raise CheckpointFileError(f"does not exist, but {file.name} does", file=part)
    return files


def merge(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """The headers of all tensors of several files.

    Raises:
        CheckpointFileError: a file is not what its name says.
        TensorError: two files hold a tensor of the same name.
    """
    infos: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in infos:
                raise TensorError(f"stands in {infos[name].file.name} too", file=file, tensor=name)
            infos[name] = info
    return infos


def _check_inside(name: object, tensor: str, index: Path) -> None:
    if not isinstance(name, str) or not name:
        raise CheckpointConfigError(f"must be mapped to a file name, not {name!r}", file=index, tensor=tensor)
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or path.suffix != ".safetensors":
        raise CheckpointConfigError(
            f"is mapped to {name!r}, which is not a .safetensors file inside the folder", file=index, tensor=tensor
        )
