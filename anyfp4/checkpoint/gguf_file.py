"""The GGUF container: metadata and where each tensor lies.

Layout (GGUF specification, versions 2 and 3, little-endian): magic, version, two counts, the metadata as
typed key-value pairs, one record per tensor, then the data, aligned. Parsed here with ``struct`` rather than
with the ``gguf`` package's reader, which makes several arrays for each string of a vocabulary (5.8 s for the
demo model, against 0.2 s) and trusts every length that it finds.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from anyfp4.errors import CheckpointFileError, TensorError, UnsupportedError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMENSIONS: Final = 4

_STRING: Final = 8
_ARRAY: Final = 9
#: value type -> how struct reads it
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies.

    Attributes:
        name: as the file spells it.
        type: the name of its block type, such as ``Q4_1``.
        shape: as torch counts, the longest stride first (the file has the reverse).
        offset: of its first byte in the file.
        nbytes: its size in the file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """The parsed head of a GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf_file(path: Path) -> GGUFFile:
    """Parses the head of a GGUF file and checks that every tensor lies within the file.

    Raises:
        CheckpointFileError: no such file, not GGUF, or truncated.
        TensorError: a tensor is described wrongly, or twice.
        UnsupportedError: a version, byte order or tensor type that cannot be read; one part of a split model.
    """
    if not path.is_file():
        raise CheckpointFileError("no such file", file=path)
    size = path.stat().st_size
    if size < 24:
        raise CheckpointFileError(f"not a GGUF file: {size} bytes", file=path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _parse(_Cursor(data), path, size)
        except struct.error as error:
            raise CheckpointFileError(f"truncated: the header ends after {size} bytes", file=path) from error
        except UnicodeDecodeError as error:
            raise CheckpointFileError(f"a string in the header is not UTF-8 ({error})", file=path) from error


class _Cursor:
    """Reads values one after another; past the end it raises ``struct.error``."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            raise struct.error("past the end")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        width = struct.calcsize("<" + code)
        # the size is checked before struct sees the count: a damaged one may be astronomic
        return struct.unpack(f"<{count}{code}", self.take(width * count))

    def u32(self) -> int:
        return int(self.numbers("I", 1)[0])

    def u64(self) -> int:
        return int(self.numbers("Q", 1)[0])

    def string(self) -> str:
        return self.take(self.u64()).decode("utf-8")


def _parse(cursor: _Cursor, path: Path, size: int) -> GGUFFile:
    if cursor.take(4) != MAGIC:
        raise CheckpointFileError("not a GGUF file: it does not start with 'GGUF'", file=path)
    version = cursor.u32()
    if version not in VERSIONS:
        raise UnsupportedError(
            f"{path}: GGUF version {version} (or the wrong byte order); versions 2 and 3, little-endian, are read"
        )
    tensor_count, pair_count = cursor.u64(), cursor.u64()
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        metadata[key] = _value(cursor, cursor.u32(), path, key)
    if int(metadata.get("split.count", 1)) > 1:
        raise UnsupportedError(f"{path}: one of {metadata['split.count']} parts of a model; merge them first")
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    if alignment <= 0:
        raise CheckpointFileError(f"general.alignment is {alignment}, must be positive", file=path)
    records = [_record(cursor) for _ in range(tensor_count)]
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, dimensions, type_number, offset in records:
        if name in tensors:
            raise TensorError("described twice", file=path, tensor=name)
        tensor = _tensor(path, name, dimensions, type_number, start + offset)
        if tensor.offset + tensor.nbytes > size:
            raise CheckpointFileError(
                f"truncated: the tensor needs {tensor.offset + tensor.nbytes} bytes, the file has {size}",
                file=path,
                tensor=name,
            )
        tensors[name] = tensor
    return GGUFFile(path, metadata, tensors)


def _value(cursor: _Cursor, kind: int, path: Path, key: str) -> Any:
    if kind in _SCALARS:
        return cursor.numbers(_SCALARS[kind], 1)[0]
    if kind == _STRING:
        return cursor.string()
    if kind == _ARRAY:
        element, count = cursor.u32(), cursor.u64()
        if element in _SCALARS:
            return list(cursor.numbers(_SCALARS[element], count))
        if element == _STRING:
            return [cursor.string() for _ in range(count)]
        kind = element
    raise CheckpointFileError(f"metadata {key!r} has the unknown value type {kind}", file=path)


def _record(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    dimensions = cursor.numbers("Q", cursor.u32())
    return name, dimensions, cursor.u32(), cursor.u64()


def _tensor(path: Path, name: str, dimensions: tuple[int, ...], type_number: int, offset: int) -> GGUFTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: PLC0415  (not needed for anything else)

    try:
        kind = GGMLQuantizationType(type_number)
    except ValueError as error:
        raise UnsupportedError(f"{path}: {name}: unknown tensor type {type_number}") from error
    if not 1 <= len(dimensions) <= MAX_DIMENSIONS or 0 in dimensions:
        raise TensorError(f"has the shape {list(reversed(dimensions))}", file=path, tensor=name)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if dimensions[0] % block:
        raise TensorError(
            f"rows of {dimensions[0]} elements are no multiple of {kind.name}'s blocks of {block}",
            file=path,
            tensor=name,
        )
    nbytes = math.prod(dimensions) // block * block_bytes
    return GGUFTensor(name, kind.name, tuple(reversed(dimensions)), offset, nbytes)
