"""The bit model of Blackwell against a scalar oracle: equal bits, tolerance zero."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.formats import e2m1
from anyfp4.formats.nvfp4 import dequantize_blocks
from anyfp4.numerics import blackwell
from anyfp4.testing.bitwise import assert_same_bits, bits
from tests.numerics import oracles

Operand = tuple[Tensor, Tensor]


def operand(codes: Tensor, scale_bytes: Tensor) -> Operand:
    return e2m1.pack(codes.to(torch.uint8)), scale_bytes.to(torch.uint8).view(torch.float8_e4m3fn)


def lists(x: Operand) -> tuple[list[list[int]], list[list[int]]]:
    return e2m1.unpack(x[0]).tolist(), x[1].view(torch.uint8).tolist()


def oracle(a: Operand, b: Operand, align: bool = True) -> Tensor:
    (a_codes, a_scales), (b_codes, b_scales) = lists(a), lists(b)
    rows = [
        [oracles.blackwell(ac, sa, bc, sb, align) for bc, sb in zip(b_codes, b_scales, strict=True)]
        for ac, sa in zip(a_codes, a_scales, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32).view(torch.float32)


def random_operand(g: torch.Generator, rows: int, k: int, low: int, high: int) -> Operand:
    """Random codes and scale bytes low…high (the order of bytes is the order of magnitudes)."""
    codes = torch.randint(0, 16, (rows, k), generator=g)
    return operand(codes, torch.randint(low, high + 1, (rows, k // 16), generator=g))


def sprinkle(x: Tensor, value: int, share: float, g: torch.Generator) -> Tensor:
    raw = x.view(torch.uint8)
    return torch.where(torch.rand(x.shape, generator=g) < share, value, raw).to(torch.uint8).view(x.dtype)


#: name -> scale bytes of a and of b: 0x38 is 1, 0x00…0x07 are subnormal, 0x7E is 448
SCALES = {
    "like a model's": ((0x20, 0x7E), (0x48, 0x7E)),
    "any": ((0x00, 0x7E), (0x00, 0x7E)),
    "subnormal": ((0x01, 0x07), (0x01, 0x07)),
    "subnormal and zero": ((0x00, 0x07), (0x00, 0x09)),
    "largest": ((0x78, 0x7E), (0x78, 0x7E)),
    "negative too": ((0x00, 0x7E), (0x80, 0xFE)),
}


def cases(k: int, rows: int, seed: int = 0) -> Iterator[tuple[str, Operand, Operand]]:
    """Yields named pairs of operands of ``rows`` rows each."""
    g = torch.Generator().manual_seed(seed)
    for name, (a, b) in SCALES.items():
        yield name, random_operand(g, rows, k, *a), random_operand(g, rows, k, *b)
    a, b = random_operand(g, rows, k, 0, 0x7E), random_operand(g, rows, k, 0, 0x7E)
    blocks = (torch.rand(rows, k // 16, generator=g) < 0.4).repeat_interleave(8, dim=1)
    yield "blocks of zeros", (a[0].masked_fill(blocks, 0x80), a[1]), (sprinkle(b[0], 0x08, 0.6, g), b[1])
    yield "zero scales", (a[0], sprinkle(a[1], 0x00, 0.4, g)), (b[0], sprinkle(b[1], 0x80, 0.4, g))
    share = 0.7 / (k // 16 * rows)
    yield "NaN scales", (a[0], sprinkle(a[1], 0x7F, share, g)), (b[0], sprinkle(b[1], 0xFF, share, g))
    yield "mostly zero codes", (sprinkle(a[0], 0x80, 0.9, g), a[1]), (sprinkle(b[0], 0x08, 0.8, g), b[1])
    half = random_operand(g, rows, k, 0x60, 0x7E), random_operand(g, rows, k, 0x60, 0x7E)
    small = random_operand(g, rows, 16, 0, 7), random_operand(g, rows, 16, 0, 7)
    yield "cancellation", _cancelling(half[0], small[0], negate=True), _cancelling(half[1], small[1], negate=False)
    yield "small after large", *(_join(h, s, h, s) for h, s in zip(half, small, strict=True))


def _join(*parts: Operand) -> Operand:
    scales = [s.view(torch.uint8) for _, s in parts]
    return torch.cat([p for p, _ in parts], 1), torch.cat(scales, 1).view(torch.float8_e4m3fn)


def _cancelling(x: Operand, small: Operand, *, negate: bool) -> Operand:
    """x, then a little, then x again (all signs turned): the accumulator grows and shrinks back."""
    again = (x[0] ^ 0x88, x[1]) if negate else x
    return _join(small, x, small, again, small)


@pytest.mark.parametrize("k", [16, 48, 64, 576, 2048])
def test_every_case_equals_the_oracle(k: int) -> None:
    rows = 10 if k <= 64 else 4 if k == 576 else 2
    for name, a, b in cases(k, rows):
        expected = oracle(a, b)
        assert_same_bits(blackwell.matmul(*a, *b), expected, f"{name}, K = {k}")
        assert_same_bits(blackwell._matmul(*a, *b, aligned=True), expected, f"{name}, K = {k}, aligned")


@given(
    blocks=st.lists(
        st.tuples(
            st.lists(st.integers(0, 15), min_size=16, max_size=16),
            st.lists(st.integers(0, 15), min_size=16, max_size=16),
            st.integers(0, 255),
            st.integers(0, 255),
        ),
        min_size=1,
        max_size=9,
    )
)
@settings(max_examples=100, deadline=None)
def test_any_bytes_equal_the_oracle(blocks: list[tuple[list[int], list[int], int, int]]) -> None:
    a_codes, b_codes, a_scales, b_scales = (torch.tensor(x) for x in zip(*blocks, strict=True))
    a, b = operand(a_codes.view(1, -1), a_scales[None]), operand(b_codes.view(1, -1), b_scales[None])
    expected = oracle(a, b)
    assert_same_bits(blackwell.matmul(*a, *b), expected)
    assert_same_bits(blackwell._matmul(*a, *b, aligned=True), expected)


def test_the_cases_need_the_alignment() -> None:
    """Without truncation of the terms the oracle gives other bits, so the tests above would notice."""
    differing = set()
    for name, a, b in cases(192, 5):
        if (bits(oracle(a, b)) != bits(oracle(a, b, align=False))).any():
            differing.add(name)
    assert differing >= {"cancellation", "small after large"}


@pytest.mark.parametrize("k", [64, 576, 1536])
def test_both_paths_give_the_same_bits(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    aligned_rows = 0
    aligned = blackwell._accumulate_aligned

    def spy(a_packed: Tensor, a_scale: Tensor, b_packed: Tensor, b_scale: Tensor) -> Tensor:
        nonlocal aligned_rows
        aligned_rows += a_packed.shape[0]
        return aligned(a_packed, a_scale, b_packed, b_scale)

    counts = {}
    for name, a, b in cases(k, 20, seed=k):
        expected = blackwell._matmul(*a, *b, aligned=True)
        aligned_rows = 0
        with monkeypatch.context() as patch:
            patch.setattr(blackwell, "_accumulate_aligned", spy)
            assert_same_bits(blackwell.matmul(*a, *b), expected, f"{name}, K = {k}")
        counts[name] = aligned_rows
    # neither path is idle: what a model computes is fast throughout, and what can truncate a term is not
    assert counts["like a model's"] == counts["subnormal"] == counts["largest"] == 0
    assert counts["small after large"] > 0
    assert k == 64 or counts["any"] > 0


def _wholes(g: torch.Generator, rows: int, k: int) -> tuple[Operand, Tensor]:
    """An operand with scales 1…128 and 16 times its values, which are whole numbers: int64."""
    x = random_operand(g, rows, k, 0x38, 0x70)
    return x, (dequantize_blocks(*x).to(torch.float64) * 16).to(torch.int64)


@pytest.mark.parametrize("k", [16, 32, 64])
def test_one_step_is_the_exact_sum_truncated(k: int) -> None:
    """With exponents 0…14 no term is truncated: one step is an integer sum and one truncation."""
    g = torch.Generator().manual_seed(k)
    (a, a_values), (b, b_values) = _wholes(g, 30, k), _wholes(g, 40, k)
    exact = a_values @ b_values.T  # 2^8 times the sum
    magnitude = exact.abs()
    drop = torch.tensor([max(0, int(m).bit_length() - 24) for m in magnitude.flatten()]).view(magnitude.shape)
    truncated = (magnitude >> drop << drop) * exact.sign()
    assert_same_bits(blackwell.matmul(*a, *b), (truncated.double() / 256).to(torch.float32))
    assert bool((drop > 0).any())


def _two_blocks(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> float:
    """One output from two blocks; each gives the codes of its first pair of elements and its two scale bytes.

    The second element of a pair has the same codes with b's sign turned if the fourth entry of a block is negative.
    """
    a_codes, b_codes = torch.zeros(1, 32, dtype=torch.int64), torch.zeros(1, 32, dtype=torch.int64)
    scales = []
    for i, (a, b, scale, cancel) in enumerate((first, second)):
        a_codes[0, 16 * i], b_codes[0, 16 * i] = a, b
        if cancel:
            a_codes[0, 16 * i + 1], b_codes[0, 16 * i + 1] = a, b ^ 8
        scales.append(scale)
    scale_bytes = torch.tensor([scales])
    return float(blackwell.matmul(*operand(a_codes, scale_bytes), *operand(b_codes, scale_bytes)))


def test_absent_terms_have_no_exponent_by_hand() -> None:
    """0.5 × 0.5 with scales 2^−9 is 2^−20, below the 2^−19 to which a block with scales 256 truncates."""
    tiny = (1, 1, 0x01, 0)
    assert _two_blocks(tiny, (0, 7, 0x78, 0)) == 2.0**-20  # all products zero: no exponent
    assert _two_blocks(tiny, (8, 15, 0x78, 0)) == 2.0**-20
    assert _two_blocks(tiny, (7, 7, 0x00, 0)) == 2.0**-20  # scales zero: no exponent
    assert _two_blocks(tiny, (7, 7, 0x78, 1)) == 0.0  # products cancel: E = 16 all the same
    assert _two_blocks((1, 1, 0x01, 0), (7, 7, 0x70, 1)) == 2.0**-20  # E = 14: a multiple of 2^−21 stays


def test_zero_is_positive() -> None:
    minus = operand(torch.full((1, 64), 8), torch.full((1, 4), 0x38))
    plus = operand(torch.full((1, 64), 7), torch.full((1, 4), 0x38))
    tiny = operand(torch.full((1, 64), 9), torch.tensor([[0x01, 0, 0, 0]]))
    for a, b in ((minus, plus), (minus, minus), (tiny, operand(torch.zeros(1, 64), torch.full((1, 4), 0x78)))):
        for aligned in (False, True):
            assert int(bits(blackwell._matmul(*a, *b, aligned=aligned)).item()) == 0
    # −2^−20 truncated toward zero beside a cancelling block with E = 16
    a = operand(torch.tensor([[9] + [0] * 15 + [7, 7] + [0] * 14]), torch.tensor([[0x01, 0x78]]))
    b = operand(torch.tensor([[1] + [0] * 15 + [7, 15] + [0] * 14]), torch.tensor([[0x01, 0x78]]))
    assert int(bits(blackwell.matmul(*a, *b)).item()) == 0


def test_a_nan_scale_shows_in_its_row_and_column_alone() -> None:
    g = torch.Generator().manual_seed(5)
    a, b = random_operand(g, 6, 128, 0, 0x7E), random_operand(g, 7, 128, 0, 0x7E)
    clean = blackwell.matmul(*a, *b)
    a[0][2], b[0][4] = 0, 0  # even where the codes are zero
    a[1].view(torch.uint8)[2, 0] = 0x7F
    b[1].view(torch.uint8)[4, 7] = 0xFF
    out = blackwell.matmul(*a, *b)
    hit = torch.zeros(6, 7, dtype=torch.bool)
    hit[2], hit[:, 4] = True, True
    assert bool((bits(out)[hit] == 0x7FFFFFFF).all())
    assert_same_bits(out[~hit], clean[~hit])


@pytest.mark.parametrize("tile", [None, 8192])
def test_an_output_depends_on_its_row_and_column_alone(tile: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(6)
    for low in (0x00, 0x40):
        a, b = random_operand(g, 33, 576, low, 0x7E), random_operand(g, 50, 576, low, 0x7E)
        whole = blackwell.matmul(*a, *b)
        if tile:  # 14 columns and 14 rows at a time, 4 rows on the aligned path
            monkeypatch.setattr(blackwell, "_TILE", tile)
            monkeypatch.setattr(blackwell, "_TILE_ROWS", 100)
            monkeypatch.setattr(blackwell, "_ALIGNED_TILE", 64)
            assert_same_bits(blackwell.matmul(*a, *b), whole, "smaller tiles")
        for i in (0, 1, 2, 15, 32):
            assert_same_bits(blackwell.matmul(a[0][i : i + 1], a[1][i : i + 1], *b), whole[i : i + 1], f"row {i}")
        for j in (0, 14, 49):
            column = blackwell.matmul(*a, b[0][j : j + 1], b[1][j : j + 1])
            assert_same_bits(column, whole[:, j : j + 1].contiguous(), f"column {j}")
        backwards = blackwell.matmul(a[0].flip(0), a[1].view(torch.uint8).flip(0).view(torch.float8_e4m3fn), *b)
        assert_same_bits(backwards.flip(0), whole, "rows in reverse")


def test_zero_padding_of_k_changes_nothing() -> None:
    g = torch.Generator().manual_seed(7)
    a, b = random_operand(g, 9, 80, 0, 0x7E), random_operand(g, 9, 80, 0, 0x7E)
    zeros = operand(torch.zeros(9, 48), torch.zeros(9, 3))
    assert_same_bits(blackwell.matmul(*_join(a, zeros), *_join(b, zeros)), blackwell.matmul(*a, *b))


def test_the_order_of_chunks_matters() -> None:
    g = torch.Generator().manual_seed(8)
    a, b = random_operand(g, 20, 512, 0x20, 0x7E), random_operand(g, 20, 512, 0x20, 0x7E)
    out = blackwell.matmul(*a, *b)
    halves = [(x[0].chunk(2, 1), x[1].view(torch.uint8).chunk(2, 1)) for x in (a, b)]
    swapped = [(torch.cat((p[1], p[0]), 1), torch.cat((s[1], s[0]), 1).view(torch.float8_e4m3fn)) for p, s in halves]
    assert not torch.equal(blackwell.matmul(*swapped[0], *swapped[1]), out)


def test_empty_results() -> None:
    g = torch.Generator().manual_seed(9)
    a = random_operand(g, 3, 32, 0, 0x7E)
    none = (a[0][:0], a[1][:0])
    assert blackwell.matmul(*none, *a).shape == (0, 3)
    assert blackwell.matmul(*a, *none).shape == (3, 0)


U8, F8 = torch.uint8, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        (((2, 8), (2, 1), (3, 8), (3, 1)), (torch.int8, F8, U8, F8), r"^a_packed must be uint8 \[M, K/2\]"),
        (((2, 8), (2, 1), (3, 8), (3, 1)), (U8, F8, torch.float32, F8), r"^b_packed must be uint8 \[N, K/2\]"),
        (((2, 8), (2, 1), (3, 8), (3, 1)), (U8, U8, U8, F8), r"^a_scale must be float8_e4m3fn \[2, 1\]"),
        (((2, 8), (2, 1), (3, 8), (3, 1)), (U8, F8, U8, torch.float32), r"^b_scale must be float8_e4m3fn \[3, 1\]"),
        (((8,), (1,), (3, 8), (3, 1)), (U8, F8, U8, F8), r"^a_packed must be"),
        (((2, 8), (2, 1), (1, 3, 8), (3, 1)), (U8, F8, U8, F8), r"^b_packed must be"),
        (((2, 12), (2, 1), (3, 12), (3, 1)), (U8, F8, U8, F8), r"^a_packed: K = 24 is not a positive multiple of 16"),
        (((2, 0), (2, 0), (3, 0), (3, 0)), (U8, F8, U8, F8), r"^a_packed: K = 0"),
        (((2, 8), (2, 2), (3, 8), (3, 1)), (U8, F8, U8, F8), r"^a_scale must be .* \[2, 1\], got .* \[2, 2\]"),
        (((2, 8), (2, 1), (3, 8), (2, 1)), (U8, F8, U8, F8), r"^b_scale must be .* \[3, 1\], got .* \[2, 1\]"),
        (((2, 8), (2, 1), (3, 16), (3, 2)), (U8, F8, U8, F8), r"^b_packed must have the K of a_packed, 16, got 32"),
    ],
)
def test_wrong_arguments(shapes: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, ...], message: str) -> None:
    tensors = [torch.zeros(s).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    with pytest.raises(InvalidArgumentError, match=message):
        blackwell.matmul(*tensors)


def test_two_devices() -> None:
    a = operand(torch.zeros(2, 16), torch.zeros(2, 1))
    with pytest.raises(InvalidArgumentError, match="one device"):
        blackwell.matmul(*a, a[0].to("meta"), a[1].to("meta"))
