"""Decode steps as CUDA graphs: padding, buffers and sizes. Without a GPU a graph is the step's function itself."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import numpy as np
import pytest
import torch

from anyfp4.engine import graphs, kv_cache
from anyfp4.engine.ahead import launch
from anyfp4.engine.config import EngineConfig, SamplingParams
from anyfp4.engine.engine import Engine
from anyfp4.engine.graphs import Results, StepGraphs
from anyfp4.engine.inputs import Feed
from anyfp4.engine.model_runner import ModelRunner
from anyfp4.engine.scheduler import Scheduled
from anyfp4.engine.sequence import Sequence
from anyfp4.errors import InvalidArgumentError
from anyfp4.layers.attention import LayerCache
from anyfp4.models.decoder import Decoder
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels_triton.test_layers import BLOCK_SIZE, decoder


class Eager:
    """In the place of a captured graph: runs the step, and copies its results to where the first run left them."""

    def __init__(self, step: Callable[[], Results]) -> None:
        self.step, self.results = step, step()

    def replay(self) -> None:
        for old, new in zip(flat(self.results), flat(self.step()), strict=True):
            old.copy_(new)


def flat(results: Results) -> tuple[torch.Tensor, ...]:
    assert results.best is not None
    return (results.hidden, results.logits, *results.best)


@pytest.fixture
def captured(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(self: StepGraphs, step: Callable[[], Results]) -> tuple[Eager, Results]:
        eager = Eager(step)
        return eager, eager.results

    if device.type != "cuda":
        monkeypatch.setattr(StepGraphs, "_capture", capture)


def sequence(tokens: list[int], blocks: SequenceOf[int]) -> Sequence:
    made = Sequence("0", 0, tokens, len(tokens), SamplingParams(), 0, 99)
    made.blocks = array("i", blocks)
    return made


def zeros(model: Decoder) -> list[LayerCache]:
    """Caches of nine blocks, whose whole contents can be compared."""
    caches = kv_cache.allocate(model, 9, BLOCK_SIZE)
    for cache in caches:
        cache.k.zero_()
        cache.v.zero_()
    return caches


def test_padded_steps_have_the_bits_of_eager_ones(device: torch.device, captured: None) -> None:
    model = decoder("w4a4", device)
    a, b, c = sequence([3, 1, 4, 1, 5, 9], [4, 1]), sequence([2], [6]), sequence([7, 1, 8], [3])
    steps = [
        [Scheduled(a, 0, 5), Scheduled(c, 0, 2)],  # prompts: 7 tokens padded to 8
        [Scheduled(a, 5, 1), Scheduled(b, 0, 1), Scheduled(c, 2, 1)],  # three padded to four
        [Scheduled(b, 0, 1)],
    ]
    outcomes = []
    for with_graphs in (False, True):
        caches = zeros(model)
        made = StepGraphs(model, caches, 4, 8, 3) if with_graphs else None
        runner = ModelRunner(model, caches, BLOCK_SIZE, made)
        found = []
        for step in steps:
            computed = runner.run(step)
            assert (computed.logits is not None) == with_graphs
            ends = list(itertools.accumulate(item.count for item in step))
            (tile,) = runner.logits(computed, [end - 1 for end in ends])
            found += [computed.hidden.clone(), tile.values.clone()]
            assert (tile.best is not None) == with_graphs
            if tile.best is not None:
                assert torch.equal(tile.best[0], tile.values.argmax(dim=1))
            # some of the last rows, and a row that is not the last of its sequence
            for rows in ([ends[-1] - 1], [0]):
                (some,) = runner.logits(computed, rows)
                found.append(some.values.clone())
        outcomes.append((*found, *(t.view(torch.int16) for cache in caches for t in (cache.k, cache.v))))
    for eager, graph in zip(*outcomes, strict=True):
        assert_same_bits(graph, eager)


def test_a_graph_is_fed_by_the_step_before(device: torch.device, captured: None) -> None:
    """Tokens that the host does not know come from the graph's own result, which its next run overwrites."""
    model = decoder("w4a4", device)
    a, b, c = sequence([3], [4]), sequence([2], [6]), sequence([7], [3])
    for i, s in enumerate((a, b, c)):  # so hot that every token may come: this model's logits are that large
        s.params, s.seed = SamplingParams(temperature=1e11 * (i < 2)), i
    steps: list[list[Scheduled]] = [
        [Scheduled(a, 0, 1), Scheduled(b, 0, 1), Scheduled(c, 0, 1)],  # three padded to four
        [Scheduled(a, 1, 1), Scheduled(b, 1, 1), Scheduled(c, 1, 1)],
        [Scheduled(c, 2, 1), Scheduled(a, 2, 1)],  # another order, and another graph
        [Scheduled(c, 3, 1), Scheduled(a, 3, 1)],  # tokens of the most likely alone would not be copied
    ]
    outcomes = []
    for ahead in (False, True):
        caches = zeros(model)
        runner = ModelRunner(model, caches, BLOCK_SIZE, StepGraphs(model, caches, 4, 8, 3) if ahead else None)
        flights = [launch(runner, steps[0])]
        for step in steps[1:]:
            if not ahead:  # the host knows the tokens
                for item, token in zip(flights[-1].step, flights[-1].chosen.get(), strict=True):
                    item.sequence.tokens.append(token)
            flights.append(launch(runner, step, flights[-1] if ahead else None))
        for s in (a, b, c):
            del s.tokens[1:]
        # read long after graphs ran again
        found = [flight.chosen.get() for flight in flights]
        outcomes.append((found, *(t.view(torch.int16) for cache in caches for t in (cache.k, cache.v))))
    (tokens, *expected), (got, *held) = outcomes
    assert len({token for step in tokens for token in step}) > 4
    assert got == tokens
    for mine, theirs in zip(held, expected, strict=True):
        assert_same_bits(mine, theirs)


