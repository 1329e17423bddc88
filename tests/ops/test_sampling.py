"""Sampling: known Philox answers, exact probabilities, filters, invariance."""

from __future__ import annotations

import math

import pytest
import torch

from anyfp4.errors import InvalidArgumentError
from anyfp4.ops import sampling
from anyfp4.ops.sampling import Choice
from anyfp4.testing.bitwise import assert_same_bits


def test_philox_known_answers() -> None:
    """The vectors that Random123 publishes for philox4x32-10."""
    full = 0xFFFFFFFF
    assert sampling.philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert sampling.philox4x32((full,) * 4, (full,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert sampling.philox4x32((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == (
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    )


def test_log_softmax_value_and_rows() -> None:
    x = torch.randn(40, 1003, generator=torch.Generator().manual_seed(0)) * 5
    got = sampling.log_softmax(x)
    expected = torch.log_softmax(x.double(), dim=-1)
    # shift, log of the sum (half a unit each of at most 2⁻¹⁹ here, as the values reach 2⁵), difference: below 2⁻¹⁷
    assert (got.double() - expected).abs().max() < 2.0**-17
    for i in range(40):
        assert_same_bits(sampling.log_softmax(x[i : i + 1]), got[i : i + 1])


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert sampling.sample(logits, [Choice(temperature=0.0)] * 2) == [1, 0]


def test_a_row_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(30, 500, generator=torch.Generator().manual_seed(1))
    choices = [
        Choice(temperature=0.5 + i / 10, top_k=i % 7 * 5, top_p=1 - i / 60, seed=i, position=3 * i) for i in range(30)
    ]
    together = sampling.sample(logits, choices)
    assert together == [sampling.sample(logits[i : i + 1], [choices[i]])[0] for i in range(30)]
    order = list(range(29, -1, -1))
    assert sampling.sample(logits[order], [choices[i] for i in order]) == [together[i] for i in order]


def test_frequencies() -> None:
    """10,000 draws: each count within five standard deviations of its binomial expectation."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log()[None].repeat(10_000, 1)
    drawn = sampling.sample(logits, [Choice(seed=7, position=i) for i in range(10_000)])
    for token, probability in enumerate(p.tolist()):
        deviation = math.sqrt(10_000 * probability * (1 - probability))
        assert abs(drawn.count(token) - 10_000 * probability) < 5 * deviation


@pytest.mark.parametrize(
    ("choice", "allowed"),
    [
        (Choice(top_k=2), {0, 1}),
        (Choice(top_p=0.75), {0, 1}),
        (Choice(top_p=0.49), {0}),
        (Choice(min_p=0.5), {0, 1}),
        (Choice(top_k=3, min_p=0.29), {0, 1, 2}),
        (Choice(top_k=1), {0}),
        (Choice(temperature=0.01), {0}),
        (Choice(), {0, 1, 2, 3}),
    ],
)
def test_filters(choice: Choice, allowed: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None]
    drawn = {
        sampling.sample(
            logits, [Choice(choice.temperature, choice.top_k, choice.top_p, choice.min_p, seed=3, position=i)]
        )[0]
        for i in range(400)
    }
    assert drawn == allowed


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, -1.0]])
    drawn = {sampling.sample(logits, [Choice(temperature=100.0, seed=i)])[0] for i in range(200)}
    assert drawn == {1, 3}


def test_streams_of_one_seed_differ() -> None:
    seeds = {sampling.fold_seed(5, i) for i in range(100)}
    assert len(seeds) == 100 and sampling.fold_seed(5, 0) == 5


def test_bad_arguments() -> None:
    with pytest.raises(InvalidArgumentError, match="float32"):
        sampling.sample(torch.zeros(1, 4).bfloat16(), [Choice()])
    with pytest.raises(InvalidArgumentError, match="NaN"):
        sampling.sample(torch.tensor([[0.0, float("nan")]]), [Choice()])
    with pytest.raises(InvalidArgumentError, match="float32"):
        sampling.log_softmax(torch.zeros(1, 4).bfloat16())
