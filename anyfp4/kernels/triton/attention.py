# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""Causal attention over the paged cache, in prefill and decode, by one order of operations.

What is computed for one query row. The keys are cut at fixed absolute positions into tiles of 64 (fewer for wide
heads). Each tile has a state of its own, a maximum m, sums of weights (mass) and weighted values acc, in float32:

    s = q·k                           matrix units, columns in order, from zero
    m = max(s) · scale                scale includes log2(e)
    p = 2^(s · scale − m)             one fma, one exp2
    mass[i] = Σ p                     over the keys i, i + 32, … of the tile: halves are added until 32 sums are left
    acc = p·v                         matrix units, keys in order, from zero; p rounded to the type of v (FP8: float16)

and the states are merged in order of the tiles, each product and each fma rounded once:

    m' = max(m, m_t)                  α = 2^(m − m'), β = 2^(m_t − m')
    mass = fma(mass_t, β, mass · α)
    acc = fma(acc_t, β, acc · α)

At the end the halves of mass are added, then the halves of that, … (``elementary.sum_halves``), and the output is
acc / mass × v_scale. A tile of which a row sees nothing has m = −∞ and zeros, and leaves the row's state as it is (but
for the sign of a zero, and the output has no negative zeros). Hence it does not matter which tiles other rows of a
program need, nor how many programs share the tiles of a sequence, and a token gives the same bits in a prompt of any
chunking as alone. Nothing depends on how many rows a program holds but the choice of matrix instruction: on NVIDIA
before sm_100 all are one in their bits (K = 16 at a time), on AMD the launcher asks for the 16-wide ones, and on sm_100
decode uses programs as large as prefill.

A hidden value must not reach a row: 0 × NaN is NaN. A program whose result has a number that is not finite (only then)
does its work again: values that are not finite are taken out of the product and added where they are visible. A finite
result is the same either way.

Two ways through the tiles, with the same bits: a program does all of them (prefill, many sequences), or programs share
them, leave each tile's state in memory, and the one that comes last merges, in the same launch (few sequences).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfp4.device import architecture
from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.triton import workspace
from anyfp4.kernels.triton.attention_kernel import attend
from anyfp4.kernels.triton.checks import (
    check_device,
    check_dtype,
    check_float,
    interpreting,
    on_device,
    power_of_two,
    row_strides,
)
from anyfp4.kernels.triton.dependency import overlapping
from anyfp4.kernels.triton.fused import outputs
from anyfp4.kernels.triton.kv_cache import as_words, check_caches, write_kv
from anyfp4.ops.attention import AttentionBatch

__all__ = ["Launch", "attention", "attention_quantize", "write_kv"]

#: keys of a tile where a row of keys has at most 256 bytes, and sums of a row's weights in it; part of the definition
TILE, SUMS = 64, 32
#: bytes that the states of tiles may take
MAX_SCRATCH = 256 << 20
_LOG2_E = 1.4426950408889634
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Launch:
    """How the work is divided. Only ``tile`` and ``sums`` are part of the definition and change bits.

    Attributes:
        rows: query rows (tokens × heads of a group) of a program.
        tile: keys of a tile.
        sums: of a row's weights in a tile.
        warps: of a program.
        stages: of the loop over tiles: 1 loads a tile when its turn comes, more copy tiles ahead into shared memory.
        delay: whether a tile is merged after the next one's scores were asked for.
        programs: most programs of a launch that shares tiles; 0 never does.
        registers: of a thread at most, on NVIDIA; 0 leaves it to the compiler.
    """

    rows: int
    tile: int
    sums: int
    warps: int = 4
    stages: int = 2
    delay: bool = False
    programs: int = 512
    registers: int = 0

    def options(self, arch: str) -> dict[str, int | bool]:
        """What the compiler is told."""
        options: dict[str, int | bool] = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}
        if arch.startswith("gfx"):
            options["matrix_instr_nonkdim"] = 16
        elif self.registers:
            options["maxnreg"] = self.registers
        return options


