"""The engine on a GPU: graphs on and off, alone and in a batch, every kind of sampling: the same bits."""

from __future__ import annotations

import gc
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.engine.config import EngineConfig, SamplingParams
from anyfp4.engine.engine import Engine
from anyfp4.engine.sequence import Sequence
from anyfp4.models.decoder import Decoder
from anyfp4.models.loader import load_decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
]
REQUESTS = 70


@pytest.fixture(scope="module", params=["native", "blackwell"])
def gpu_decoder(tiny_model: Path, request: pytest.FixtureRequest) -> Decoder:
    with Checkpoint(tiny_model) as checkpoint:
        return load_decoder(checkpoint, device=torch.device("cuda"), numerics=request.param)


def requests(vocab: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(1)
    found = []
    for i in range(REQUESTS):
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.0, 0.7, 1.3]), top_k=rng.choice([0, 0, 5]), top_p=rng.choice([1.0, 0.8]),
            min_p=rng.choice([0.0, 0.05]), seed=i, max_tokens=rng.randint(1, 30), ignore_eos=True,
            logprobs=rng.choice([None, 0, 4]), prompt_logprobs=rng.choice([None, None, 2]),
            repetition_penalty=rng.choice([1.0, 1.2]), presence_penalty=rng.choice([0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, 0.3]), logit_bias=rng.choice([None, {3: 4.0, 5: -1.0}]),
        )  # fmt: skip
        found.append(([rng.randrange(vocab) for _ in range(rng.randint(1, 60))], params))
    return found


def plain(wanted: list[tuple[list[int], SamplingParams]]) -> list[tuple[list[int], SamplingParams]]:
    """Requests whose steps need nothing of the host."""
    nothing = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": None,
               "logprobs": None}  # fmt: skip
    return [(tokens, replace(params, **nothing)) for tokens, params in wanted]


def run(
    model: Decoder, wanted: list[tuple[list[int], SamplingParams]], flies: bool | None = None, **options: object
) -> list[Sequence]:
    engine = Engine(model, EngineConfig(kv_cache_bytes=64 << 20, **options))  # type: ignore[arg-type]
    sequences = [s for i, (tokens, params) in enumerate(wanted) for s in engine.add(str(i), tokens, params)]
    while engine.has_work:
        engine.step()
    assert [s.error for s in sequences] == [None] * len(sequences)
    assert flies is None or (engine.stats().steps_ahead > 10) == flies
    return sequences


def outcome(s: Sequence) -> object:
    return s.tokens, s.logprobs, s.prompt_logprobs, s.finish_reason


@pytest.mark.parametrize("kind", ["any", "plain"])
def test_graphs_batches_and_async_scheduling_change_nothing(gpu_decoder: Decoder, kind: str) -> None:
    wanted = requests(gpu_decoder.config.vocab_size)
    wanted = plain(wanted) if kind == "plain" else wanted
    alone = [
        outcome(run(gpu_decoder, [request], cuda_graphs=False, async_scheduling=False)[0]) for request in wanted
    ]  # fmt: skip
    for options in (
        {"cuda_graphs": True, "max_num_seqs": 70},
        {"cuda_graphs": True, "max_num_seqs": 70, "async_scheduling": False},
        {"cuda_graphs": True, "max_num_seqs": 5, "max_step_tokens": 16, "block_size": 3},
        {"cuda_graphs": True, "max_num_seqs": 5, "max_step_tokens": 16, "block_size": 3, "async_scheduling": False},
        {"cuda_graphs": False, "max_num_seqs": 33},
        {"cuda_graphs": False, "max_num_seqs": 33, "async_scheduling": True},
    ):
        flies = options.get("async_scheduling", options["cuda_graphs"]) if kind == "plain" else None
        got = [outcome(s) for s in run(gpu_decoder, wanted, flies, **options)]
        different = [i for i, (a, b) in enumerate(zip(alone, got, strict=True)) if a != b]
        assert not different, (options, different)


def test_warming_up_captures_everything_and_changes_nothing(gpu_decoder: Decoder) -> None:
    wanted = requests(gpu_decoder.config.vocab_size)[:6]
    expected = [outcome(s) for s in run(gpu_decoder, wanted)]
    engine = Engine(gpu_decoder, EngineConfig(kv_cache_bytes=64 << 20, max_step_tokens=100, max_num_seqs=9))
    calls: list[tuple[int, int]] = []
    engine.warm_up(lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] == len(calls)
    assert engine.graphs is not None and len(engine.graphs._captured) == len(engine.graphs.shapes)
    sequences = [s for i, (tokens, params) in enumerate(wanted) for s in engine.add(str(i), tokens, params)]
    while engine.has_work:
        engine.step()
    assert [outcome(s) for s in sequences] == expected


def test_garbage_does_not_end_a_capture(gpu_decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of an engine that is gone lie in cycles; freeing them while a stream is captured spoils the capture."""
    x, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
    held: list[object] = [graph]
    del graph
    forward = Decoder.forward

    def lets_go(*arguments: object) -> torch.Tensor:
        if held and torch.cuda.is_current_stream_capturing():
            cycle = [held.pop()]  # young: an old one would be left for long
            cycle.append(cycle)
            del cycle
            assert not gc.isenabled()
        return forward(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "forward", lets_go)
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        run(gpu_decoder, requests(gpu_decoder.config.vocab_size)[:2], cuda_graphs=True)
    finally:
        gc.set_threshold(*thresholds)
    assert not held and gc.isenabled()


@pytest.mark.parametrize("ahead", [False, True])
def test_decode_steps_run_as_graphs_and_copy_only_tokens(gpu_decoder: Decoder, ahead: bool) -> None:
    engine = Engine(gpu_decoder, EngineConfig(kv_cache_bytes=64 << 20, async_scheduling=None if ahead else False))
    assert engine.graphs is not None and engine.async_scheduling == ahead
    for i in range(3):
        engine.add(str(i), [1, 2, 3], SamplingParams(temperature=i / 2, seed=1, max_tokens=20, ignore_eos=True))
    for _ in range(3):
        engine.step()
    assert {shape.tokens for shape in engine.graphs._captured} == {4, 16}
    torch.cuda.synchronize()
    steps, before = 6, engine.stats()
    # each call launches one step and reads one: any other copy to the host would be one too many
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    copies = [e for e in trace.events() if "DtoH" in e.name]
    assert len(copies) == steps, [e.name for e in trace.events()]
    # an operation that waits for the device raises, so that a step could not be launched ahead
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = engine.stats()
    assert after.steps_ahead - before.steps_ahead == (2 * steps if ahead else 0)
    assert after.generated_tokens - before.generated_tokens == 2 * steps * 3


def test_rows_that_the_gpu_cannot_choose(gpu_decoder: Decoder) -> None:
    """More candidates than the kernels look at: the host chooses, and the others do not notice."""
    common = {"seed": 3, "max_tokens": 20, "ignore_eos": True}
    wanted = [([1, 2, 3], SamplingParams(**common)), ([4, 5], SamplingParams(**common, top_k=2000))]
    alone = [outcome(run(gpu_decoder, [request], async_scheduling=False)[0]) for request in wanted]
    together = run(gpu_decoder, wanted)
    assert [outcome(s) for s in together] == alone
    assert [s.host_samples for s in together] == [False, True]
