"""Writing a checkpoint: tensors go to safetensors shards as they come; a folder appears only when complete."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from anyfp4.errors import CheckpointFileError, InvalidArgumentError

#: the size of a shard unless told otherwise, as other producers write them
DEFAULT_SHARD_BYTES = 5_000_000_000
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: what a model folder holds beside its tensors and config, and what a copy of the model needs too
COMPANION_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
COMPANION_PATTERNS = ("LICENSE*", "NOTICE*", "USE_POLICY*")


class CheckpointWriter:
    """Writes one checkpoint folder.

    Everything is written to a temporary folder beside ``out``, which takes its name in :meth:`finish`; a
    run that fails or is interrupted leaves nothing under that name. Use it as a context manager: leaving the
    block without :meth:`finish` removes the temporary folder.

    Memory: one shard is held until it is full, so ``max_shard_bytes`` plus the tensor being added.
    """

    def __init__(self, out: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES, *, overwrite: bool = False) -> None:
        """Starts a checkpoint.

        Args:
            out: the folder to write; must not exist, or be empty, unless ``overwrite``.
            max_shard_bytes: bytes of tensors in one shard; a larger tensor gets a shard of its own.
            overwrite: whether an existing folder may be replaced; it stays until :meth:`finish`.

        Raises:
            InvalidArgumentError: ``out`` exists and is not empty, or ``max_shard_bytes`` is not positive.
        """
        if max_shard_bytes <= 0:
            raise InvalidArgumentError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
        self.out = Path(os.path.abspath(out))  # noqa: PTH100  resolve() would follow a link at the last component
        self._max_shard_bytes = max_shard_bytes
        self._overwrite = overwrite
        self._check_free()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._folder = self._sibling("partial")
        self._folder.mkdir()
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._storages: set[int] = set()  # where the pending tensors lie
        self._total_bytes = 0
        self._shard_of: dict[str, int] = {}  # tensor -> number of its shard, from 0
        self._shards = 0

    @property
    def folder(self) -> Path:
        """The temporary folder that will become ``out``."""
        return self._folder

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors added so far."""
        return self._total_bytes

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds one tensor; it may be written now or later, so do not change it afterwards.

        Args:
            name: its name in the checkpoint, not used before.
            tensor: any shape and dtype that safetensors knows.
        """
        if name in self._shard_of:
            raise InvalidArgumentError(f"tensor {name!r} was added twice")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_shard_bytes:
            self._flush()
        self._pending[name] = self._private(tensor)
        self._pending_bytes += size
        self._total_bytes += size
        self._shard_of[name] = self._shards
        if self._pending_bytes >= self._max_shard_bytes:
            self._flush()

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes ``content`` as the file ``name`` of the folder."""
        _write_json(self._folder / name, content)

    def copy_companions(self, source: Path) -> list[str]:
        """Copies tokenizer, chat template, generation and licence files of the model folder ``source``.

        Returns:
            The names of the files copied.
        """
        names = {name for name in COMPANION_FILES if (source / name).is_file()}
        for pattern in COMPANION_PATTERNS:
            names.update(path.name for path in source.glob(pattern) if path.is_file())
        for name in names:
            shutil.copyfile(source / name, self._folder / name)
        return sorted(names)

    def finish(self) -> Path:
        """Writes what is left and the index, and gives the folder its name.

        Returns:
            The finished folder.

        Raises:
            InvalidArgumentError: something appeared under ``out`` meanwhile.
        """
        self._flush()
        if self._shards == 1:
            (self._folder / _shard_name(0)).rename(self._folder / SINGLE_FILE)
        elif self._shards > 1:
            final = [f"model-{i + 1:05d}-of-{self._shards:05d}.safetensors" for i in range(self._shards)]
            for i, name in enumerate(final):
                (self._folder / _shard_name(i)).rename(self._folder / name)
            weight_map = {name: final[shard] for name, shard in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            _write_json(self._folder / INDEX_FILE, index)
        self._check_free()
        if self._overwrite and self.out.exists():
            old = self._sibling("old")
            self.out.rename(old)
            self._folder.rename(self.out)
            shutil.rmtree(old)
        else:
            self._folder.rename(self.out)
        return self.out

    def abort(self) -> None:
        """Removes the temporary folder; does nothing after :meth:`finish`."""
        self._pending = {}
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _sibling(self, kind: str) -> Path:
        """A new hidden name beside ``out``: renaming works within one file system only."""
        return self.out.parent / f".{self.out.name}.{secrets.token_hex(4)}.{kind}"

    def _private(self, tensor: Tensor) -> Tensor:
        """``tensor`` on the CPU, contiguous, alone in its storage: safetensors refuses shared memory."""
        tensor = tensor.detach().cpu()
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size() and tensor.is_contiguous()
        if not whole or storage.data_ptr() in self._storages:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        self._storages.add(tensor.untyped_storage().data_ptr())
        return tensor

    def _check_free(self) -> None:
        if self.out.is_dir():
            if any(self.out.iterdir()) and not self._overwrite:
                raise InvalidArgumentError(f"{self.out} is not empty: choose another folder, or ask to overwrite it")
        elif self.out.exists() or self.out.is_symlink():
            raise InvalidArgumentError(f"{self.out} exists and is not a folder")

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self._folder / _shard_name(self._shards)
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise CheckpointFileError(f"cannot write: {error}", file=path) from error
        # safetensors makes private files; the folder tells what the user's umask allows
        path.chmod(self._folder.stat().st_mode & 0o666)
        self._pending = {}
        self._pending_bytes = 0
        self._storages = set()
        self._shards += 1


def _shard_name(number: int) -> str:
    """The name of a shard while their count is not known."""
    return f"shard-{number:05d}.safetensors"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
