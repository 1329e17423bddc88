"""What both layouts share: which tensors a quantized module has, and how they become a weight.

A layout is a table of names (``Suffixes``); everything else is here. Reading is rename and check, no arithmetic
except that divisors become multipliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anyfp4.checkpoint.scheme import Scheme
from anyfp4.errors import CheckpointConfigError, TensorError
from anyfp4.formats.nvfp4 import BLOCK_SIZE, NVFP4Tensor
from anyfp4.formats.weights import FP8Weight, LinearWeight, NVFP4Weight, fp8_grid

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: a tensor of that name belongs to a quantized linear module (of these or of other formats); KV scales are apart
QUANTIZATION_SUFFIXES = frozenset(
    {
        *("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
        *("weight_scale_2", "input_scale", "pre_quant_scale", "output_scale"),
        *("weight_zero_point", "input_zero_point", "weight_g_idx", "weight_shape", "weight_scale_inv"),
        *("svdquant_lora_a", "svdquant_lora_b", "qweight", "qzeros"),
    }
)
Shape = tuple[int, ...]
_SCALAR: tuple[Shape, ...] = ((), (1,))


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor.

    Attributes:
        dtype: element type.
        shape: sizes.
        nbytes: bytes of its data.
        file: the file that holds it.
        offset: where its data starts in the file, in bytes.
    """

    dtype: torch.dtype
    shape: Shape
    nbytes: int
    file: Path
    offset: int


@dataclass(frozen=True)
class Suffixes:
    """The names that a layout gives to the tensors of a module, and its conventions.

    Attributes:
        packed: NVFP4 codes, uint8 [N, K/2].
        block_scale: NVFP4 block scales [N, K/16]; FP8 layers call their scale so too.
        weight_global: the weight's global scale.
        input_global: the input's global scale.
        divisors: whether global scales are stored as divisors.
        pre_quant_scale: its name, or None where the layout has none.
        scalar_shape: the shape of a single number as the producer writes it; reading takes [] and [1] alike.
        column_row_scales: whether FP8 scales of rows are written as [N, 1]; reading takes [N] and [N, 1] alike.
        spread_block_scales: whether FP8 scales of blocks are written as [⌈N/128⌉, 1, ⌈K/128⌉, 1]; reading takes these
            and [⌈N/128⌉, ⌈K/128⌉] alike.
    """

    packed: str
    block_scale: str
    weight_global: str
    input_global: str
    divisors: bool
    pre_quant_scale: str | None
    scalar_shape: Shape
    column_row_scales: bool
    spread_block_scales: bool


@dataclass(frozen=True)
class _Expected:
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[Shape, ...]
    required: bool = True


def check_module(names: Suffixes, scheme: Scheme, module: str, infos: Mapping[str, TensorInfo]) -> None:
    """Checks that a quantized module has exactly the tensors of its scheme, with their dtypes and shapes.

    Args:
        names: the layout.
        scheme: what the configuration says of the module; not dense.
        module: its name.
        infos: its tensors by suffix (``weight_scale`` for ``<module>.weight_scale``), without KV scales.

    Raises:
        TensorError: a tensor is missing, unknown, or has a wrong dtype or shape.
        CheckpointConfigError: the module is dense although the configuration does not exclude it.
    """
    main = names.packed if scheme.kind == "nvfp4" else "weight"
    dense = infos.get("weight")
    if dense is not None and dense.dtype in FLOATS and not QUANTIZATION_SUFFIXES & infos.keys():
        raise CheckpointConfigError(
            f"is dense ({describe(dense.dtype, dense.shape)}), but the configuration says {scheme.label}: "
            "the tensors or the configuration's list of excluded modules are wrong",
            file=dense.file,
            tensor=f"{module}.weight",
        )
    file = next(iter(infos.values())).file
    if main not in infos:
        raise TensorError(f"is missing ({scheme.label})", file=file, tensor=f"{module}.{main}")
    n, k = _matrix_shape(scheme, f"{module}.{main}", infos[main])
    expected = _expected(names, scheme, n, k)
    for suffix, want in expected.items():
        if suffix in infos:
            _check_info(f"{module}.{suffix}", infos[suffix], want)
        elif want.required:
            raise TensorError(f"is missing ({scheme.label})", file=file, tensor=f"{module}.{suffix}")
    for suffix in sorted(infos.keys() - expected.keys()):
        raise TensorError(
            f"does not belong to a module stored as {scheme.label}, which has {', '.join(sorted(expected))}",
            file=infos[suffix].file,
            tensor=f"{module}.{suffix}",
        )


