"""Decode steps as CUDA graphs: padding, buffers and sizes. Without a GPU a graph is the step's function itself."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence as SequenceOf

import pytest
import torch

from anyfp4.engine import graphs, kv_cache
from anyfp4.engine.config import EngineConfig, SamplingParams
from anyfp4.engine.engine import Engine
from anyfp4.engine.graphs import DecodeGraphs
from anyfp4.engine.model_runner import ModelRunner
from anyfp4.engine.scheduler import Scheduled
from anyfp4.engine.sequence import Sequence
from anyfp4.errors import InvalidArgumentError
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels_triton.test_layers import BLOCK_SIZE, decoder


class Eager:
    """In the place of a captured graph: runs the step, and copies its results to where the first run left them."""

    def __init__(self, owner: DecodeGraphs, size: int) -> None:
        self.step = owner._step(size)
        hidden, logits, best = self.step()
        assert best is not None
        self.results = (hidden, logits, best)

    def replay(self) -> None:
        hidden, logits, best = self.step()
        assert best is not None
        for old, new in zip((*self.results[:2], *self.results[2]), (hidden, logits, *best), strict=True):
            old.copy_(new)


@pytest.fixture
def captured(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(self: DecodeGraphs, size: int) -> graphs._Graph:
        eager = Eager(self, size)
        return graphs._Graph(eager, *eager.results)

    if device.type != "cuda":
        monkeypatch.setattr(DecodeGraphs, "_capture", capture)


def sequence(tokens: list[int], blocks: SequenceOf[int]) -> Sequence:
    made = Sequence("0", 0, tokens, len(tokens), SamplingParams(), 0, 99)
    made.blocks = array("i", blocks)
    return made


def test_padded_steps_have_the_bits_of_eager_ones(device: torch.device, captured: None) -> None:
    model = decoder("w4a4", device)
    sequences = [sequence([3, 1, 4, 1, 5, 9], [4, 1]), sequence([2], [6]), sequence([7, 1, 8], [3]), sequence([1], [7])]
    outcomes = []
    for with_graphs in (False, True):
        caches = kv_cache.allocate(model, 9, BLOCK_SIZE)
        for cache in caches:
            cache.k.zero_()
            cache.v.zero_()
        made = DecodeGraphs(model, caches, BLOCK_SIZE, 4, 3) if with_graphs else None
        runner = ModelRunner(model, caches, BLOCK_SIZE, made)
        runner.run([Scheduled(s, 0, len(s.tokens) - 1) for s in sequences if len(s.tokens) > 1])
        found = []
        for group in (sequences[:3], sequences[3:], sequences[:1]):
            computed = runner.run([Scheduled(s, len(s.tokens) - 1, 1) for s in group])
            assert (computed.logits is not None) == with_graphs
            (tile,) = runner.logits(computed, range(len(group)))
            found += [computed.hidden.clone(), tile.values.clone()]
            if tile.best is not None:
                assert torch.equal(tile.best[0], tile.values.argmax(dim=1))
            (some,) = runner.logits(computed, [0])
            assert_same_bits(some.values, tile.values[:1])
        outcomes.append((*found, *(t.view(torch.int16) for cache in caches for t in (cache.k, cache.v))))
    for eager, graph in zip(*outcomes, strict=True):
        assert_same_bits(graph, eager)


def test_sizes() -> None:
    for most in (1, 3, 8, 64, 100, 256, 512, 1000):
        found = graphs.sizes(most)
        assert found == sorted(set(found)) and found[0] == 1 and found[-1] == min(most, 512)
        # a step is padded by a third at most, and by little where that costs
        assert all(b - a <= max(8, a // 4) for a, b in itertools.pairwise(found))


def test_asked_for_where_there_are_none(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("a GPU has them")
    with pytest.raises(InvalidArgumentError, match="cuda_graphs = True: a cpu has no CUDA graphs"):
        Engine(decoder("dense", device), EngineConfig(cuda_graphs=True, kv_cache_bytes=1 << 20))
