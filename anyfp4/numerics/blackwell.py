"""Bit model of Blackwell's NVFP4 matrix instruction: the definition of ``numerics="blackwell"``.

The instruction (``tcgen05.mma`` and ``mma.sync``, kind mxf4nvf4, block16, ue4m3 scales) takes K = 64 at a
time, which is four blocks of 16, and adds their dot products to an fp32 accumulator. A scale is m/8 × 2^e
with 0 ≤ m ≤ 15 and −6 ≤ e ≤ 8; subnormal scales keep e = −6. In each step, in the order of K:

1. The five terms are the accumulator, with its own exponent, and for each block its dot product of codes
   times the two significands m/8, with exponent e_a + e_b. The dot product is exact and is not normalised.
2. E is the largest exponent of the five. A term that is absent has none: a zero accumulator, a block where
   one of the two scales is zero, a block whose 16 products are all zero. A block whose products cancel is
   present.
3. Each term is truncated toward zero to a multiple of 2^(E−35), the five are added exactly, and the sum is
   truncated toward zero to fp32. A sum of zero is +0.

K is padded to 64 with zeros, which are absent terms. The sign bit of a scale is ignored. A NaN scale makes
every output of its row or column the NaN 0x7FFFFFFF, zero codes or not.

Source: Xie et al., *MMA-Sim*, arXiv 2511.10909; the rule for absent terms is from the first author's later
simulator (``mmasim`` 2.1), refined by probing the hardware. That simulator gives absent terms the exponent
−139 rather than none, which is the same thing here: as every term is a multiple of 2^−20, an E below 16
truncates none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.formats import e2m1, e4m3
from anyfp4.formats.nvfp4 import BLOCK_SIZE
from anyfp4.numerics import float64

#: how much of K one instruction takes
CHUNK = 64
#: terms are truncated to this many bits below the largest exponent
FRACTION_BITS = 35
#: a block term is a multiple of 2^(e_a + e_b − 8): two bits for products of codes, three for each significand
_TERM_BITS = 8
#: an exponent below that of every term
_ABSENT = -139
#: float64 numbers in each operand tile and in the accumulator tile: 8 MiB each, about 40 MiB with temporaries
_TILE = 1 << 20
_TILE_ROWS = 512
#: outputs that the aligned path treats at once; it holds about eight arrays of four float64 numbers for each
_ALIGNED_TILE = 1 << 15


def matmul(a_packed: Tensor, a_scale: Tensor, b_packed: Tensor, b_scale: Tensor) -> Tensor:
    """``a @ b.T`` of two NVFP4 matrices without their global scales, bit for bit as Blackwell accumulates it.

    Output [i, j] depends on row i of a and row j of b alone. Memory beyond the result stays under 64 MiB.

    Args:
        a_packed: uint8 [M, K/2], two codes a byte, low nibble = even column; K a positive multiple of 16.
        a_scale: float8_e4m3fn [M, K/16].
        b_packed: uint8 [N, K/2].
        b_scale: float8_e4m3fn [N, K/16].

    Returns:
        float32 [M, N]; zeros are +0, NaNs are 0x7FFFFFFF.

    Raises:
        InvalidArgumentError: a wrong dtype, shape or device.
    """
    return _matmul(a_packed, a_scale, b_packed, b_scale)


def _matmul(a_packed: Tensor, a_scale: Tensor, b_packed: Tensor, b_scale: Tensor, *, aligned: bool = False) -> Tensor:
    """As :func:`matmul`; ``aligned`` forces the path with explicit truncation (for tests)."""
    _check("a", "M", a_packed, a_scale)
    _check("b", "N", b_packed, b_scale)
    if a_packed.shape[1] != b_packed.shape[1]:
        raise InvalidArgumentError(
            f"b_packed must have the K of a_packed, {2 * a_packed.shape[1]}, got {2 * b_packed.shape[1]}"
        )
    if len({t.device for t in (a_packed, a_scale, b_packed, b_scale)}) > 1:
        raise InvalidArgumentError("a_packed, a_scale, b_packed and b_scale must lie on one device")
    a_magnitude, b_magnitude = _magnitude(a_scale), _magnitude(b_scale)
    out = a_packed.new_empty((a_packed.shape[0], b_packed.shape[0]), dtype=torch.float32)
    span = max(1, _TILE // (2 * a_packed.shape[1]))
    for columns in _slices(out.shape[1], min(span, _TILE // _TILE_ROWS)):
        for rows in _slices(out.shape[0], min(span, _TILE_ROWS)):
            operands = (a_packed[rows], a_magnitude[rows], b_packed[columns], b_magnitude[columns])
            tile = _accumulate_aligned(*operands) if aligned else _accumulate(*operands)
            # zeros are +0: a sum is −0 only if all its terms are, and the accumulator starts at +0
            out[rows, columns] = tile
    is_nan = e4m3.is_nan(a_scale).any(dim=1)[:, None] | e4m3.is_nan(b_scale).any(dim=1)
    out.view(torch.int32).masked_fill_(is_nan, float64.NAN_BITS)
    return out


def _check(name: str, rows: str, packed: Tensor, scale: Tensor) -> None:
    if packed.dtype != torch.uint8 or packed.dim() != 2:
        raise InvalidArgumentError(
            f"{name}_packed must be uint8 [{rows}, K/2], got {packed.dtype} {list(packed.shape)}"
        )
    k = 2 * packed.shape[1]
    if k == 0 or k % BLOCK_SIZE:
        raise InvalidArgumentError(f"{name}_packed: K = {k} is not a positive multiple of {BLOCK_SIZE}")
    shape = (packed.shape[0], k // BLOCK_SIZE)
    if scale.dtype != torch.float8_e4m3fn or scale.shape != shape:
        raise InvalidArgumentError(
            f"{name}_scale must be float8_e4m3fn {list(shape)}, got {scale.dtype} {list(scale.shape)}"
        )


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _magnitude(scale: Tensor) -> Tensor:
    """The scales without their signs, and zero for NaN, so that arithmetic can go on."""
    bits = scale.view(torch.uint8) & 0x7F
    return bits.masked_fill(bits == e4m3.NAN, 0).view(torch.float8_e4m3fn)


def _exponent_range(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest exponent of each row's nonzero scales, int32 [rows]; (8, −6) if all are zero."""
    bits = scale.view(torch.uint8)  # in the order of the magnitudes
    smallest = bits.masked_fill(bits == 0, e4m3.NAN).amin(dim=1).view(torch.float8_e4m3fn)
    largest = bits.amax(dim=1).view(torch.float8_e4m3fn)
    return e4m3.split(smallest)[1], e4m3.split(largest)[1]


