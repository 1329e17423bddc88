"""Sampling: known Philox answers, exact probabilities, filters, invariance."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from anyfp4.errors import InvalidArgumentError
from anyfp4.ops import elementary, philox, sampling
from anyfp4.ops.sampling import Choice
from anyfp4.testing.bitwise import assert_same_bits


def test_philox_known_answers() -> None:
    """The vectors that Random123 publishes for philox4x32-10."""
    full = 0xFFFFFFFF
    assert philox.philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox.philox4x32((full,) * 4, (full,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox.philox4x32((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == (
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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Waking torch's threads for every small vector takes most of the time on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_definition(logits: torch.Tensor, choice: Choice) -> int:
    """The definition, word for word: all weights as integers, sorted as a whole where a filter needs an order."""
    temperature = torch.tensor(choice.temperature, dtype=torch.float64).clamp(max=torch.finfo(torch.float32).max)
    if temperature.float() == 0:
        return int(logits.argmax())
    weight = torch.round(elementary.exp((logits - logits.max()) / temperature.float()).double() * 2**40).long()
    ids = torch.arange(len(weight))
    if choice.top_k or choice.top_p < 1:
        order = torch.sort(weight, descending=True, stable=True)
        ids, weight = order.indices, order.values
        if choice.top_k:
            ids, weight = ids[: choice.top_k], weight[: choice.top_k]
        if choice.top_p < 1:
            before = weight.cumsum(0) - weight
            keep = before < int(choice.top_p * int(weight.sum()))
            keep[0] = True
            ids, weight = ids[keep], weight[keep]
    if choice.min_p:
        weight = torch.where(weight >= int(choice.min_p * 2**40), weight, 0)
    cumulative = weight.cumsum(0)
    target = (philox.uniform64(choice.seed, choice.position) * int(cumulative[-1])) >> 64
    return int(ids[int((cumulative > target).nonzero()[0])])


def rows(vocab: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    normal = torch.randn(vocab, generator=generator)
    masked = torch.where(torch.rand(vocab, generator=generator) < 0.5, normal, -torch.inf)
    masked[vocab // 2] = 1.0
    return {
        "narrow": normal,
        "wide": normal * 8,
        "peaked": normal * 3 + 12 * (torch.rand(vocab, generator=generator) < 20 / vocab),
        "ties": (normal * 2).round(),
        "equal": torch.zeros(vocab),
        "masked": masked,
        "huge": normal * 1e37,
    }


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 129, 1000, 8193, 50_000])
def test_short_cuts_give_what_the_definition_gives(vocab: int) -> None:
    rng = random.Random(vocab)
    generator = torch.Generator().manual_seed(vocab)
    for name, row in rows(vocab, generator).items():
        for trial in range(60 if vocab < 8193 else 15):
            choice = Choice(
                temperature=rng.choice([1.0, 1.0, 0.6, 1.9, 0.01, 40.0, 1e-50, 1e39]),
                top_k=rng.choice([0, 0, 1, 3, 40, 700, vocab, vocab + 1]),
                top_p=rng.choice([1.0, 1.0, 0.9, 0.3, 1e-9, 0.99999, 1 - 1e-12]),
                min_p=rng.choice([0.0, 0.0, 0.02, 1.0]),
                seed=rng.getrandbits(64),
                position=trial,
            )
            assert sampling.sample_row(row.numpy(), choice) == by_definition(row, choice), (name, choice)


def test_places_at_the_very_edge_of_a_token() -> None:
    """The estimate must not decide what is closer than its error: random numbers around the ends of tokens."""
    row = torch.randn(3000, generator=torch.Generator().manual_seed(5)) * 3
    weight = torch.round(elementary.exp(row - row.max()).double() * 2**40).long()
    ends, total = weight.cumsum(0).tolist(), int(weight.sum())
    scaled = sampling._Scaled(row.numpy(), float(row.max()), 1.0)
    rng = random.Random(0)
    for _ in range(400):
        token = rng.randrange(3000)
        # the smallest random number whose target is past the token's end, and its neighbours
        edge = -(-(ends[token] << 64) // total)
        for number in (edge - 1, edge, edge + rng.randrange(1 << 40), edge - rng.randrange(1 << 40)):
            if 0 <= number < 1 << 64:
                target = (number * total) >> 64
                assert sampling._draw_any(scaled, number) == int((weight.cumsum(0) > target).nonzero()[0])


def test_the_estimate_is_as_good_as_it_claims() -> None:
    """Numpy's float32 exp, relative to the exact value: counted as 2⁻²⁰ where the result is a normal number."""
    x = np.linspace(-87, 0, 2_000_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(np.exp(x).astype(np.float64) / exact - 1).max() < 2.0**-20
    assert np.exp(np.float32(-120)) < 2.0**-126


def test_exp_on_numpy_has_the_bits_of_the_one_on_torch() -> None:
    x = torch.cat([torch.linspace(-120, 0, 100_001), torch.tensor([-torch.inf, -0.0, 0.0, -1e-30])])
    assert_same_bits(torch.from_numpy(sampling._exp(x.numpy())), elementary.exp(x))


def test_largest() -> None:
    generator = torch.Generator().manual_seed(2)
    for vocab in (1, 3, 100, 5000):
        for row in rows(vocab, generator).values():
            for count in {1, min(5, vocab), min(90, vocab), vocab}:
                order = torch.sort(row, descending=True, stable=True).indices[:count]
                assert sampling.largest(row.numpy(), count).tolist() == order.tolist()


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, -1.0]])
    drawn = {sampling.sample(logits, [Choice(temperature=100.0, seed=i)])[0] for i in range(200)}
    assert drawn == {1, 3}


def test_streams_of_one_seed_differ() -> None:
    seeds = {philox.fold_seed(5, i) for i in range(100)}
    assert len(seeds) == 100 and philox.fold_seed(5, 0) == 5


def test_bad_arguments() -> None:
    with pytest.raises(InvalidArgumentError, match="float32"):
        sampling.sample(torch.zeros(1, 4).bfloat16(), [Choice()])
    with pytest.raises(InvalidArgumentError, match="NaN"):
        sampling.sample(torch.tensor([[0.0, float("nan")]]), [Choice()])
    for temperature in (0.0, 1.0):
        with pytest.raises(InvalidArgumentError, match=r"largest logit is inf \(token 1\)"):
            sampling.sample(torch.tensor([[0.0, torch.inf]]), [Choice(temperature)])
        with pytest.raises(InvalidArgumentError, match="largest logit is -inf"):
            sampling.sample(torch.full((1, 4), -torch.inf), [Choice(temperature)])
    with pytest.raises(InvalidArgumentError, match="float32"):
        sampling.log_softmax(torch.zeros(1, 4).bfloat16())