def launch(arch: str, padded_dim: int, itemsize: int, few: bool) -> Launch:
    """The launch for heads of ``padded_dim`` columns. ``few``: see :func:`few_rows`."""
    keys = max(16, min(TILE, TILE * 256 // (padded_dim * itemsize)))
    sums = min(SUMS, keys)
    hip, same_size = arch.startswith("gfx"), arch.startswith(("sm_100", "sm_103"))
    if few and not same_size:
        # four programs on a multiprocessor (a fourth of its registers each), each with a tile of keys on the way
        return Launch(16, keys, sums, stages=2, registers=128 if itemsize == 2 else 0)
    if hip or same_size or itemsize == 4:
        return Launch(64, keys, sums)
    # as many rows as columns of values, or warps on Ampere would share rows and pass p through memory; with two stages
    # the copy of a tile would begin after the products of the one before
    rows = 128 if padded_dim <= 128 else 64
    return Launch(rows, keys, sums, warps=8, stages=3 if arch in ("sm_80", "sm_90") else 2, delay=arch == "sm_90")


def few_rows(q: Tensor, k_cache: Tensor, batch: AttentionBatch) -> bool:
    """Whether sequences have 16 rows (tokens × heads of a group) or fewer on average: decode, and not prompts."""
    return q.shape[0] * (q.shape[1] // k_cache.shape[2]) <= 16 * batch.context_len.shape[0]


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    division: Launch | None = None,
) -> Tensor:
    """See :func:`anyfp4.ops.attention.attention`; the order of operations is at the top of this module.

    Grids follow from the shapes alone, and nothing is copied to the host: safe to capture in a CUDA graph, whose
    replays may change the contents of ``batch``. A sequence may have no tokens (padding); a token that sees no key
    (context_len 0) gives zeros. ``division`` takes the place of :func:`launch`, to measure it.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    step = _Step(q, k_cache, v_cache, batch, scale, sliding_window, k_scale, v_scale)
    _launch(step, division, out)
    return out


def attention_quantize(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    inverse_scales: Tensor,
    pre_quant_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    scale_dtype: torch.dtype = torch.uint8,
    *,
    scale: float,
    sliding_window: int | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    division: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attention` and the quantization of its result, [T, H · D], as one launch: the bits of both.

    Args:
        q: [T, H, D], D a multiple of 16; this and the others as in :func:`attention`.
        k_cache: see there.
        v_cache: see there.
        batch: see there.
        inverse_scales: float32 [Q], 1 / input global_scale of each quantization.
        pre_quant_scale: [H · D] in the dtype of q, multiplies the result before it is quantized; or None.
        dtype: of code × block_scale, float16 or bfloat16: exact in both.
        scale_dtype: of the block scales; int16 for those of ``kernels.hopper.quantize.quantize_blocks``.
        scale: see there.
        sliding_window: see there.
        k_scale: see there.
        v_scale: see there.
        division: see there.

    Returns:
        (code × block_scale [Q, T, H · D], block scales [Q, T, H · D / 16]).

    Raises:
        InvalidArgumentError: shapes or dtypes do not fit.
    """
    check_dtype("inverse_scales", inverse_scales, torch.float32)
    if q.dim() != 3 or q.shape[2] % 16:
        raise InvalidArgumentError(f"q must be [T, H, a multiple of 16], got {list(q.shape)}")
    width = q.shape[1] * q.shape[2]
    if pre_quant_scale is not None and (pre_quant_scale.shape != (width,) or pre_quant_scale.dtype != q.dtype):
        raise InvalidArgumentError(
            f"pre_quant_scale must be {q.dtype} [{width}], got {pre_quant_scale.dtype} {list(pre_quant_scale.shape)}"
        )
    values, scales = outputs(q.shape[0], width, inverse_scales, dtype, scale_dtype)
    step = _Step(q, k_cache, v_cache, batch, scale, sliding_window, k_scale, v_scale)
    _launch(step, division, q, _Quantized(values, scales, inverse_scales.contiguous(), pre_quant_scale))
    return values, scales


@dataclass(frozen=True)
class _Step:
    """What is attended to; see :func:`attention`."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: AttentionBatch
    scale: float
    sliding_window: int | None
    k_scale: float
    v_scale: float


@dataclass(frozen=True)
class _Quantized:
    """Where quantized results go, and by what they are quantized."""

    values: Tensor
    scale: Tensor
    inverse_scales: Tensor
    pre: Tensor | None


def _launch(step: _Step, division: Launch | None, out: Tensor, quantized: _Quantized | None = None) -> None:
    """Runs the kernel; ``out`` is but of the results' type where they are quantized."""
    q, k_cache, v_cache, batch = step.q, step.k_cache, step.v_cache, step.batch
    _check(q, k_cache, v_cache, batch, step.scale * step.k_scale, step.sliding_window)
    tokens, heads, dim = q.shape
    sequences = batch.context_len.shape[0]
    if q.numel() == 0 or sequences == 0:
        return
    q = row_strides(q)[0]
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    group, padded = heads // kv_heads, max(16, power_of_two(dim))
    qk, pv = _operands(q.dtype, k_cache.dtype)
    arch, few = architecture(q.device), few_rows(q, k_cache, batch)
    how = division or launch(arch, padded, qk.itemsize, few)
    tiles = triton.cdiv(batch.block_table.shape[1] * block_size, how.tile)
    # as many places as ``_first_place`` gives
    places = min(tokens * triton.cdiv(group, how.rows), tokens * group // how.rows + sequences)
    jobs, states, state = places * kv_heads, tokens * heads * tiles, padded + how.sums + 1
    programs = min(tiles, how.programs // jobs) if few and jobs <= workspace.TILES else 1
    shared = programs > 1 and 4 * states * state <= MAX_SCRATCH
    memory = torch.empty(states * state, dtype=torch.float32, device=q.device) if shared else out
    p_acc, p_mass, p_m = memory.split([states * padded, states * how.sums, states]) if shared else (out, out, out)
    window, table = step.sliding_window or 0, batch.block_table
    to = quantized or _Quantized(out, out, out, None)
    pre = out if to.pre is None else to.pre.contiguous()
    with on_device(q):
        attend[(jobs, programs if shared else 1)](
            q, as_words(k_cache), as_words(v_cache), batch.query_start, batch.context_len, table, out, p_m, p_mass,
            p_acc, workspace.of(q).counters if shared else out, to.values, to.scale, to.inverse_scales, pre, tokens,
            sequences, table.stride(0), q.stride(0), q.stride(1), kv_heads, tiles, window,
            step.scale * step.k_scale * _LOG2_E, step.v_scale,
            GROUP=group, D=dim, DIM=padded, ROWS=how.rows, TILE=how.tile, SUMS=how.sums, BLOCK_SIZE=block_size,
            WINDOW=window > 0, SHARED=shared, MERGED=min(4, power_of_two(group)), DELAY=how.delay,
            QK=_TYPES[qk], PV=_TYPES[pv], INTERPRET=interpreting(),
            SCALES=0 if quantized is None else len(to.inverse_scales), PRE=to.pre is not None, **overlapping(q),
            **how.options(arch),
        )  # fmt: skip


def _operands(q: torch.dtype, cache: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The types in which q·k and p·v are multiplied; every operand but p is exact in its type."""
    if cache == torch.float8_e4m3fn:
        return q, torch.float32 if q == torch.float32 else torch.float16
    return (q if q == cache else torch.float32), cache


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch, scale: float, sliding_window: int | None
) -> None:
    check_float("q", q)
    check_caches(k_cache, v_cache)
    tensors = {name: getattr(batch, name) for name in ("query_start", "context_len", "block_table")}
    check_device(q=q, k_cache=k_cache, v_cache=v_cache, **tensors)
    for name, x in tensors.items():
        check_dtype(name, x, torch.int32)
        if not x.is_contiguous() and (name != "block_table" or x.stride(-1) != 1):
            raise InvalidArgumentError(f"{name} must have contiguous rows")
    if k_cache.dtype == torch.float8_e4m3fn and k_cache.shape[3] % 4:
        raise InvalidArgumentError(f"the head size of an FP8 cache must be a multiple of 4, got {list(k_cache.shape)}")
    if q.dim() != 3 or q.shape[2] != k_cache.shape[3] or not k_cache.shape[2] or q.shape[1] % k_cache.shape[2]:
        raise InvalidArgumentError(f"q {list(q.shape)} does not fit caches {list(k_cache.shape)}")
    if k_cache.shape[:3].numel() >= 1 << 31:
        raise InvalidArgumentError(f"the caches may have at most 2^31 rows, got {list(k_cache.shape)}")
    sequences = batch.context_len.shape[0]
    if (
        batch.query_start.shape != (sequences + 1,)
        or batch.block_table.dim() != 2
        or batch.block_table.shape[0] != sequences
    ):
        raise InvalidArgumentError(
            f"query_start {list(batch.query_start.shape)} and block_table {list(batch.block_table.shape)} must be "
            f"[{sequences + 1}] and [{sequences}, B], as context_len is [{sequences}]"
        )
    if not 0 < scale < float("inf"):
        raise InvalidArgumentError(f"scale × k_scale must be positive and finite, got {scale}")
    if sliding_window is not None and sliding_window < 1:
        raise InvalidArgumentError(f"sliding_window must be at least 1, got {sliding_window}")