def _values(packed: Tensor, scale: Tensor) -> Tensor:
    """The products code × scale: float64 [rows, K]. At most 6 significant bits: exact in float32."""
    codes = e2m1.decode_packed(packed)
    values = codes.view(*scale.shape, BLOCK_SIZE) * scale.to(torch.float32).unsqueeze(-1)
    return values.view(codes.shape).to(torch.float64)


def _accumulate(a_packed: Tensor, a_scale: Tensor, b_packed: Tensor, b_scale: Tensor) -> Tensor:
    """The accumulators after all of K, float64 [rows, columns]; scales are magnitudes.

    Most steps truncate no term; such a step is an exact sum followed by one truncation, and a float64 matrix
    product computes it whatever its order of adding:

    - Let ``low`` be the smallest e_a of row i plus the smallest e_b of column j. Every product of two values
      is a multiple of 2^(low−8); so is every sum, and every accumulator, since truncation only clears low
      bits.
    - So if E ≤ low + 27, each term is a multiple of 2^(E−35), and truncating it changes nothing.
    - Then, in units of 2^(E−35), a product is below 36 · (15/8)² · 2^35 < 2^42 and the accumulator below
      2^36: any partial sum of the 64 and the accumulator is an integer below 2^49. Float64 holds them up to
      2^53: exact.
    - A nonzero sum is a normal float32, as it is a multiple of 2^−20 (low ≥ −12), and grows by less than
      2^29 a step. So clearing the low 29 bits of the float64 pattern truncates it to float32.

    Rows with an element where E ≤ low + 27 may not hold are computed again with their terms aligned. E
    breaks it only through the scales or through an accumulator that reaches 2^(low+28). All steps before the
    first such accumulator are right, and so is that accumulator: it is noticed.
    """
    a, b = _values(a_packed, a_scale), _values(b_packed, b_scale)
    a_low, a_high = _exponent_range(a_scale)
    b_low, b_high = _exponent_range(b_scale)
    slack = FRACTION_BITS - _TERM_BITS  # 27
    acc = a.new_zeros((a.shape[0], b.shape[0]))
    per_column = float64.power_of_two(-b_low)
    peak = a.new_zeros(a.shape[0])  # of |accumulator| × 2^−b_low
    for start in range(0, a.shape[1], CHUNK):
        if start:
            torch.maximum(peak, (acc * per_column).abs_().amax(dim=1), out=peak)
        chunk = slice(start, start + CHUNK)
        acc.addmm_(a[:, chunk], b[:, chunk].T)
        float64.truncate_normal_(acc)
    again = a_high - a_low + (b_high - b_low).amax() > slack
    again |= peak >= float64.power_of_two(a_low + slack + 1)
    rows = again.nonzero().flatten()
    if rows.numel():
        acc[rows] = _accumulate_aligned(a_packed[rows], a_scale[rows], b_packed, b_scale)
    return acc


