"""NVFP4: codes, block scales and global scales; the quantized weight tensor.

A tensor [N, K] is cut along K into blocks of 16. Each element is a code (E2M1), each block has a block_scale (E4M3),
and each shard of rows a global_scale (fp32 multiplier):

    true value = code × block_scale × global_scale

code × block_scale has at most 6 significant bits and lies in 2⁻¹⁰…2688, so it is exact in bfloat16 and float16; the
global scale stays out of the operand and is applied to the accumulated sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.formats import e2m1, e4m3

BLOCK_SIZE = 16
#: largest code × largest block scale: a tensor whose amax is MAX × global_scale uses the full range
MAX = e2m1.MAX * e4m3.MAX


@dataclass(frozen=True, eq=False)
class NVFP4Tensor:
    """A quantized matrix of N rows and K columns, in plain row order.

    Attributes:
        packed: uint8 [N, K/2], two codes a byte, low nibble = even column.
        block_scale: float8_e4m3fn [N, K/16].
        global_scale: float32 [S], a positive finite multiplier for each shard.
        shard_sizes: rows of each shard (one of the projections fused into one matrix); they add up to N.
    """

    packed: Tensor
    block_scale: Tensor
    global_scale: Tensor
    shard_sizes: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.packed.dtype != torch.uint8 or self.packed.dim() != 2:
            raise InvalidArgumentError(f"packed must be uint8 [N, K/2], got {_describe(self.packed)}")
        n, k = self.packed.shape[0], 2 * self.packed.shape[1]
        if k == 0 or k % BLOCK_SIZE:
            raise InvalidArgumentError(f"K = {k} is not a positive multiple of {BLOCK_SIZE}")
        if self.block_scale.dtype != torch.float8_e4m3fn or self.block_scale.shape != (n, k // BLOCK_SIZE):
            raise InvalidArgumentError(
                f"block_scale must be float8_e4m3fn [{n}, {k // BLOCK_SIZE}], got {_describe(self.block_scale)}"
            )
        if not self.shard_sizes:
            object.__setattr__(self, "shard_sizes", (n,))
        if self.global_scale.dim() == 0:
            object.__setattr__(self, "global_scale", self.global_scale.reshape(1))
        if sum(self.shard_sizes) != n or min(self.shard_sizes) < 1:
            raise InvalidArgumentError(f"shard_sizes {self.shard_sizes} do not add up to {n} rows")
        shards = len(self.shard_sizes)
        if self.global_scale.dtype != torch.float32 or self.global_scale.shape != (shards,):
            raise InvalidArgumentError(f"global_scale must be float32 [{shards}], got {_describe(self.global_scale)}")
        devices = {t.device for t in (self.packed, self.block_scale, self.global_scale)}
        if len(devices) > 1:
            raise InvalidArgumentError(f"packed, block_scale and global_scale lie on {len(devices)} devices")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.packed.shape[0], 2 * self.packed.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(t.numel() * t.element_size() for t in (self.packed, self.block_scale, self.global_scale))

    def row_global_scale(self) -> Tensor:
        """The global scale of each row: float32 [N]."""
        sizes = torch.tensor(self.shard_sizes, device=self.global_scale.device)
        return self.global_scale.repeat_interleave(sizes)


def check_global_scale(global_scale: Tensor) -> None:
    """Checks that global scales are float32, positive, and have a finite reciprocal.

    Raises:
        InvalidArgumentError: they are not.
    """
    if global_scale.dtype != torch.float32:
        raise InvalidArgumentError(f"global_scale must be float32, got {global_scale.dtype}")
    good = (global_scale > 0) & torch.isfinite(global_scale) & torch.isfinite(1.0 / global_scale)
    if not bool(good.all()):
        bad = global_scale.reshape(-1)[~good.reshape(-1)][0].item()
        raise InvalidArgumentError(f"global_scale must be positive and finite, with a finite reciprocal; got {bad}")


def default_global_scale(x: Tensor) -> Tensor:
    """amax / 2688, which maps the largest magnitude to code 6 × scale 448; 1 for a tensor of zeros.

    Returns:
        float32 [].
    """
    amax = x.detach().abs().amax().to(torch.float32)
    if not bool(torch.isfinite(amax)):
        raise InvalidArgumentError(f"the tensor to quantize holds {amax.item()}")
    # below this, 1/global_scale overflows; such a tensor quantizes to zeros and tiny codes all the same
    smallest = torch.tensor(2.0**-126, dtype=torch.float32, device=x.device)
    return torch.where(amax > 0, torch.maximum(amax / MAX, smallest), torch.ones_like(amax))


def quantize_blocks(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes blocks of 16 along the last axis, given the global scale.

    In fp32, each operation rounded once, with g = 1 / global_scale:

        s    = E4M3(min(g · (amax16 · (1/6)), 448))
        code = E2M1(x · (g / s)),   0 where s = 0

    which is the order of operations of vLLM's Triton kernel. A NaN in a block makes its scale NaN; an infinity
    saturates.

    Args:
        x: [..., K] float32, bfloat16 or float16, K a multiple of 16.
        global_scale: float32 [] or [1], a multiplier.

    Returns:
        (packed uint8 [..., K/2], block_scale float8_e4m3fn [..., K/16]).
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InvalidArgumentError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] == 0 or x.shape[-1] % BLOCK_SIZE:
        raise InvalidArgumentError(
            f"the last axis of x must be a positive multiple of {BLOCK_SIZE}, got {list(x.shape)}"
        )
    if global_scale.numel() != 1 or global_scale.dtype != torch.float32:
        raise InvalidArgumentError(f"global_scale must be float32 [], got {_describe(global_scale)}")
    g = 1.0 / global_scale.reshape(())
    blocks = x.to(torch.float32).unflatten(-1, (-1, BLOCK_SIZE))  # [..., K/16, 16]
    sixth = torch.tensor(1.0 / 6.0, dtype=torch.float32, device=x.device)
    amax = blocks.abs().amax(dim=-1)  # [..., K/16]; NaN propagates
    block_scale = e4m3.encode(torch.clamp(g * (amax * sixth), max=e4m3.MAX))
    s = block_scale.to(torch.float32).unsqueeze(-1)
    codes = e2m1.encode(blocks * (g / s))
    codes = torch.where(s == 0, torch.zeros_like(codes), codes)
    return e2m1.pack(codes.flatten(-2)), block_scale


def dequantize_blocks(packed: Tensor, block_scale: Tensor) -> Tensor:
    """code × block_scale, exact: packed [..., K/2], block_scale [..., K/16] to float32 [..., K]."""
    codes: Tensor = e2m1.decode_packed(packed).unflatten(-1, (-1, BLOCK_SIZE))
    return (codes * block_scale.to(torch.float32).unsqueeze(-1)).flatten(-2)


def quantize(w: Tensor, global_scale: Tensor | float | None = None) -> NVFP4Tensor:
    """Quantizes a matrix to NVFP4, rounding to nearest.

    Args:
        w: [N, K] float32, bfloat16 or float16, finite, K a multiple of 16.
        global_scale: the multiplier; amax / 2688 by default.

    Returns:
        The quantized tensor, one shard.

    Raises:
        InvalidArgumentError: wrong shape or dtype, a non-finite element, or a global scale that is not positive.
    """
    if w.dim() != 2:
        raise InvalidArgumentError(f"w must be a matrix [N, K], got {list(w.shape)}")
    if not bool(torch.isfinite(w).all()):
        raise InvalidArgumentError("w holds a NaN or an infinity")
    if global_scale is None:
        scale = default_global_scale(w)
    else:
        scale = torch.as_tensor(global_scale, dtype=torch.float32, device=w.device).reshape(())
    check_global_scale(scale)
    packed, block_scale = quantize_blocks(w, scale)
    return NVFP4Tensor(packed, block_scale, scale.reshape(1))


def dequantize(tensor: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that ``tensor`` stands for: code × block_scale (exact) × global_scale (one fp32 rounding).

    Args:
        tensor: N rows, K columns.
        dtype: of the result; the float32 value is rounded to it once more.

    Returns:
        [N, K].
    """
    values = dequantize_blocks(tensor.packed, tensor.block_scale)
    return (values * tensor.row_global_scale().unsqueeze(-1)).to(dtype)


def _describe(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)}".removeprefix("torch.")
