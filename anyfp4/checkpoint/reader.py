"""Reading a checkpoint: everything that headers and configuration can tell is checked before any data is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from anyfp4.checkpoint import layout
from anyfp4.checkpoint.checks import check_tensors, kv_scale_names, names_of
from anyfp4.checkpoint.config import read_config, read_json, read_quantization
from anyfp4.checkpoint.describe import described
from anyfp4.checkpoint.files import INDEX_FILE, scan
from anyfp4.checkpoint.layout import FLOATS, QUANTIZATION_SUFFIXES, TensorInfo
from anyfp4.checkpoint.scheme import QuantizationConfig, Scheme
from anyfp4.checkpoint.tensor_reader import TensorReader
from anyfp4.errors import CheckpointFileError, TensorError
from anyfp4.formats.weights import DenseWeight, LinearWeight


class Checkpoint:
    """A model folder, opened and checked; a context manager.

    Attributes:
        folder: the model folder.
        config: the content of its ``config.json``.
        quantization: what its configuration says of the quantization.
        total_bytes: bytes of all tensors.
    """

    def __init__(self, folder: Path | str) -> None:
        """Opens a folder, and checks its configuration and the headers of its files; reads no tensor data.

        Args:
            folder: holds ``config.json`` and safetensors files, in one of the layouts or unquantized.

        Raises:
            CheckpointFileError: a file is missing, truncated, or not what its name says.
            CheckpointConfigError: the configuration is malformed, or contradicts itself or the tensors.
            TensorError: a tensor is missing, extra, or has a wrong dtype or shape.
            UnsupportedError: the quantization is one that is not implemented.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            what = "is not a folder" if self.folder.exists() else "does not exist"
            raise CheckpointFileError(f"{what}; a model folder is expected", file=self.folder)
        self.config: dict[str, Any] = read_config(self.folder)
        self.quantization: QuantizationConfig = read_quantization(self.folder, self.config)
        self._infos = scan_folder(self.folder)
        self._modules = check_tensors(self.quantization, self._infos)
        self.total_bytes = sum(info.nbytes for info in self._infos.values())
        self._reader = TensorReader(self._infos)
        self._asked: set[str] = set()

    @property
    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self._infos)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor.

        Raises:
            TensorError: there is no such tensor.
        """
        return self.info(name).file

    def info(self, name: str) -> TensorInfo:
        """What the header says of a tensor.

        Raises:
            TensorError: there is no such tensor.
        """
        if name not in self._infos:
            raise TensorError("is missing", file=self.folder, tensor=name)
        return self._infos[name]

    def linear_modules(self) -> list[str]:
        """The names of all quantized modules, sorted."""
        return sorted(module for module in self._modules if self._is_quantized(module))

    def described(self) -> Iterator[tuple[str, LinearWeight]]:
        """Every linear layer, quantized or not: its name, and its weight on the meta device, without data."""
        for module, infos in self._modules.items():
            weight = described(self.quantization, module, infos)
            if weight is not None:
                yield module, weight

    def scheme_of(self, module: str) -> Scheme:
        """How a linear module is stored."""
        return self.quantization.scheme_of(module)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None, device: torch.device | None = None) -> Tensor:
        """An unquantized tensor, in memory of its own.

        Args:
            name: its name.
            shape: what it must be; not checked if None.
            device: where it goes; the CPU by default.

        Raises:
            TensorError: it is missing, or has another shape, or is not float32, bfloat16 or float16.
        """
        info = self.info(name)
        if info.dtype not in FLOATS:
            raise TensorError(
                f"must be bfloat16, float16 or float32, got {layout.describe(info.dtype, info.shape)}",
                file=info.file,
                tensor=name,
            )
        _check_shape(name, info, shape, info.shape)
        self._asked.add(name)
        return self._reader.read(name, device)

    def linear(
        self,
        module: str,
        shape: tuple[int, int] | None = None,
        bias: bool | None = None,
        device: torch.device | None = None,
    ) -> LinearWeight:
        """A linear layer's weight, whatever it is stored as, in memory of its own.

        Args:
            module: its name.
            shape: (N, K) that it must have; not checked if None.
            bias: True if it must have a bias, False if it must not, None to take what is there.
            device: where it goes; the CPU by default. Its matrix goes there straight, its scales are checked first.

        Raises:
            TensorError: a tensor is missing, unexpected, of a wrong shape or dtype, or a scale has a bad value.
            CheckpointConfigError: the module is dense, but the configuration says that it is quantized.
        """
        infos = self._modules.get(module, {})
        if not infos:
            raise TensorError("is missing", file=self.folder, tensor=f"{module}.weight")
        if bias is not None and bias != ("bias" in infos):
            what = "is missing" if bias else "is not expected: the model's configuration has no bias here"
            file = next(iter(infos.values())).file
            raise TensorError(what, file=file, tensor=f"{module}.bias")
        scheme = self.scheme_of(module)
        if scheme.kind == "dense":
            weight = self.tensor(f"{module}.weight", shape, device)
            if weight.dim() != 2:
                raise TensorError(
                    f"must be a matrix [N, K], got {list(weight.shape)}",
                    file=self.file_of(f"{module}.weight"),
                    tensor=f"{module}.weight",
                )
            n = weight.shape[0]
            return DenseWeight(weight, self.tensor(f"{module}.bias", (n,), device) if "bias" in infos else None)
        names = names_of(self.quantization)
        layout.check_module(names, scheme, module, infos)
        main = names.packed if scheme.kind == "nvfp4" else "weight"
        n, columns = infos[main].shape
        stored = (n, 2 * columns if scheme.kind == "nvfp4" else columns)
        _check_shape(f"{module}.{main}", infos[main], shape, stored)
        raw = {s: self._reader.read(f"{module}.{s}", device if s == main else None) for s in infos}
        self._asked.update(f"{module}.{suffix}" for suffix in infos)
        return layout.linear(names, scheme, module, raw, infos)

    def kv_scales(self, attention: str) -> tuple[float | None, float | None]:
        """The multipliers of an attention module's FP8 K and V cache.

        Args:
            attention: its name, such as ``model.layers.0.self_attn``.

        Returns:
            (k_scale, v_scale); None where none is stored: the cache is not quantized, or (ModelOpt) its scale is 1.

        Raises:
            TensorError: a scale is not positive and finite.
        """
        if self.quantization.kv_cache == "none":
            return None, None
        k, v = kv_scale_names(self.quantization, attention)
        return self._kv_scale(k), self._kv_scale(v)

    def unread(self) -> list[str]:
        """The tensors that nobody has asked for, sorted."""
        return sorted(self._infos.keys() - self._asked)

    def close(self) -> None:
        """Closes the files; tensors already read stay valid."""
        self._reader.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_quantized(self, module: str) -> bool:
        infos = self._modules[module]
        return self.scheme_of(module).kind != "dense" and bool(QUANTIZATION_SUFFIXES & infos.keys())

    def _kv_scale(self, name: str) -> float | None:
        if name not in self._infos:
            return None
        self._asked.add(name)
        stored = self._reader.read(name)
        return float(layout.positive_scales(stored, name, self._infos[name].file, is_divisor=False))


def scan_folder(folder: Path) -> dict[str, TensorInfo]:
    """The headers of all tensors of a model folder; see ``files.scan``."""
    index = folder / INDEX_FILE
    return scan(folder, read_json(index) if index.exists() or index.is_symlink() else None)


def _check_shape(name: str, info: TensorInfo, shape: tuple[int, ...] | None, stored: tuple[int, ...]) -> None:
    if shape is not None and tuple(shape) != stored:
        raise TensorError(
            f"has shape {list(stored)}, but the model's configuration needs {list(shape)}",
            file=info.file,
            tensor=name,
        )