def linear(
    names: Suffixes,
    scheme: Scheme,
    module: str,
    raw: Mapping[str, Tensor],
    infos: Mapping[str, TensorInfo],
) -> LinearWeight:
    """The weight that a checked module's tensors stand for; checks their values.

    Args:
        names: the layout.
        scheme: how the module is stored.
        module: its name.
        raw: its tensors by suffix, as the files hold them; the result shares their memory. The matrix may lie on
            another device than the rest, which follows it there once it is checked.
        infos: the same tensors' headers.

    Raises:
        TensorError: a block scale is NaN or negative, a global or FP8 scale is not positive and finite (or its
            reciprocal is not), or a ``pre_quant_scale`` is not finite.
    """
    device = raw[names.packed if scheme.kind == "nvfp4" else "weight"].device

    def scalars(suffix: str, divisor: bool = False) -> Tensor:
        return positive_scales(raw[suffix], f"{module}.{suffix}", infos[suffix].file, divisor).to(device)

    bias = raw["bias"].to(device) if "bias" in raw else None
    if scheme.kind == "fp8":
        if scheme.block_wise:
            scale = fp8_block_scales(raw["weight_scale"], f"{module}.weight_scale", infos["weight_scale"].file)
            scale = scale.to(device)
        else:
            scale = scalars("weight_scale")
        input_scale = None if scheme.input_dynamic or scheme.weight_only else scalars("input_scale")
        return FP8Weight(raw["weight"], scale, input_scale, bias, scheme.weight_only)
    block_scale = raw[names.block_scale]
    check_block_scale(block_scale, f"{module}.{names.block_scale}", infos[names.block_scale].file)
    weight = NVFP4Tensor(raw[names.packed], block_scale.to(device), scalars(names.weight_global, names.divisors))
    pre_quant_scale = None
    if names.pre_quant_scale is not None and names.pre_quant_scale in raw:
        pre_quant_scale = raw[names.pre_quant_scale]
        check_finite(pre_quant_scale, f"{module}.{names.pre_quant_scale}", infos[names.pre_quant_scale].file)
        pre_quant_scale = pre_quant_scale.to(device)
    input_scale = None if scheme.weight_only else scalars(names.input_global, names.divisors)
    return NVFP4Weight(weight, input_scale, pre_quant_scale, bias)


def _matrix_shape(scheme: Scheme, tensor: str, info: TensorInfo) -> tuple[int, int]:
    if len(info.shape) != 2:
        raise TensorError(f"must be a matrix, got {describe(info.dtype, info.shape)}", file=info.file, tensor=tensor)
    n, columns = info.shape
    k = 2 * columns if scheme.kind == "nvfp4" else columns
    if n == 0 or k == 0:
        raise TensorError(f"is empty: shape {list(info.shape)}", file=info.file, tensor=tensor)
    if scheme.kind == "nvfp4" and info.dtype == torch.uint8 and k % BLOCK_SIZE:
        raise TensorError(f"K = {k} is not a multiple of {BLOCK_SIZE}", file=info.file, tensor=tensor)
    return n, k


