"""Reading tensors from mapped files into memory of their own, on the CPU or straight on a GPU."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anyfp4.checkpoint.layout import TensorInfo
from anyfp4.errors import CheckpointFileError

#: a file's pages stay resident while it is mapped, so the mapping is dropped after as many bytes were copied from it
_MAPPED_BYTES = 16 << 20


class TensorReader:
    """Reads tensors without leaving the files' pages resident.

    The files are mapped, so that a page which was copied counts twice for as long as its file stays mapped. Large
    tensors are therefore copied in pieces, and the mapping is renewed every 16 MiB (some 20 µs): the surplus stays
    below that, whatever the size of the checkpoint.
    """

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        """Prepares to read.

        Args:
            infos: the headers of the files, just read; a file that changes after this is refused.
        """
        self._infos = infos
        self._states = {file: _state(file) for file in {info.file for info in infos.values()}}
        self._mapped: mmap.mmap | None = None
        self._file: Path | None = None
        self._copied = 0

    def read(self, name: str, device: torch.device | None = None) -> Tensor:
        """One tensor, as the file holds it.

        Args:
            name: its name.
            device: where it goes, from the file's pages without a copy on the host; the CPU by default.

        Raises:
            CheckpointFileError: the file changed since its header was read.
        """
        info = self._infos[name]
        result = torch.empty(info.shape, dtype=info.dtype, device=device)
        target = result.reshape(-1).view(torch.uint8)
        for start in range(0, info.nbytes, _MAPPED_BYTES):
            count = min(_MAPPED_BYTES, info.nbytes - start)
            source = np.frombuffer(self._map(info.file), np.uint8, count, info.offset + start)
            if result.is_cpu:
                # numpy copies on this thread; torch would wake its pool for each of thousands of small tensors
                target.numpy()[start : start + count] = source
            else:
                target[start : start + count].copy_(torch.from_numpy(source))
            self._copied += count
            del source
        return result

    def close(self) -> None:
        """Unmaps the current file."""
        self._mapped = self._file = None  # the last reference, so this unmaps
        self._copied = 0

    def _map(self, file: Path) -> mmap.mmap:
        if self._mapped is None or self._file != file or self._copied >= _MAPPED_BYTES:
            self.close()
            if _state(file) != self._states[file]:
                raise CheckpointFileError("changed while the checkpoint was being read", file=file)
            with file.open("rb") as stream:
                # nobody writes, but torch does not take memory that could not be written
                self._mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            self._file = file
        return self._mapped


def _state(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointFileError(f"cannot be read: {error.strerror}", file=file) from error
    return status.st_size, status.st_mtime_ns
