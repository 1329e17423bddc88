"""Linear layers: NVFP4 (W4A4 and weight-only), FP8 and dense; the readable reference that every backend must match.

    y = round_to_output_type((Σ a·w) × alpha + bias)

with the sum in float32 (how, is the numerics), alpha a float32 per shard, applied once per output row, then the bias
in float32, then one rounding to the output type. Block-wise FP8 applies its scales to the product of each block, before
these are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4.device import architecture
from anyfp4.errors import InvalidArgumentError, UnsupportedError
from anyfp4.formats import NVFP4Tensor, e4m3
from anyfp4.formats.nvfp4 import dequantize_blocks, quantize_blocks
from anyfp4.formats.weights import FP8_BLOCK_SIZE, FP8Weight, LinearWeight, NVFP4Weight
from anyfp4.numerics import blackwell, hopper
from anyfp4.ops import exact

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: weight elements dequantized at a time by the weight-only product
_TILE_ELEMENTS = 4 << 20


def linear(
    x: Tensor, weight: LinearWeight, *, numerics: str = "native", out_dtype: torch.dtype | None = None
) -> Tensor:
    """y = x · Wᵀ + bias for any kind of weight.

    Row i of the result depends on row i of ``x`` and on the weight alone.

    Args:
        x: [..., K] bfloat16, float16 or float32.
        weight: N rows, K columns.
        numerics: of a W4A4 product. ``blackwell``: bit for bit what Blackwell's NVFP4 instruction gives;
            ``native``: the device's own tensor cores, and on a CPU the same as ``blackwell``.
        out_dtype: of the result; that of ``x`` by default.

    Returns:
        [..., N].

    Raises:
        InvalidArgumentError: shapes, dtypes or numerics do not fit.
        UnsupportedError: no bit model for ``native`` numerics on this device.
    """
    check(x, weight, numerics)
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, NVFP4Weight):
        y = _nvfp4_linear(rows, weight, numerics)
    elif isinstance(weight, FP8Weight):
        y = _fp8_linear(rows, weight)
    else:
        y = exact.matmul(rows, weight.weight)
    if weight.bias is not None:
        y = y + weight.bias.to(torch.float32)
    return y.to(out_dtype or x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def check(x: Tensor, weight: LinearWeight, numerics: str) -> None:
    """Checks what :func:`linear` says of its arguments; backends call it before they touch a pointer."""
    if x.dtype not in ACTIVATION_DTYPES:
        raise InvalidArgumentError(f"x must be bfloat16, float16 or float32, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise InvalidArgumentError(f"x must be [..., {weight.shape[1]}], got {list(x.shape)}")
    device = weight.weight.device
    if x.device != device:
        raise InvalidArgumentError(f"x lies on {x.device}, the weight on {device}")
    if numerics not in ("native", "blackwell"):
        raise InvalidArgumentError(f"numerics must be 'native' or 'blackwell', got {numerics!r}")


def input_scale_groups(weight: NVFP4Weight) -> list[tuple[Tensor, list[int]]]:
    """The distinct input global scales of a fused layer, each with the shards that use it.

    Every distinct one gets its own quantization of the activation, so no shard is mis-scaled.
    """
    assert weight.input_global_scale is not None
    groups: dict[float, list[int]] = {}
    for shard, value in enumerate(weight.input_global_scale.tolist()):
        groups.setdefault(value, []).append(shard)
    return [(weight.input_global_scale[shards[0]], shards) for shards in groups.values()]


def alpha(weight: NVFP4Weight) -> Tensor:
    """float32 [S]: input global scale × weight global scale (weight-only: the weight's alone) of each shard."""
    if weight.input_global_scale is None:
        return weight.weight.global_scale
    return weight.input_global_scale * weight.weight.global_scale


def _nvfp4_linear(x: Tensor, weight: NVFP4Weight, numerics: str) -> Tensor:
    tensor = weight.weight
    if weight.pre_quant_scale is not None:
        x = x * weight.pre_quant_scale.to(x.dtype)
    if weight.weight_only:
        y = _weight_only_product(x, tensor)
    else:
        y = torch.empty((x.shape[0], tensor.shape[0]), dtype=torch.float32, device=x.device)
        rows = tensor_rows(tensor)
        for scale, shards in input_scale_groups(weight):
            packed, block_scale = quantize_blocks(x, scale)
            for shard in shards:
                part = rows[shard]
                y[:, part] = _product(packed, block_scale, tensor.packed[part], tensor.block_scale[part], numerics)
    sizes = torch.tensor(tensor.shard_sizes, device=y.device)
    return y * alpha(weight).repeat_interleave(sizes)


def tensor_rows(tensor: NVFP4Tensor) -> list[slice]:
    """The rows of each shard."""
    slices, start = [], 0
    for size in tensor.shard_sizes:
        slices.append(slice(start, start + size))
        start += size
    return slices


def _product(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, numerics: str) -> Tensor:
    """Σ over K of code × block_scale on both sides: float32 [M, N]."""
    arch = architecture(a.device)
    if numerics == "blackwell" or arch == "cpu":
        return blackwell.matmul(a, a_scale, w, w_scale)
    if arch == "sm_90":
        dense = (dequantize_blocks(a, a_scale).half(), dequantize_blocks(w, w_scale).half())
        return hopper.matmul(*dense)
    raise UnsupportedError(
        f"the reference has no bit model of {arch}'s matrix units; use numerics='blackwell' or another backend"
    )


def _weight_only_product(x: Tensor, tensor: NVFP4Tensor) -> Tensor:
    """Exact dot products with code × block_scale, each rounded once, a tile of rows at a time: float32 [M, N]."""
    n, k = tensor.shape
    step = max(1, _TILE_ELEMENTS // k)
    tiles = [
        exact.matmul(x, dequantize_blocks(tensor.packed[i : i + step], tensor.block_scale[i : i + step]))
        for i in range(0, n, step)
    ]
    return torch.cat(tiles, dim=-1)


def _fp8_linear(x: Tensor, weight: FP8Weight) -> Tensor:
    """y = exact dot product of the codes × (s × weight_scale), s static or that of each row."""
    if weight.block_wise:
        return _fp8_block_linear(x, weight)
    if weight.weight_only:
        return exact.matmul(x, weight.weight) * weight.weight_scale
    x32 = x.to(torch.float32)
    scale = _fp8_scale(x32) if weight.input_scale is None else weight.input_scale.reshape(1, 1)
    return exact.matmul(_fp8_codes(x32, scale), weight.weight) * (scale * weight.weight_scale)


def _fp8_block_linear(x: Tensor, weight: FP8Weight) -> Tensor:
    """The products of the blocks along K, added in order, every operation rounded once to float32.

    A block's product is the exact dot product × (s × weight_scale), s that of the row's 128 columns; weight-only:
    the exact dot product with x itself × weight_scale. A NaN comes out as the canonical one.
    """
    n, k = weight.shape
    y = torch.zeros((x.shape[0], n), dtype=torch.float32, device=x.device)
    for block in range(weight.weight_scale.shape[1]):
        columns = slice(block * FP8_BLOCK_SIZE, min((block + 1) * FP8_BLOCK_SIZE, k))
        factor = weight.weight_scale[:, block].repeat_interleave(FP8_BLOCK_SIZE)[:n]
        part = x[:, columns]
        if not weight.weight_only:
            part = part.to(torch.float32)
            scale = _fp8_scale(part)
            part, factor = _fp8_codes(part, scale), scale * factor
        y = y + exact.matmul(part, weight.weight[:, columns]) * factor
    return torch.where(y.isnan(), torch.full_like(y, torch.nan), y)


def _fp8_scale(x: Tensor) -> Tensor:
    """The dynamic scale of each row: float32 [M, K] to [M, 1].

    amax / 448; 1 where amax < 2⁻¹¹⁷, since the reciprocal could not be finite, and such a row becomes zeros.
    """
    amax = x.abs().amax(dim=-1, keepdim=True)
    return torch.where(amax < 2.0**-117, torch.ones_like(amax), amax / e4m3.MAX)


def _fp8_codes(x: Tensor, scale: Tensor) -> Tensor:
    """E4M3(x × (1 / scale))."""
    return e4m3.encode(x * (1.0 / scale))