def test_a_feed_is_taken_before_the_graph_overwrites_it(device: torch.device, captured: None) -> None:
    """The most likely tokens lie where the graph itself leaves them."""
    model = decoder("w4a4", device)
    a, b = sequence([3], [4]), sequence([2], [6])
    caches = kv_cache.allocate(model, 9, BLOCK_SIZE)
    runner = ModelRunner(model, caches, BLOCK_SIZE, StepGraphs(model, caches, 2, 8, 3))
    step = [Scheduled(a, 0, 1), Scheduled(b, 0, 1)]
    best = runner.run(step).best
    assert best is not None
    best[0].copy_(torch.tensor([41, 17]))  # this model would always choose the same
    fed = runner.run([Scheduled(b, 1, 1), Scheduled(a, 1, 1)], Feed(best[0], np.array([1, 0]))).hidden.clone()
    a.tokens.append(41)
    b.tokens.append(17)
    known = runner.run([Scheduled(b, 1, 1), Scheduled(a, 1, 1)]).hidden.clone()
    assert_same_bits(fed, known)
    a.tokens[1] = 40
    other = runner.run([Scheduled(b, 1, 1), Scheduled(a, 1, 1)]).hidden
    assert_same_bits(other[0], known[0])
    assert not torch.equal(other[1], known[1])  # tokens show at all


def test_an_engine_with_graphs_and_async_scheduling(
    device: torch.device, captured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default it has both; and neither changes anything. The second request ends before the first."""
    monkeypatch.setattr("anyfp4.engine.engine.why_no_graphs", lambda model: None)
    model = decoder("dense", device)
    outcomes = []
    for options in ({"cuda_graphs": False, "async_scheduling": False}, {}):
        config = EngineConfig(kv_cache_bytes=1 << 16, max_num_seqs=2, max_step_tokens=4, **options)
        engine = Engine(model, config)
        assert (engine.graphs is not None) == engine.async_scheduling == (not options)
        sequences = [
            engine.add(str(i), [3 + i], SamplingParams(temperature=t, seed=i, max_tokens=most, ignore_eos=True))[0]
            for i, (t, most) in enumerate([(0.0, 6), (1e11, 4)])
        ]
        while engine.has_work:
            engine.step()
        outcomes.append([s.tokens for s in sequences])
        assert engine.stats().steps_ahead == (0 if options else 5)
    assert outcomes[0] == outcomes[1] and len({*outcomes[0][1]}) > 2


def test_shapes() -> None:
    for tokens, sequences in ((1, 1), (5, 64), (8, 8), (2048, 64), (2048, 1000), (100, 3), (64, 15), (2048, 7)):
        shapes = graphs.mixed_shapes(tokens, sequences)
        assert shapes == sorted(set(shapes)) and shapes[-1].tokens == min(tokens, 512)
        assert all(shape.tokens != shape.sequences for shape in shapes)
        # whatever mixed step of so many tokens there can be, it fits one, with a sequence to spare for the padding
        for count in range(2, min(tokens, 512) + 1):
            most = min(sequences, count - 1)
            assert any(shape.tokens >= count and shape.sequences > most for shape in shapes), (count, shapes)
    for most in (1, 3, 8, 64, 100, 256, 512, 1000):
        shapes = graphs.decode_shapes(most)
        assert all(shape.tokens == shape.sequences for shape in shapes)
        found = [shape.tokens for shape in shapes]
        assert found == sorted(set(found)) and found[0] == 1 and found[-1] == min(most, 512)
        # a step is padded by a third at most, and by little where that costs
        assert all(b - a <= max(8, a // 4) for a, b in itertools.pairwise(found))


def test_asked_for_where_there_are_none(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("a GPU has them")
    with pytest.raises(InvalidArgumentError, match="cuda_graphs = True: a cpu has no CUDA graphs"):
        Engine(decoder("dense", device), EngineConfig(cuda_graphs=True, kv_cache_bytes=1 << 20))
