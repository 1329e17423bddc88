"""Native FP4 on Blackwell: W4A4 layers through torch's scaled matmul (cuBLAS), everything else as in backend triton.

Only for who asks for it by name. cuBLAS chooses its kernel, and with that the order of its sums, by the number of rows
too, and nobody has proved here that a row's bits do not depend on the others. It has not run on hardware yet either:
tests check the layouts and what the product is called with.

    y = scaled_mm(codes of x, codes of W, both with block scales)  float32
    y × alpha + bias, as in every backend

Block scales go in cuBLAS's layout: tiles of 128 rows × 4 columns, tile by tile along a band of rows; in a tile of 512
bytes, row r and column c lie at 16 · (r mod 32) + 4 · ⌊r / 32⌋ + c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyfp4.backends.base import PreparedLinear
from anyfp4.backends.triton import TritonBackend
from anyfp4.device import architecture
from anyfp4.errors import InvalidArgumentError
from anyfp4.formats.nvfp4 import quantize_blocks
from anyfp4.formats.weights import LinearWeight, NVFP4Weight
from anyfp4.ops import linear as reference

_ARCHITECTURES = ("sm_100", "sm_103", "sm_120")
#: scaled_mm wants N a multiple of 16 and K one of 32
_N, _K = 16, 32


@dataclass(frozen=True, eq=False)
class CublasGroup:
    """The rows of a layer that share a quantization of the activation.

    Attributes:
        rows: int64 [R], their places in the output.
        input_scale: float32 []: the input global scale.
        packed: uint8 [R', K'/2], padded with zeros to R' rows and K' columns.
        scale: uint8, the block scales in cuBLAS's layout.
    """

    rows: Tensor
    input_scale: Tensor
    packed: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False)
class CublasNVFP4:
    """A W4A4 layer: ``alpha`` float32 [N], ``pre_quant_scale`` [K] or None, ``bias`` float32 [N] or None."""

    groups: Sequence[CublasGroup]
    alpha: Tensor
    pre_quant_scale: Tensor | None
    bias: Tensor | None


class CublasBackend(TritonBackend):
    """Torch's native FP4 product."""

    name = "cublas"
    description = "native FP4 of Blackwell GPUs for W4A4 layers, through torch's scaled matmul"
    by_name_only = (
        "it runs only if asked for by name: nobody has proved that a row's bits do not depend on the rest of the batch"
    )

    def why_not(
        self, device: torch.device, shape: tuple[int, int] | None = None, numerics: str = "native"
    ) -> str | None:
        """See :meth:`Backend.why_not`."""
        reason = super().why_not(device, shape, numerics)
        if reason is not None:
            return reason
        arch = architecture(device)
        if arch not in _ARCHITECTURES:
            return f"needs a GPU with FP4 units ({', '.join(_ARCHITECTURES)}), this is {arch}"
        if not hasattr(torch.nn.functional, "scaled_mm"):
            return f"torch {torch.__version__} has no torch.nn.functional.scaled_mm"
        if numerics == "blackwell":
            return "cuBLAS does not say in which order it adds; numerics='blackwell' runs in backend triton"
        return None

    def prepare(self, weight: LinearWeight, numerics: str = "native") -> PreparedLinear:
        """See :meth:`Backend.prepare`. W4A4 weights are copied into cuBLAS's layout, others are Triton's affair."""
        if not isinstance(weight, NVFP4Weight) or weight.weight_only:
            return super().prepare(weight, numerics)
        if numerics != "native":
            raise InvalidArgumentError(f"numerics must be 'native' in backend cublas, got {numerics!r}")
        tensor, slices = weight.weight, reference.tensor_rows(weight.weight)
        groups = []
        for scale, shards in reference.input_scale_groups(weight):
            rows = torch.cat([torch.arange(slices[s].start, slices[s].stop, device=tensor.device) for s in shards])
            packed = _padded(tensor.packed[rows], _N, _K // 2)
            block_scale = _padded(tensor.block_scale.view(torch.uint8)[rows], _N, _K // 16)
            groups.append(CublasGroup(rows, scale, packed, swizzled(block_scale)))
        sizes = torch.tensor(tensor.shard_sizes, device=tensor.device)
        alpha = reference.alpha(weight).repeat_interleave(sizes)
        bias = None if weight.bias is None else weight.bias.to(torch.float32)
        data = CublasNVFP4(groups, alpha, weight.pre_quant_scale, bias)
        held = [alpha, *(t for g in groups for t in (g.rows, g.packed, g.scale))]
        held += [t for t in (data.pre_quant_scale, bias) if t is not None]
        return PreparedLinear(self.name, weight.shape, numerics, sum(t.nbytes for t in held), data)

    def matrices(self, prepared: PreparedLinear) -> tuple[Tensor, ...]:
        """See :meth:`Backend.matrices`."""
        data = prepared.data
        if not isinstance(data, CublasNVFP4):
            return super().matrices(prepared)
        n, k = prepared.shape
        packed = torch.empty((n, k // 2), dtype=torch.uint8, device=data.alpha.device)
        scale = torch.empty((n, k // 16), dtype=torch.uint8, device=data.alpha.device)
        for group in data.groups:
            count = len(group.rows)
            packed[group.rows] = group.packed[:count, : k // 2]
            scale[group.rows] = unswizzled(group.scale, group.packed.shape[0])[:count, : k // 16]
        return packed, scale.view(torch.float8_e4m3fn)

    def linear(self, x: Tensor, prepared: PreparedLinear, out_dtype: torch.dtype | None = None) -> Tensor:
        """See :func:`anyfp4.ops.linear.linear`."""
        data = prepared.data
        if not isinstance(data, CublasNVFP4):
            return super().linear(x, prepared, out_dtype)
        n, k = prepared.shape
        if x.dtype not in reference.ACTIVATION_DTYPES or x.dim() < 1 or x.shape[-1] != k:
            raise InvalidArgumentError(
                f"x must be bfloat16, float16 or float32 [..., {k}], got {x.dtype} {list(x.shape)}"
            )
        rows = x.reshape(-1, k)
        if data.pre_quant_scale is not None:
            rows = rows * data.pre_quant_scale.to(x.dtype)
        y = torch.empty((rows.shape[0], n), dtype=torch.float32, device=x.device)
        for group in data.groups:
            y[:, group.rows] = _product(rows, group)[:, : len(group.rows)]
        y = y * data.alpha
        if data.bias is not None:
            y = y + data.bias
        return y.to(out_dtype or x.dtype).view(*x.shape[:-1], n)


def _product(x: Tensor, group: CublasGroup) -> Tensor:
    """Σ over K of code × block_scale on both sides: x [M, K] to float32 [M, R']."""
    codes, block_scale = quantize_blocks(x, group.input_scale)
    a = _padded(codes, 1, _K // 2)
    a_scale = swizzled(_padded(block_scale.view(torch.uint8), 1, _K // 16))
    functional = torch.nn.functional
    recipe, swizzle = functional.ScalingType.BlockWise1x16, functional.SwizzleType.SWIZZLE_32_4_4
    return functional.scaled_mm(
        a.view(torch.float4_e2m1fn_x2),
        group.packed.view(torch.float4_e2m1fn_x2).t(),
        a_scale.view(torch.float8_e4m3fn),
        recipe,
        group.scale.view(torch.float8_e4m3fn),
        recipe,
        swizzle,
        swizzle,
        output_dtype=torch.float32,
    )


def swizzled(scale: Tensor) -> Tensor:
    """Block scales in cuBLAS's layout.

    Args:
        scale: uint8 [R, C].

    Returns:
        uint8 [⌈R/128⌉ · ⌈C/4⌉ · 512], what lies outside filled with zeros.
    """
    tiles = _padded(scale, 128, 4)
    rows, columns = tiles.shape
    return tiles.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4).flatten()


def unswizzled(scale: Tensor, rows: int) -> Tensor:
    """The inverse of :func:`swizzled`: uint8 [⌈R/128⌉ · 128, ⌈C/4⌉ · 4] for R = ``rows``."""
    bands = -(-rows // 128)
    return scale.view(bands, -1, 32, 4, 4).permute(0, 3, 2, 1, 4).reshape(bands * 128, -1)


def _padded(t: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros below and to the right, up to multiples of ``rows`` and ``columns``."""
    return torch.nn.functional.pad(t, (0, -t.shape[1] % columns, 0, -t.shape[0] % rows)).contiguous()
