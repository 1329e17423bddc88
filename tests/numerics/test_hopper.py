"""The bit model of Hopper against a scalar oracle: equal bits, tolerance zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.numerics import float64, hopper
from anyfp4.testing.bitwise import assert_same_bits, bits
from tests.numerics import oracles
from tests.numerics.hopper_cases import SIZE, Case, cases

DTYPES = [torch.float16, torch.bfloat16]
SMALLEST = {torch.float16: -14, torch.bfloat16: -126}


def oracle(acc: float, a: Tensor, b: Tensor) -> int:
    x, y = a.double().tolist(), b.double().tolist()
    for start in range(0, len(x), 16):
        acc = oracles.hopper(acc, x[start : start + 16], y[start : start + 16], SMALLEST[a.dtype])
    return oracles.float32_bits(acc)


def pattern(x: Tensor) -> int:
    return int(bits(x).item()) & 0xFFFFFFFF


def chain(acc: Tensor, a: Tensor, b: Tensor) -> Tensor:
    acc = acc.to(torch.float64)
    for start in range(0, a.shape[1], hopper.CHUNK):
        acc = hopper.accumulate(acc, a[:, start : start + hopper.CHUNK], b[:, start : start + hopper.CHUNK])
    out = acc.to(torch.float32)
    out.view(torch.int32).masked_fill_(out.isnan(), float64.NAN_BITS)
    return out


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def results(request: pytest.FixtureRequest) -> list[tuple[Case, Tensor]]:
    return [(case, chain(case.acc, case.a, case.b)) for case in cases(request.param)]


def test_every_case_equals_the_oracle(results: list[tuple[Case, Tensor]]) -> None:
    rng = np.random.default_rng(1)
    for case, out in results:
        for i, j in rng.integers(0, SIZE, (24, 2)).tolist():
            expected = oracle(case.acc[i, j].item(), case.a[i], case.b[j])
            assert pattern(out[i, j].reshape(1)) == expected, (case.name, i, j)


def test_cases_reach_every_kind_of_result(results: list[tuple[Case, Tensor]]) -> None:
    kinds = set()
    for case, out in results:
        kinds |= {"nan"} if out.isnan().any() else set()
        kinds |= {"inf"} if out.isinf().any() else set()
        kinds |= {"zero"} if (out == 0).any() else set()
        kinds |= {"subnormal"} if ((out != 0) & (out.abs() < 2.0**-126)).any() else set()
        finite = out.isfinite()
        exact = case.acc.double() + case.a.double() @ case.b.double().T
        kinds |= {"truncated"} if (out.double() != exact)[finite].any() else set()
    bfloat16 = results[0][0].a.dtype == torch.bfloat16
    assert kinds >= {"nan", "inf", "zero", "truncated"} | ({"subnormal"} if bfloat16 else set())


@given(
    dtype=st.sampled_from(DTYPES),
    acc=st.floats(width=32, allow_nan=False),
    pairs=st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 65535)), min_size=1, max_size=40),
)
@settings(max_examples=150, deadline=None)
def test_any_bits_equal_the_oracle(dtype: torch.dtype, acc: float, pairs: list[tuple[int, int]]) -> None:
    a, b = (torch.from_numpy(np.array(p, np.uint16).view(np.int16)).view(dtype) for p in zip(*pairs, strict=True))
    out = chain(torch.tensor([[acc]]), a[None], b[None])
    assert pattern(out) == oracle(acc, a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_starts_from_zero_and_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_TILE_ROWS", 8)
    monkeypatch.setattr(hopper, "_TILE_COLUMNS", 16)
    g = torch.Generator().manual_seed(2)
    a = torch.randn(hopper._TILE_ROWS + 5, 40, generator=g).to(dtype)
    b = torch.randn(hopper._TILE_COLUMNS + 3, 40, generator=g).to(dtype)
    out = hopper.matmul(a, b)
    assert_same_bits(out, chain(torch.zeros(a.shape[0], b.shape[0]), a, b))
    for i in (0, 1, hopper._TILE_ROWS, a.shape[0] - 1):
        assert_same_bits(hopper.matmul(a[i : i + 1], b), out[i : i + 1], f"row {i}")
    for j in (0, hopper._TILE_COLUMNS, b.shape[0] - 1):
        assert_same_bits(hopper.matmul(a, b[j : j + 1]), out[:, j : j + 1].contiguous(), f"column {j}")


def test_order_of_k_matters_only_between_chunks() -> None:
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(8, 64, generator=g).half(), torch.randn(8, 64, generator=g).half()
    out = hopper.matmul(a, b)
    within = torch.cat([torch.randperm(16, generator=g) + start for start in range(0, 64, 16)])
    assert_same_bits(hopper.matmul(a[:, within], b[:, within]), out)
    assert not torch.equal(hopper.matmul(a.flip(1), b.flip(1)), out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_integers_are_exact(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    a, b = (torch.randint(-8, 9, (20, 200), generator=g) for _ in range(2))
    assert_same_bits(hopper.matmul(a.to(dtype), b.to(dtype)), (a @ b.T).to(torch.float32) + 0.0)


def test_alignment_by_hand() -> None:
    """A product 26 binades below the largest loses its last bit; 25 below, it stays."""
    one = torch.tensor([[1.0, -1.0, 1.0]], dtype=torch.bfloat16)
    for shift, expected in ((-25, 2.0**-25), (-26, 0.0)):
        b = torch.tensor([[1.0, 1.0, 2.0**shift]], dtype=torch.bfloat16)
        assert hopper.matmul(one, b).item() == expected
    # the product 1.5 × 1.5 = 2.25 keeps the exponent 0, though 2.25 is above 2
    a = torch.tensor([[1.5, -1.5, 2.0**-25]], dtype=torch.bfloat16)
    b = torch.tensor([[1.5, 1.5, 1.0]], dtype=torch.bfloat16)
    assert hopper.matmul(a, b).item() == 2.0**-25


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype: torch.dtype) -> None:
    inf, nan = math.inf, math.nan
    for a, b, expected in (
        ([inf, 1.0], [2.0, 1.0], 0x7F800000),
        ([-inf, 1.0], [2.0, 1.0], 0xFF800000),
        ([inf, -inf], [1.0, 1.0], 0x7FFFFFFF),
        ([inf, 1.0], [0.0, 1.0], 0x7FFFFFFF),
        ([-nan, 1.0], [0.0, 1.0], 0x7FFFFFFF),
        ([-0.0, -0.0], [1.0, 1.0], 0),
        ([1.0, -1.0], [1.0, 1.0], 0),
    ):
        out = hopper.matmul(torch.tensor([a], dtype=dtype), torch.tensor([b], dtype=dtype))
        assert pattern(out) == expected, (a, b)


def test_empty_results() -> None:
    assert hopper.matmul(torch.zeros(0, 16).half(), torch.zeros(3, 16).half()).shape == (0, 3)
    assert hopper.matmul(torch.zeros(3, 16).half(), torch.zeros(0, 16).half()).shape == (3, 0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(2, 16), torch.zeros(2, 16), r"^a must be float16 or bfloat16"),
        (torch.zeros(16).half(), torch.zeros(2, 16).half(), r"^a must be .* got torch.float16 \[16\]"),
        (torch.zeros(2, 0).half(), torch.zeros(2, 0).half(), r"^a must be"),
        (torch.zeros(2, 16).half(), torch.zeros(2, 16).bfloat16(), r"^b must be torch.float16"),
        (torch.zeros(2, 16).half(), torch.zeros(2, 32).half(), r"^b must be torch.float16 \[N, 16\]"),
        (torch.zeros(2, 16).half(), torch.zeros(16).half(), r"^b must be"),
        (torch.zeros(2, 16).half(), torch.zeros(2, 16, device="meta").half(), r"^b must lie on the device of a"),
    ],
)
def test_wrong_arguments(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        hopper.matmul(a, b)
