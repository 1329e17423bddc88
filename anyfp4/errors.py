"""Every exception that anyfp4 raises on purpose.

    AnyFP4Error
    ├── CheckpointError            a checkpoint cannot be read as it stands
    │   ├── CheckpointFileError    a file is missing, truncated or not what its name says
    │   ├── CheckpointConfigError  config.json / hf_quant_config.json contradicts itself or the format
    │   └── TensorError            a tensor is missing, extra, or has a wrong shape, dtype or value
    ├── UnsupportedError           a valid request that anyfp4 does not implement (algorithm, architecture, option)
    ├── BackendError               a backend that was asked for by name cannot run here
    ├── InsufficientMemoryError    a model does not fit its device
    ├── EngineError                the engine cannot take a request now
    │   ├── QueueFullError         too many sequences wait already
    │   └── EngineStoppedError     it was shut down, or its thread died
    ├── EnvironmentVariableError   an ANYFP4_* variable has a value that is not allowed   (also a ValueError)
    └── InvalidArgumentError       an argument to a public function is wrong              (also a ValueError)

The message says what is wrong, where (file, tensor, field or flag), and what would be right.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class AnyFP4Error(Exception):
    """Base of every exception that anyfp4 raises on purpose."""


class CheckpointError(AnyFP4Error):
    """A checkpoint cannot be read as it stands.

    Attributes:
        file: the file at fault, if one is known.
        tensor: the tensor at fault, if one is known.
    """

    def __init__(self, message: str, *, file: Path | str | None = None, tensor: str | None = None) -> None:
        self.file = Path(file) if file is not None else None
        self.tensor = tensor
        where = ": ".join(str(part) for part in (self.file, tensor) if part is not None)
        super().__init__(f"{where}: {message}" if where else message)


class CheckpointFileError(CheckpointError):
    """A file is missing, truncated, or not what its name says."""


class CheckpointConfigError(CheckpointError):
    """A configuration file contradicts itself, its tensors, or the format it names."""


class TensorError(CheckpointError):
    """A tensor is missing, extra, or has a wrong shape, dtype or value."""


class UnsupportedError(AnyFP4Error):
    """A valid request that anyfp4 does not implement."""


class BackendError(AnyFP4Error):
    """A backend that was asked for by name cannot run here."""


class InsufficientMemoryError(AnyFP4Error):
    """A model does not fit the memory of its device.

    Attributes:
        parts: what is needed, bytes by what they are for.
        needed: their sum.
        available: bytes that could be taken.
    """

    def __init__(self, message: str, *, parts: Mapping[str, int], available: int) -> None:
        self.parts = dict(parts)
        self.needed, self.available = sum(parts.values()), available
        super().__init__(message)


class EngineError(AnyFP4Error):
    """The engine cannot take a request now, or will not finish it."""


class QueueFullError(EngineError):
    """Too many sequences wait already.

    Attributes:
        retry_after: seconds after which there is likely to be room.
    """

    def __init__(self, message: str, *, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class EngineStoppedError(EngineError):
    """The engine was shut down, or its thread died; then ``__cause__`` is what it died of."""


class InvalidArgumentError(AnyFP4Error, ValueError):
    """An argument to a public function is wrong."""


class EnvironmentVariableError(AnyFP4Error, ValueError):
    """An ``ANYFP4_*`` variable has a value that is not allowed, or a name that nobody reads."""
