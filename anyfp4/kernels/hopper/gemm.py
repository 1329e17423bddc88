"""y = x · Wᵀ for many tokens, W as records of NVFP4 (``layout.py``) or dense; the order over K of every kernel here.

A persistent kernel (``gemm.cu``): one thread copies with the bulk copy engine, two warpgroups multiply. Records are
unpacked on their way into ``wgmma``'s registers, for each tile of tokens anew: the instructions fit beside the matrix
unit's work, and neither a workspace nor a pass over the weight is needed. Beside the sums of a segment, those of the
segments before stay in registers, and in shared memory where a tile has more than 192 tokens.

A dense weight with few tokens is the same kernel with narrow tiles and a deep ring: it runs at the speed of memory.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor

from anyfp4.kernels.hopper import layout, runtime
from anyfp4.kernels.hopper.compiler import Defines
from anyfp4.kernels.hopper.linear import EXPONENT, Records
from anyfp4.kernels.hopper.plan import SEGMENT
from anyfp4.kernels.hopper.runs import Runs

FILES = ("async.cu", "wgmma.cu", "unpack.cu", "unpack_half.cu", "gemm_copy.cu", "gemm_store.cu", "gemm.cu")
_KINDS = "TTTPPPPPPiiiiiifi"
#: left rows of a block's tile, columns of a stage, of gemm.cu
_LEFT, _STEP = 128, 64
#: bytes of shared memory of a block, less what gemm.cu declares itself
_SHARED = 225 << 10
_OUT = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@dataclass(frozen=True)
class Shape:
    """Macros of gemm.cu that change no bit of a result; see there."""

    columns: int
    cluster: int = 1
    swap: int = 0
    lag: int = 0
    batch: int = 4
    sets: int = 1
    kept: int = 0
    height: int = 8

    @property
    def tokens(self) -> int:
        """Of a tile, all blocks of a cluster together."""
        return _LEFT * self.cluster if self.swap else self.columns

    @property
    def rows(self) -> int:
        """Of a tile of w, likewise."""
        return self.columns if self.swap else _LEFT * self.cluster


#: microseconds that 64 columns of K take for a tile of records on a busy H200; 208 and 224 from their neighbours
_MICROSECONDS = {
    Shape(80, sets=2): 0.36,
    Shape(96, sets=2): 0.38,
    Shape(112, sets=2): 0.4,
    Shape(128, sets=2): 0.425,
    Shape(160, cluster=2, sets=2): 0.49,
    Shape(176, cluster=2, batch=2): 0.505,
    Shape(192, cluster=2): 0.53,
    Shape(208, batch=2, kept=72): 0.58,
    Shape(224, batch=2, kept=64): 0.63,
    Shape(256, batch=2, kept=56): 0.72,
}


def macros(shape: Shape, packed: bool, bfloat: bool, out: int, row: bool, bias: bool) -> tuple[Defines, int]:
    """What gemm.cu is compiled with, and its dynamic shared memory."""
    left, right = 2 * layout.RECORD if packed else _LEFT * 128, shape.columns * 128
    kept = shape.kept or shape.columns // 2
    results = 2 * max(0 if out == 0 else right, (shape.columns // 2 - kept) * 512)
    # a ring of stages, aligned to 1024 bytes, and two barriers for each
    stages = min(12, (_SHARED - results - 1024) // (right + left + 16))
    defines = {name.upper(): value for name, value in asdict(shape).items()}
    defines |= {"KEPT": kept, "BLOCKS": shape.columns // 16, "STAGES": stages, "SEGMENT_STEPS": SEGMENT // _STEP}
    defines |= {"PACKED": int(packed), "BFLOAT": int(bfloat), "OUT": out, "ROW": int(row), "BIAS": int(bias)}
    return tuple(defines.items()), stages * right + -(-stages * left // 1024) * 1024 + results + 16 * stages


@lru_cache(maxsize=256)
def _kernel(shape: Shape, packed: bool, bfloat: bool, out: int, row: bool, bias: bool, device: int) -> runtime.Kernel:
    defines, shared = macros(shape, packed, bfloat, out, row, bias)
    return runtime.load(FILES, "gemm", _KINDS, device, defines, shared)


def packed_gemm(
    x: Tensor, weight: Records, out_dtype: torch.dtype, row: Tensor | None = None, shape: Shape | None = None
) -> Tensor:
    """As ``linear.linear``, with the same bits, for many tokens.

    Args:
        x: bfloat16 [Q, M, K], M at least 1, one for each quantization of the activation: code × block_scale; or, Q = 1,
            an unquantized activation in bfloat16 or float16. Contiguous.
        weight: N rows.
        out_dtype: of the result.
        row: float32 [M], a factor of each token, or None.
        shape: of the tiles; by default by M and N.

    Returns:
        [M, N].
    """
    q, m, k = x.shape
    x = x.view(q * m, k)
    shape = shape or packed_shape(m, weight.by_run, _processors(x))
    boxes = runtime.tensor_map(x, (shape.columns // shape.cluster, _STEP))
    operands = _Operands(boxes, boxes, weight.records, weight.by_run, weight.alpha, weight.bias, row)
    unit = layout.UNIT if x.dtype == torch.bfloat16 else 1.0
    return _launch(operands, shape, x, m, out_dtype, unit)


def dense_gemm(
    x: Tensor, w: Tensor, runs: Runs, bias: Tensor | None, out_dtype: torch.dtype, shape: Shape | None = None
) -> Tensor:
    """x · wᵀ + bias.

    Args:
        x: [M, K] bfloat16 or float16, contiguous, M at least 1, K a multiple of 8.
        w: [N, K] likewise.
        runs: all rows of w in one.
        bias: float32 [N] or None.
        out_dtype: of the result.
        shape: of the tiles; by default by M.

    Returns:
        [M, N].
    """
    m = x.shape[0]
    shape = shape or dense_shape(m)
    right, left = (w, x) if shape.swap else (x, w)
    left_map = runtime.tensor_map(left, (_LEFT, _STEP))
    right_map = runtime.tensor_map(right, (shape.columns // shape.cluster, _STEP))
    return _launch(_Operands(left_map, right_map, None, runs, None, bias, None), shape, x, m, out_dtype, 1.0)


@dataclass(frozen=True, eq=False)
class _Operands:
    left: runtime.TensorMap
    right: runtime.TensorMap
    records: Tensor | None
    runs: Runs
    alpha: Tensor | None
    bias: Tensor | None
    row: Tensor | None


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _launch(of: _Operands, shape: Shape, x: Tensor, m: int, out_dtype: torch.dtype, unit: float) -> Tensor:
    n, k = sum(of.runs.sizes), x.shape[1]
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    # the copy engine stores only where rows start at multiples of 16 bytes
    store = out_dtype != torch.float32 and n % 8 == 0
    y_map = runtime.tensor_map(y, (64 if shape.swap else shape.columns, 64)) if store else of.right
    kinds = (
        of.records is not None,
        x.dtype == torch.bfloat16,
        _OUT[out_dtype],
        of.row is not None,
        of.bias is not None,
    )
    tiles = of.runs.tiles(shape.rows)
    clusters = min(_processors(x) // shape.cluster, tiles * math.ceil(m / shape.tokens))
    arguments = (
        of.left, of.right, y_map, of.records, y, of.alpha, of.bias, of.row, of.runs.table, len(of.runs.sizes), tiles,
        int(store), m, n, math.ceil(k / _STEP), unit, EXPONENT,
    )  # fmt: skip
    kernel = _kernel(shape, *kinds, x.get_device())
    kernel.launch((clusters * shape.cluster, 1, 1), 384, arguments, cluster=shape.cluster, overlap=True)
    return y


def packed_shape(m: int, runs: Runs, processors: int) -> Shape:
    """The tiles for records: those that end first."""
    return min(_MICROSECONDS, key=lambda shape: _step_time(shape, m, runs, processors))


def packed_time(m: int, runs: Runs, k: int, processors: int) -> float:
    """Microseconds of a product with those tiles, what comes before and after left out."""
    return k / _STEP * _step_time(packed_shape(m, runs, processors), m, runs, processors)


def _step_time(shape: Shape, m: int, runs: Runs, processors: int) -> float:
    """Microseconds of 64 columns of K: the measured time of a tile, times a multiprocessor's tiles in turn."""
    tiles = runs.tiles(shape.rows) * math.ceil(m / shape.tokens)
    return _MICROSECONDS[shape] * math.ceil(tiles / (processors // shape.cluster))


def dense_shape(m: int) -> Shape:
    """The tiles for a dense weight. Few tokens take one tile, so that the weight is read once."""
    if m > 256:
        return Shape(256, swap=1, kept=64)
    columns = 16 * math.ceil(m / 16) if m <= 128 else 32 * math.ceil(m / 32)
    return Shape(columns, kept=64 if columns > 192 else 0)


def dense_pays(m: int, n: int) -> bool:
    """Whether there are enough tiles to keep a GPU busy; few of them would have to share the segments of K."""
    return m > 256 or n >= 12288
