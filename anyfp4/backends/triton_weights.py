"""Linear weights on a GPU: what the Triton backend makes of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from anyfp4.formats import e4m3
from anyfp4.formats.weights import DenseWeight, FP8Weight, NVFP4Weight
from anyfp4.ops import linear as reference


@dataclass(frozen=True, eq=False)
class TritonNVFP4:
    """An NVFP4 layer.

    Attributes:
        packed: ``kernels.triton.linear_packed.Packed`` or, for numerics="blackwell", ``linear_blackwell.Blocks``.
        inverse_scales: float32 [1] each: 1 / input global_scale of each quantization; none if weight-only.
        pre_quant_scale: [K] or None.
    """

    packed: Any
    inverse_scales: tuple[Tensor, ...]
    pre_quant_scale: Tensor | None


@dataclass(frozen=True, eq=False)
class TritonFP8:
    """An FP8 layer; ``packed`` as above, ``input_scale`` float32 [1] or None (one for each token, or weight-only)."""

    packed: Any
    input_scale: Tensor | None
    weight_only: bool


@dataclass(frozen=True, eq=False)
class TritonFP8Blocks:
    """A block-wise FP8 layer; ``packed`` is ``kernels.triton.linear_fp8_block.Fp8Blocks``."""

    packed: Any
    weight_only: bool


@dataclass(frozen=True, eq=False)
class TritonDense:
    """An unquantized layer; ``tiles`` for many tokens, by rows; ``alpha`` ones."""

    weight: Tensor
    tiles: Any
    alpha: Tensor
    bias: Tensor | None


def _kernel(name: str) -> Any:
    return import_module(f"anyfp4.kernels.triton.{name}")


def prepare_nvfp4(weight: NVFP4Weight, numerics: str) -> TritonNVFP4:
    """Codes and scales in words; what is rare is folded in here, so that kernels need not look for it."""
    layout = _kernel("layout")
    tensor, k = weight.weight, weight.shape[1]
    scale = tensor.block_scale.view(torch.uint8)
    nan = ((scale & 0x7F) == e4m3.NAN).any(dim=1)
    alpha = reference.alpha(weight).repeat_interleave(torch.tensor(tensor.shard_sizes, device=tensor.device))
    alpha = alpha.masked_fill(nan, torch.nan)
    runs, inverses = _runs(weight)
    magnitude = (scale & 0x7F).masked_fill(nan[:, None], 0)
    bias = _float(weight.bias)
    if numerics == "blackwell" and not weight.weight_only:
        blackwell = _kernel("linear_blackwell")
        words = layout.pack_codes(tensor.packed, blackwell.WORDS)
        tiles = {rows: layout.cut(runs, rows, tensor.device) for rows in blackwell.ROWS}
        packed = blackwell.Blocks(
            words, layout.pack_scales(magnitude, blackwell.WORDS), *_exponents(magnitude), tiles, k, alpha, bias
        )
        return TritonNVFP4(packed, inverses, weight.pre_quant_scale)
    subnormal = bool(((magnitude > 0) & (magnitude < 8)).any())
    words = layout.pack_codes(_signed_codes(tensor.packed, scale), layout.CODE_WORDS)
    scales = layout.pack_scales(magnitude, layout.CODE_WORDS)
    return TritonNVFP4(_packed(words, scales, subnormal, runs, k, alpha, bias), inverses, weight.pre_quant_scale)


def prepare_fp8(weight: FP8Weight) -> TritonFP8 | TritonFP8Blocks:
    """The bytes in words."""
    layout = _kernel("layout")
    n, k = weight.shape
    data = weight.weight.view(torch.uint8)
    nan = (data & 0x7F) == e4m3.NAN
    words = layout.pack_bytes(data.masked_fill(nan, 0), layout.BYTE_WORDS)
    bias, one = _float(weight.bias), torch.ones(1, device=data.device)
    alpha = (one if weight.block_wise else weight.weight_scale).expand(n).masked_fill(nan.any(dim=1), torch.nan)
    if weight.block_wise:
        kernel = _kernel("linear_fp8_block")
        packed = kernel.Fp8Blocks(words, weight.weight_scale.contiguous(), k, alpha.contiguous(), bias)
        return TritonFP8Blocks(packed, weight.weight_only)
    packed = _packed(words, None, False, [(n, 0)], k, alpha.contiguous(), bias)
    return TritonFP8(packed, weight.input_scale, weight.weight_only)


def prepare_dense(weight: DenseWeight) -> TritonDense:
    """As it is."""
    n, _ = weight.shape
    w = weight.weight.contiguous()
    tiles = _kernel("layout").cut_all([(n, 0)], w.device)
    return TritonDense(w, tiles, torch.ones(n, device=w.device), _float(weight.bias))


def _packed(
    words: Tensor, scales: Tensor | None, subnormal: bool, runs: list[tuple[int, int]], k: int, alpha: Tensor,
    bias: Tensor | None,
) -> Any:  # fmt: skip
    tiles = _kernel("layout").cut_all(runs, words.device)
    return _kernel("linear_packed").Packed(words, scales, subnormal, tiles, k, alpha, bias)


def _runs(weight: NVFP4Weight) -> tuple[list[tuple[int, int]], tuple[Tensor, ...]]:
    """(rows, index of the input scale) of each run of shards, and 1 / each distinct input scale."""
    sizes = weight.weight.shard_sizes
    if weight.input_global_scale is None:
        return [(sum(sizes), 0)], ()
    distinct: list[float] = []
    runs: list[tuple[int, int]] = []
    for size, value in zip(sizes, weight.input_global_scale.tolist(), strict=True):
        if value not in distinct:
            distinct.append(value)
        index = distinct.index(value)
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0] + size, index)
        else:
            runs.append((size, index))
    device = weight.weight.device
    # the division is the reference's: float32, on the CPU
    scales = 1.0 / torch.tensor(distinct, dtype=torch.float32)
    return runs, tuple(s.reshape(1).to(device) for s in scales)


def _signed_codes(packed: Tensor, scale: Tensor) -> Tensor:
    """Codes with the (never seen, but possible) negative scales' signs moved into them."""
    negative = scale >= 0x80
    if not bool(negative.any()):
        return packed
    return packed ^ (negative.to(torch.uint8) * 0x88).repeat_interleave(8, dim=1)


def _exponents(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest exponent of each row's nonzero scales: int32 [N]; (8, −6) if all are zero."""
    lowest = magnitude.masked_fill(magnitude == 0, 0x7E).amin(dim=1)
    return tuple(((v.to(torch.int32) >> 3).clamp(min=1) - 7) for v in (lowest, magnitude.amax(dim=1)))  # type: ignore[return-value]


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.float32).contiguous()


def nbytes(data: TritonNVFP4 | TritonFP8 | TritonFP8Blocks | TritonDense) -> int:
    """Bytes of memory held."""
    return sum(t.nbytes for t in _tensors(data))


def _tensors(data: Any) -> Iterator[Tensor]:
    for value in vars(data).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from (t for t in value if isinstance(t, Tensor))
        elif isinstance(value, dict):
            yield from (t for tiles in value.values() for t in _tensors(tiles))
        elif hasattr(value, "__dataclass_fields__"):
            yield from _tensors(value)
