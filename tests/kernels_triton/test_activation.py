"""silu(gate) × up in Triton against the readable reference: every bit."""

from __future__ import annotations

import pytest
import torch

from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.triton import activation
from anyfp4.ops import activation as reference
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels.cases import DTYPES, generator


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "scale"), [(1, 1, 1.0), (3, 96, 60.0), (2, 257, 60.0), (64, 30, 1.0)])
def test_against_reference(device: torch.device, rows: int, width: int, dtype: torch.dtype, scale: float) -> None:
    x = (torch.randn(rows, 2 * width, generator=generator(rows + width)) * scale).to(dtype)
    assert_same_bits(activation.silu_mul(x.to(device)).cpu(), reference.silu_mul(x))


def test_every_bfloat16(device: torch.device) -> None:
    gate = torch.arange(0x10000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[~gate.isnan()].unsqueeze(0)
    x = torch.cat((gate, torch.ones_like(gate)), dim=1)
    got, expected = activation.silu_mul(x.to(device)).cpu(), reference.silu_mul(x)
    # −∞ / (1 + e^∞) is a NaN, whose sign IEEE 754 leaves open
    assert torch.equal(got.isnan(), expected.isnan())
    assert_same_bits(got[~got.isnan()], expected[~expected.isnan()])


def test_extremes(device: torch.device) -> None:
    gate = torch.tensor([[-200.0, 200.0, 0.0, -0.0, 88.9, -88.9, -104.5, torch.inf, 1e-42]])
    x = torch.cat((gate, torch.full_like(gate, 3.0)), dim=1)
    assert_same_bits(activation.silu_mul(x.to(device)).cpu(), reference.silu_mul(x))
    x[0, 0] = torch.nan
    assert activation.silu_mul(x.to(device)).cpu()[0].isnan().tolist() == [True] + [False] * 8


def test_rows_do_not_depend_on_each_other(device: torch.device) -> None:
    """Across 64 rows, where programs get larger."""
    x = torch.randn(64, 66, generator=generator(1)).to(torch.bfloat16).to(device)
    whole = activation.silu_mul(x)
    for i in (0, 1, 31, 63):
        assert_same_bits(activation.silu_mul(x[i : i + 1]), whole[i : i + 1])


def test_shapes(device: torch.device) -> None:
    x = torch.randn(2, 3, 64, generator=generator(2))
    assert_same_bits(activation.silu_mul(x.to(device)).cpu(), reference.silu_mul(x))
    wide = torch.randn(4, 100, generator=generator(3))
    assert_same_bits(activation.silu_mul(wide.to(device)[:, 8:40]).cpu(), reference.silu_mul(wide[:, 8:40]))
    assert activation.silu_mul(torch.empty(0, 8, device=device)).shape == (0, 4)
    with pytest.raises(InvalidArgumentError, match="even"):
        activation.silu_mul(torch.zeros(2, 7, device=device))
    with pytest.raises(InvalidArgumentError, match="gate_up must be bfloat16"):
        activation.silu_mul(torch.zeros(2, 8, dtype=torch.int32, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    x = (torch.randn(256, 2 * 12288, generator=generator(4)) * 10).to(dtype)
    assert_same_bits(activation.silu_mul(x.to(device)).cpu(), reference.silu_mul(x))