def _expected(names: Suffixes, scheme: Scheme, n: int, k: int) -> dict[str, _Expected]:
    expected = {"bias": _Expected(FLOATS, ((n,),), required=False)}
    if scheme.kind == "fp8":
        rows, columns = fp8_grid(n, k)
        shapes: tuple[Shape, ...] = _SCALAR
        if scheme.block_wise:
            shapes = ((rows, columns), (rows, 1, columns, 1))
        elif scheme.weight_per_row:
            shapes = ((n,), (n, 1))
        expected["weight"] = _Expected((torch.float8_e4m3fn,), ((n, k),))
        expected["weight_scale"] = _Expected(FLOATS, shapes)
        if not (scheme.input_dynamic or scheme.weight_only):
            expected["input_scale"] = _Expected(FLOATS, _SCALAR)
        return expected
    expected[names.packed] = _Expected((torch.uint8,), ((n, k // 2),))
    expected[names.block_scale] = _Expected((torch.float8_e4m3fn,), ((n, k // BLOCK_SIZE),))
    expected[names.weight_global] = _Expected((torch.float32,), _SCALAR)
    if not scheme.weight_only:
        expected[names.input_global] = _Expected((torch.float32,), _SCALAR)
    if scheme.pre_quant_scale_allowed and names.pre_quant_scale is not None:
        expected[names.pre_quant_scale] = _Expected(FLOATS, ((k,),), required=False)
    return expected


def _check_info(tensor: str, info: TensorInfo, want: _Expected) -> None:
    if info.dtype not in want.dtypes or info.shape not in want.shapes:
        dtypes = " or ".join(str(d).removeprefix("torch.") for d in want.dtypes)
        shapes = " or ".join(str(list(s)) for s in want.shapes)
        raise TensorError(
            f"must be {dtypes} {shapes}, got {describe(info.dtype, info.shape)}", file=info.file, tensor=tensor
        )


def check_block_scale(block_scale: Tensor, tensor: str, file: Path) -> None:
    """Checks block scales (float8_e4m3fn [N, K/16]).

    Raises:
        TensorError: one is NaN or negative; −0 is a zero like another.
    """
    bits = block_scale.view(torch.uint8).numpy()  # numpy: torch's thread pool costs more than the work here
    if bits.max() <= 0x7E:
        return
    bad = (bits > 0x7E) & (bits != 0x80)  # 0x7F and 0xFF are NaN, 0x80 is −0, the rest above is negative
    if bad.any():
        row, block = (int(i[0]) for i in bad.nonzero())
        value = block_scale[row, block].item()
        raise TensorError(
            f"block scale [{row}, {block}] is {value}, and {int(bad.sum())} in all are NaN or negative; "
            "a block scale must be a number not below 0",
            file=file,
            tensor=tensor,
        )


def fp8_block_scales(stored: Tensor, tensor: str, file: Path) -> Tensor:
    """The scales of a block-wise FP8 weight.

    Nothing is ever divided by them, so they may be as small as the subnormal ones that ModelOpt gives empty blocks.

    Args:
        stored: any floating dtype, [rows, columns] or [rows, 1, columns, 1].
        tensor: its name, for messages.
        file: its file, for messages.

    Returns:
        float32 [rows, columns].

    Raises:
        TensorError: one is not positive and finite.
    """
    scales = stored.reshape(stored.shape[0], -1).to(torch.float32)
    bad = ~((scales > 0) & torch.isfinite(scales))
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        value = scales[row, column].item()
        raise TensorError(
            f"the scale of block [{row}, {column}] is {value}, and {int(bad.sum())} in all are not positive and finite",
            file=file,
            tensor=tensor,
        )
    return scales


def check_finite(x: Tensor, tensor: str, file: Path) -> None:
    """Checks that a tensor holds no NaN and no infinity.

    Raises:
        TensorError: it does.
    """
    if not bool(torch.isfinite(x).all()):
        raise TensorError("holds a NaN or an infinity", file=file, tensor=tensor)


def positive_scales(stored: Tensor, tensor: str, file: Path, is_divisor: bool) -> Tensor:
    """Stored scales as multipliers.

    Args:
        stored: any floating dtype, one number or one for each row.
        tensor: its name, for messages.
        file: its file, for messages.
        is_divisor: whether the reciprocals are wanted.

    Returns:
        float32 [1] or [N]; they and their reciprocals are positive and finite.

    Raises:
        TensorError: they are not.
    """
    scales = stored.reshape(-1).to(torch.float32)
    reciprocal = torch.ones_like(scales) / scales
    good = (scales > 0) & torch.isfinite(scales) & (reciprocal > 0) & torch.isfinite(reciprocal)
    multiplier = reciprocal if is_divisor else scales
    good &= torch.isfinite(torch.ones_like(multiplier) / multiplier)
    if not bool(good.all()):
        raise TensorError(
            f"is {scales[~good][0].item()}; a scale must be positive and finite, and so must its reciprocal",
            file=file,
            tensor=tensor,
        )
    return multiplier


def describe(dtype: torch.dtype, shape: Shape) -> str:
    """Dtype and shape for a message, such as ``uint8 [576, 288]``."""
    return f"{dtype} {list(shape)}".removeprefix("torch.")
