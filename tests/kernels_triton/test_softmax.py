"""log-softmax and greedy choice in Triton against the readable reference: every bit."""

from __future__ import annotations

import pytest
import torch

from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.triton import softmax
from anyfp4.ops import sampling as reference
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels.cases import generator


@pytest.mark.parametrize(("rows", "v"), [(1, 1), (3, 100), (2, 4096), (2, 4097), (1, 20000)])
@pytest.mark.parametrize("scale", [0.1, 5.0, 80.0])
def test_against_reference(device: torch.device, rows: int, v: int, scale: float) -> None:
    """The definition rounds the exact sum; the float64 sum rounds alike for these seeds (see the module)."""
    x = torch.randn(rows, v, generator=generator(v)) * scale
    assert_same_bits(softmax.log_softmax(x.to(device)).cpu(), reference.log_softmax(x))


def test_rows_do_not_depend_on_each_other(device: torch.device) -> None:
    """Rows whose addresses are and are not multiples of 16."""
    x = torch.randn(9, 4099, generator=generator(1)).to(device)
    whole, (ids, best) = softmax.log_softmax(x), softmax.greedy(x)
    for i in range(9):
        assert_same_bits(softmax.log_softmax(x[i : i + 1]), whole[i : i + 1])
        one, one_best = softmax.greedy(x[i : i + 1])
        assert_same_bits(one, ids[i : i + 1])
        assert_same_bits(one_best, best[i : i + 1])


def test_special_rows(device: torch.device) -> None:
    x = torch.zeros(4, 5000)
    x[0, 7], x[1, 4999], x[2, :], x[3, ::2] = torch.nan, torch.inf, -torch.inf, -torch.inf
    got, expected = softmax.log_softmax(x.to(device)).cpu(), reference.log_softmax(x)
    assert torch.equal(got.isnan(), expected.isnan())
    assert_same_bits(got[3:], expected[3:])
    assert softmax.log_softmax(torch.empty(0, 5, device=device)).shape == (0, 5)
    three = torch.randn(2, 3, 50, generator=generator(2))
    assert_same_bits(softmax.log_softmax(three.to(device)).cpu(), reference.log_softmax(three))
    wide = torch.randn(3, 60, generator=generator(3))
    assert_same_bits(softmax.log_softmax(wide.to(device)[:, 5:45]).cpu(), reference.log_softmax(wide[:, 5:45]))


def test_greedy(device: torch.device) -> None:
    x = torch.randn(8, 9000, generator=generator(4))
    x[0, [8999, 3000, 5000]] = 50.0  # equals in two pieces: the lowest id
    x[1, 17] = torch.nan
    x[2] = -torch.inf
    x[3, 8000] = torch.inf
    x[4] = -3.0
    x[4, [100, 50]] = torch.tensor([-0.0, 0.0])
    x[5] = -3.0
    x[5, [100, 50]] = torch.tensor([0.0, -0.0])
    ids, best = softmax.greedy(x.to(device))
    assert ids.tolist() == x.numpy().argmax(axis=1).tolist()
    assert torch.equal(best.cpu().isnan(), torch.arange(8) == 1)
    assert best.cpu()[3].item() == torch.inf
    assert best.cpu()[2].item() == -torch.inf
    assert softmax.greedy(torch.empty(0, 5, device=device))[0].shape == (0,)


def test_bad_arguments(device: torch.device) -> None:
    with pytest.raises(InvalidArgumentError, match=r"logits must be torch\.float32"):
        softmax.log_softmax(torch.zeros(1, 3, dtype=torch.bfloat16, device=device))
    with pytest.raises(InvalidArgumentError, match="V at least 1"):
        softmax.log_softmax(torch.zeros(1, 0, device=device))
    with pytest.raises(InvalidArgumentError, match=r"must be \[M, V\]"):
        softmax.greedy(torch.zeros(4, device=device))


@pytest.mark.gpu
def test_large(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    x = torch.randn(64, 151936, generator=generator(5)) * 4
    got = softmax.log_softmax(x.to(device))
    assert_same_bits(got.cpu(), reference.log_softmax(x))
    for i in (0, 1, 63):
        assert_same_bits(softmax.log_softmax(x[i : i + 1].to(device)), got[i : i + 1])
    assert softmax.greedy(x.to(device))[0].tolist() == x.argmax(dim=1).tolist()
