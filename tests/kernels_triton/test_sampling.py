"""Sampling in Triton against the reference: every token."""

from __future__ import annotations

import random

import pytest
import torch

from anyfp4.errors import InvalidArgumentError
from anyfp4.kernels.triton import sampling
from anyfp4.kernels.triton.softmax import greedy
from anyfp4.ops import sampling as reference
from anyfp4.ops.sampling import Choice
from tests.kernels.cases import generator


def choices(count: int, seed: int) -> list[Choice]:
    rng = random.Random(seed)
    return [
        Choice(
            temperature=rng.choice([0.0, 0.3, 1.0, 1.0, 2.5, 1e-30, 1e30]),
            top_k=rng.choice([0, 0, 1, 7, 900, 5000]),
            top_p=rng.choice([1.0, 1.0, 0.1, 0.6, 0.95, 1 - 1e-12]),
            min_p=rng.choice([0.0, 0.0, 0.02, 1.0]),
            seed=rng.getrandbits(64),
            position=rng.randrange(1 << 20),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(("v", "rows"), [(1, 3), (50, 24), (4097, 16), (9000, 8)])
@pytest.mark.parametrize("spread", [0.2, 4.0])
def test_against_reference(device: torch.device, v: int, rows: int, spread: float) -> None:
    """Flat rows need more candidates than there are for a large top_p; steep ones do not."""
    x = torch.randn(rows, v, generator=generator(v)) * spread
    x[::5] = x[::5].round()  # many equals
    x[1, : v // 2] = -torch.inf
    wanted = choices(rows, v)
    expected = reference.sample(x, wanted)
    assert sampling.sample(x.to(device), wanted) == expected
    assert sampling.sample(x.to(device), wanted, greedy(x.to(device))) == expected
    for i in range(0, rows, 11):
        assert sampling.sample(x[i : i + 1].to(device), wanted[i : i + 1]) == expected[i : i + 1]


def test_choosing_ahead_of_reading(device: torch.device) -> None:
    """−1 where the kernels cannot tell, and ids of the vocabulary for the device in any case."""
    x = torch.randn(12, 5000, generator=generator(1)) * 0.2  # so flat that a large top_p needs more candidates
    wanted = [Choice(temperature=i % 3, top_k=(0, 5, 3000)[i // 4], top_p=1.0 if i % 2 else 0.99) for i in range(12)]
    expected = reference.sample(x, wanted)
    for best in (None, greedy(x.to(device))):
        chosen = sampling.choose(x.to(device), wanted, best)
        found = chosen.get()
        needs_host = [c.temperature > 0 and (c.top_k == 3000 or (c.top_k == 0 and c.top_p < 1)) for c in wanted]
        assert [token < 0 for token in found] == needs_host and 0 < sum(needs_host) < 12
        assert [t for t in found if t >= 0] == [t for t, host in zip(expected, needs_host, strict=True) if not host]
        assert chosen.tokens.dtype == torch.int64 and chosen.tokens.device.type == device.type
        for token, on_device in zip(found, chosen.tokens.tolist(), strict=True):
            assert on_device == token if token >= 0 else 0 <= on_device < 5000
    # the most likely tokens are not copied: a graph's result is read before the graph runs again
    best = greedy(x.to(device))
    assert sampling.choose(x.to(device), [Choice(0.0)] * 12, best).tokens is best[0]


def test_many_draws_of_one_row(device: torch.device) -> None:
    # the interpreter takes 50 ms a row
    count = 400 if device.type == "cuda" else 24
    x = (torch.randn(1, 300, generator=generator(3)) * 2).expand(count, 300).contiguous()
    for options in ({}, {"top_k": 40}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.8, "min_p": 0.05}):
        wanted = [Choice(seed=5, position=i, **options) for i in range(count)]
        assert sampling.sample(x.to(device), wanted) == reference.sample(x, wanted)


def test_broken_rows(device: torch.device) -> None:
    for value, name in ((torch.nan, "NaN"), (torch.inf, "inf")):
        x = torch.zeros(3, 100)
        x[1, 7] = value
        for temperature in (0.0, 1.0):
            with pytest.raises(InvalidArgumentError, match=rf"largest logit is {name} \(token 7\)"):
                sampling.sample(x.to(device), [Choice(temperature)] * 3)
            chosen = sampling.choose(x.to(device), [Choice(temperature)] * 3)
            assert all(0 <= token < 100 for token in chosen.tokens.tolist())
            with pytest.raises(InvalidArgumentError, match=rf"largest logit is {name} \(token 7\)"):
                chosen.get()
    with pytest.raises(InvalidArgumentError, match=r"float32 \[2, V\]"):
        sampling.sample(torch.zeros(3, 100, device=device), [Choice()] * 2)
    assert sampling.sample(torch.zeros(0, 100, device=device), []) == []


@pytest.mark.gpu
def test_a_large_vocabulary(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    x = torch.randn(64, 151936, generator=generator(8)) * 3
    wanted = choices(64, 1)
    assert sampling.sample(x.to(device), wanted) == reference.sample(x, wanted)