class _Blocks(NamedTuple):
    """Rows of an operand, K first.

    Attributes:
        codes: float64 [K/16, rows, 16].
        significand: float64 [K/16, rows], m/8 of each scale.
        exponent: int64 [K/16, rows], of each scale.
    """

    codes: Tensor
    significand: Tensor
    exponent: Tensor


def _blocks(packed: Tensor, scale: Tensor) -> _Blocks:
    codes = e2m1.decode_packed(packed).to(torch.float64).view(*scale.shape, BLOCK_SIZE)
    significand, exponent = e4m3.split(scale)
    return _Blocks(codes.transpose(0, 1), significand.T.to(torch.float64) / 8, exponent.T.to(torch.int64))


def _accumulate_aligned(a_packed: Tensor, a_scale: Tensor, b_packed: Tensor, b_scale: Tensor) -> Tensor:
    """As :func:`_accumulate`, with every step written out: float64 [rows, columns]."""
    acc = torch.zeros((a_packed.shape[0], b_packed.shape[0]), dtype=torch.float64, device=a_packed.device)
    b = _blocks(b_packed, b_scale)
    for rows in _slices(acc.shape[0], max(1, _ALIGNED_TILE // acc.shape[1])):
        a = _blocks(a_packed[rows], a_scale[rows])
        for start in range(0, a.codes.shape[0], CHUNK // BLOCK_SIZE):
            blocks = slice(start, start + CHUNK // BLOCK_SIZE)
            acc[rows] = _step(acc[rows], _Blocks(*(t[blocks] for t in a)), _Blocks(*(t[blocks] for t in b)))
    return acc


def _step(acc: Tensor, a: _Blocks, b: _Blocks) -> Tensor:
    """One instruction: up to four blocks of both operands, added to ``acc`` [rows, columns]."""
    significand = a.significand[:, :, None] * b.significand[:, None, :]  # [4, rows, columns]
    dot = a.codes @ b.codes.transpose(1, 2)  # multiples of 1/4 up to 576: exact
    present = (a.codes.abs() @ b.codes.abs().transpose(1, 2) > 0) & (significand > 0)
    exponent = (a.exponent[:, :, None] + b.exponent[:, None, :]).masked_fill(~present, _ABSENT)
    largest = torch.maximum(exponent.amax(dim=0), float64.exponent(acc).clamp(min=_ABSENT))
    # powers of two scale exactly, and each of the five integers is below 2^46: their sum is exact
    terms = (dot * significand * float64.power_of_two(exponent - largest + FRACTION_BITS)).trunc()
    total = terms.sum(dim=0) + (acc * float64.power_of_two(FRACTION_BITS - largest)).trunc()
    return float64.truncate_normal_(total * float64.power_of_two(largest - FRACTION_BITS))
