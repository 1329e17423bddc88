"""What a model will take of its device's memory, told from the checkpoint's headers, before anything is loaded.

How many bytes a layer has once it is prepared is the backend's own affair, so it is not calculated here but asked: a
few hundred rows of zeros of each kind and K are prepared, and the rest follows, since a layout repeats itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from anyfp4 import device as devices
from anyfp4.backends import registry
from anyfp4.backends.base import Backend
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.errors import InsufficientMemoryError
from anyfp4.formats.nvfp4 import NVFP4Tensor
from anyfp4.formats.weights import DenseWeight, FP8Weight, LinearWeight, NVFP4Weight, fp8_grid
from anyfp4.models.config import DecoderConfig

#: rows after which every layout repeats itself (``PreparedLinear.nbytes``)
_PERIOD = 256


@dataclass(frozen=True)
class Footprint:
    """Bytes of a loaded model.

    Attributes:
        weights: by what they are for.
        workspace: what a product takes for a moment, at most.
    """

    weights: Mapping[str, int]
    workspace: int


def measure(
    checkpoint: Checkpoint, config: DecoderConfig, ops: Backend, device: torch.device, numerics: str, backend: str,
    positions: int,
) -> Footprint:  # fmt: skip
    """What a model takes.

    Args:
        checkpoint: opened; no data is read.
        config: the model's, with the dtype to be used.
        ops: the backend of the decoder's ops.
        device: where it goes.
        numerics: of W4A4 products.
        backend: as asked for: ``auto`` or a name.
        positions: rows of the rotary table.
    """
    prepared = _Prepared(device, config.dtype, numerics, backend)
    layers = head = 0
    joined = {("", 0): 0}  # (parent, K) -> rows of the packed layers that may be joined; there may be none at all
    for module, weight in checkpoint.described():
        n, k = weight.shape
        if module != "lm_head":
            layers += prepared.nbytes(weight)
        elif not config.tie_word_embeddings:
            head = prepared.nbytes(weight)
        if not isinstance(weight, DenseWeight):
            key = (module.rpartition(".")[0], k)
            joined[key] = joined.get(key, 0) + n
    c, item = config, config.dtype.itemsize
    embedding = c.vocab_size * c.hidden_size * item
    norms = ((2 * c.num_layers + 1) * c.hidden_size + (2 * c.num_layers * c.head_dim if c.qk_norm else 0)) * item
    table = positions * c.head_dim * torch.float32.itemsize
    weights = {
        f"linear layers as backend {ops.name} holds them": layers,
        "embedding, norms and rotary table": embedding + norms + table,
        "output head": head,
    }
    workspace = max(ops.workspace_nbytes((n, k), config.dtype) for (_, k), n in joined.items())
    return Footprint({what: nbytes for what, nbytes in weights.items() if nbytes}, workspace)


class _Prepared:
    """Bytes of prepared layers; remembers what it has tried."""

    def __init__(self, device: torch.device, dtype: torch.dtype, numerics: str, backend: str) -> None:
        self.device, self.dtype, self.numerics, self.backend = device, dtype, numerics, backend
        self._known: dict[object, int] = {}

    def nbytes(self, weight: LinearWeight) -> int:
        """Bytes of a layer, given its weight without data."""
        n = weight.shape[0]
        if n <= 2 * _PERIOD:
            return self._of(weight, n)
        each = self._of(weight, 2 * _PERIOD) - self._of(weight, _PERIOD)
        return self._of(weight, _PERIOD + n % _PERIOD) + (n // _PERIOD - 1) * each

    def _of(self, weight: LinearWeight, rows: int) -> int:
        chosen = registry.select(self.device, shape=weight.shape, numerics=self.numerics, requested=self.backend)
        key = (chosen.name, rows, *_kind(weight))
        if key not in self._known:
            try:
                self._known[key] = chosen.prepare(self._zeros(weight, rows), self.numerics).nbytes
            except torch.OutOfMemoryError:  # there is no room even for this: the file's size will do to say so
                return weight.nbytes * rows // weight.shape[0]
        return self._known[key]

    def _zeros(self, weight: LinearWeight, n: int) -> LinearWeight:
        """A weight of that kind with ``n`` rows of zeros, on the device."""
        k, device = weight.shape[1], self.device
        one = torch.ones(1, device=device)
        bias = None if weight.bias is None else torch.zeros(n, dtype=weight.bias.dtype, device=device)
        if isinstance(weight, DenseWeight):
            return DenseWeight(torch.zeros((n, k), dtype=self.dtype, device=device), bias)
        if isinstance(weight, FP8Weight):
            codes = torch.zeros((n, k), dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
            rows = (n,) if weight.weight_scale.shape == weight.weight.shape[:1] else (1,)
            scale = torch.ones(fp8_grid(n, k) if weight.block_wise else rows, device=device)
            return FP8Weight(codes, scale, None if weight.input_scale is None else one, bias, weight.weight_only)
        packed = torch.zeros((n, k // 2), dtype=torch.uint8, device=device)
        block_scale = torch.zeros((n, k // 16), dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        pre = weight.pre_quant_scale
        return NVFP4Weight(
            NVFP4Tensor(packed, block_scale, one),
            None if weight.input_global_scale is None else one,
            None if pre is None else torch.ones(k, dtype=pre.dtype, device=device),
            bias,
        )


def _kind(weight: LinearWeight) -> tuple[object, ...]:
    """Everything but the number of rows that the layout may depend on."""
    common = (type(weight), weight.shape[1], None if weight.bias is None else weight.bias.dtype)
    if isinstance(weight, NVFP4Weight):
        return (*common, weight.weight_only, None if weight.pre_quant_scale is None else weight.pre_quant_scale.dtype)
    if isinstance(weight, FP8Weight):
        per_row = weight.weight_scale.dim() == 1 and weight.weight_scale.shape[0] > 1
        return (*common, weight.weight_only, weight.block_wise, per_row, weight.input_scale is None)
    return common


def require(parts: Mapping[str, int], device: torch.device, fraction: float | None, folder: Path) -> None:
    """Refuses a model that does not fit.

    Args:
        parts: what is needed, bytes by what they are for.
        device: where it is to go.
        fraction: of the device's memory that may be in use; see :func:`anyfp4.device.budget`.
        folder: the model's, for the message.

    Raises:
        InsufficientMemoryError: with all figures.
    """
    memory, available = devices.memory(device), devices.budget(device, fraction)
    needed = sum(parts.values())
    if needed <= available:
        return
    listed = ", ".join(f"{what} {devices.size(nbytes)}" for what, nbytes in parts.items())
    kept = memory.free - available
    limit = f", of which memory_fraction leaves {devices.size(kept)} alone" if kept > 0 else ""
    raise InsufficientMemoryError(
        f"{folder} does not fit {device}: it needs {devices.size(needed)}, and {devices.size(available)} can be taken "
        f"({devices.size(memory.free)} of {devices.size(memory.total)} are free{limit}). "
        f"Needed are: {listed}. What helps: {_help(needed, available, memory, device)}",
        parts=parts,
        available=available,
    )


def _help(needed: int, available: int, memory: devices.Memory, device: torch.device) -> str:
    ways = []
    if needed <= memory.free:
        ways.append("a larger memory_fraction")
    if memory.total - memory.free >= needed - available:
        ways.append(f"ending other programs that use {device}")
    ways.append("a smaller max_step_tokens, max_model_len or kv_cache_bytes")
    ways.append("a device with more memory" if device.type == "cpu" else "a GPU with more memory, or device cpu")
    return ", ".join(ways)
