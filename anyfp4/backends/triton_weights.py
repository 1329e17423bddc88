"""Linear weights on a GPU: what the Triton backend makes of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from anyfp4.errors import UnsupportedError
from anyfp4.formats import e4m3
from anyfp4.formats.weights import DenseWeight, FP8Weight, NVFP4Weight
from anyfp4.ops import linear as reference


@dataclass(frozen=True, eq=False)
class TritonNVFP4:
    """An NVFP4 layer.

    Attributes:
        packed: ``kernels.triton.linear_packed.Packed`` or, for numerics="blackwell", ``linear_blackwell.Blocks``.
        inverse_scales: float32 [Q]: 1 / input global_scale of each quantization; Q = 0 if weight-only.
        pre_quant_scale: [K] or None.
    """

    packed: Any
    inverse_scales: Tensor
    pre_quant_scale: Tensor | None

    @property
    def values_dtype(self) -> torch.dtype:
        """Of a quantized activation."""
        return torch.float16

    @property
    def scales_dtype(self) -> torch.dtype:
        """Of its block scales."""
        return torch.uint8


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


def kernel(name: str) -> Any:
    """A module of kernels; importing it imports Triton."""
    return import_module(f"anyfp4.kernels.triton.{name}")


def prepare_nvfp4(weight: NVFP4Weight, numerics: str) -> TritonNVFP4:
    """Codes and scales in words; what is rare is folded in here, so that kernels need not look for it."""
    layout = kernel("layout")
    tensor, k = weight.weight, weight.shape[1]
    alpha, magnitude = alpha_and_scales(weight)
    runs, inverses = runs_of(weight)
    bias = _float(weight.bias)
    # scales first: what they need on the way is gone when the codes take their memory
    if numerics == "blackwell" and not weight.weight_only:
        blackwell = kernel("linear_blackwell")
        scales, exponents = layout.pack_scales(magnitude, blackwell.WORDS), _exponents(magnitude)
        del magnitude
        words = layout.pack_codes(tensor.packed, blackwell.WORDS)
        tiles = {rows: layout.cut(runs, rows, tensor.device) for rows in blackwell.ROWS}
        packed = blackwell.Blocks(words, scales, *exponents, tiles, k, alpha, bias)
        return TritonNVFP4(packed, inverses, weight.pre_quant_scale)
    subnormal = bool(((magnitude > 0) & (magnitude < 8)).any())
    scales = layout.pack_scales(magnitude, layout.CODE_WORDS)
    del magnitude
    words = layout.pack_codes(signed_codes(weight), layout.CODE_WORDS)
    return TritonNVFP4(_packed(words, scales, subnormal, runs, k, alpha, bias), inverses, weight.pre_quant_scale)


def prepare_fp8(weight: FP8Weight) -> TritonFP8 | TritonFP8Blocks:
    """The bytes in words."""
    layout = kernel("layout")
    n, k = weight.shape
    data = weight.weight.view(torch.uint8)
    rows = data.split(max(1, layout.PIECE // k))  # a comparison of the whole takes as much memory as the weight
    nan = torch.cat([((part & 0x7F) == e4m3.NAN).any(dim=1) for part in rows])
    if bool(nan.any()):
        data = data.masked_fill((data & 0x7F) == e4m3.NAN, 0)
    words = layout.pack_bytes(data, layout.BYTE_WORDS)
    bias, one = _float(weight.bias), torch.ones(1, device=data.device)
    alpha = (one if weight.block_wise else weight.weight_scale).expand(n).masked_fill(nan, torch.nan).contiguous()
    if weight.block_wise:
        packed = kernel("linear_fp8_block").Fp8Blocks(words, weight.weight_scale.contiguous(), k, alpha, bias)
        return TritonFP8Blocks(packed, weight.weight_only)
    packed = _packed(words, None, False, [(n, 0)], k, alpha, bias)
    return TritonFP8(packed, weight.input_scale, weight.weight_only)


def prepare_dense(weight: DenseWeight) -> TritonDense:
    """As it is."""
    n, _ = weight.shape
    w = weight.weight.contiguous()
    tiles = kernel("layout").cut_all([(n, 0)], w.device)
    return TritonDense(w, tiles, torch.ones(n, device=w.device), _float(weight.bias))


def matrices(data: TritonNVFP4 | TritonFP8 | TritonFP8Blocks | TritonDense) -> tuple[Tensor, ...]:
    """See :meth:`Backend.matrices`."""
    if isinstance(data, TritonDense):
        return (data.weight,)
    layout, packed = kernel("layout"), data.packed
    require_numbers(packed.alpha)
    if not isinstance(data, TritonNVFP4):
        return (layout.unpack_bytes(packed.words, packed.k).view(torch.float8_e4m3fn),)
    scale = layout.unpack_scales(packed.scales, packed.k)
    return layout.unpack_codes(packed.words, packed.k), scale.view(torch.float8_e4m3fn)


def require_numbers(alpha: Tensor) -> None:
    """Refuses a weight whose NaN scales have become rows of NaN.

    Raises:
        UnsupportedError: ``alpha`` [N] holds a NaN.
    """
    if bool(alpha.isnan().any()):
        raise UnsupportedError("a scale of the weight is NaN; which, the prepared layout does not tell")


def _packed(
    words: Tensor, scales: Tensor | None, subnormal: bool, runs: list[tuple[int, int]], k: int, alpha: Tensor,
    bias: Tensor | None,
) -> Any:  # fmt: skip
    tiles = kernel("layout").cut_all(runs, words.device)
    return kernel("linear_packed").Packed(words, scales, subnormal, tiles, k, alpha, bias)


def runs_of(weight: NVFP4Weight) -> tuple[list[tuple[int, int]], Tensor]:
    """(rows, index of the input scale) of each run of shards, and 1 / each distinct input scale."""
    sizes = weight.weight.shard_sizes
    if weight.input_global_scale is None:
        return [(sum(sizes), 0)], torch.empty(0, dtype=torch.float32, device=weight.weight.device)
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
    # the division is the reference's: float32, on the CPU
    return runs, (1.0 / torch.tensor(distinct, dtype=torch.float32)).to(weight.weight.device)


def alpha_and_scales(weight: NVFP4Weight) -> tuple[Tensor, Tensor]:
    """float32 [N], NaN for a row with a NaN block scale; and the scales' magnitudes without NaN, uint8 [N, K/16]."""
    tensor = weight.weight
    scale = tensor.block_scale.view(torch.uint8)
    nan = ((scale & 0x7F) == e4m3.NAN).any(dim=1)
    alpha = reference.alpha(weight).repeat_interleave(torch.tensor(tensor.shard_sizes, device=tensor.device))
    return alpha.masked_fill(nan, torch.nan), (scale & 0x7F).masked_fill(nan[:, None], 0)


def signed_codes(weight: NVFP4Weight) -> Tensor:
    """Packed codes with the (never seen, but possible) negative scales' signs moved into them."""
    packed, negative = weight.weight.packed, weight.weight.block_scale.view(torch.uint8) >= 0x80
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
    """The tensors in a dataclass, and in what it holds."""
    if isinstance(data, Tensor):
        yield data
        return
    if isinstance(data, dict):
        data = data.values()
    elif hasattr(data, "__dataclass_fields__"):
        data = vars(data).values()
    elif not isinstance(data, tuple):
        return
    for value in data:
        yield from _tensors(value)
