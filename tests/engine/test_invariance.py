"""Thousands of random schedules: every request is bitwise what it is alone. And the comparison can fail.

What varies: who comes when and in what order, what else is in the batch, chunk and block sizes, the size of the cache
(down to what forces preemption), prefix caching and resets of it, aborts, threads, async scheduling, every sampling
parameter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anyfp4.backends import registry
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.engine import kv_cache
from anyfp4.engine.model_runner import ModelRunner
from anyfp4.engine.sequence import Sequence
from anyfp4.models.decoder import Decoder
from anyfp4.models.loader import load_decoder
from anyfp4.ops.attention import AttentionBatch
from tests.checkpoints import real_checkpoint
from tests.engine import schedules
from tests.engine.schedules import Case
from tests.models.test_against_transformers import make as make_model

SCHEDULES, PER_TEST = 2000, 100
CHECKPOINT_SCHEDULES, CHECKPOINT_PER_TEST = 200, 10
#: schedules in which a deliberate fault must show
MUTANT_SCHEDULES = 40

Pool = tuple[list[Case], list[list[Sequence]]]


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    native = getattr(registry.select(torch.device("cpu")), "native", None)
    before = native.threads() if native is not None else 0
    yield
    if native is not None:
        native.set_threads(before)


def make_pool(decoder: Decoder, count: int, longest_prompt: int, most_new: int) -> Pool:
    cases = schedules.make_cases(random.Random(0), decoder.config.vocab_size, count, longest_prompt, most_new)
    return cases, [schedules.alone(decoder, case) for case in cases]


@pytest.fixture(scope="module")
def pool(decoder: Decoder) -> Pool:
    return make_pool(decoder, 100, 32, 18)


def test_the_pool_has_every_kind_of_end_and_of_parameter(pool: Pool) -> None:
    cases, references = pool
    assert {s.finish_reason for group in references for s in group} == {"length", "stop"}
    assert {len(group) for group in references} == {1, 2, 3}
    for name in ("logprobs", "prompt_logprobs", "top_k", "temperature", "logit_bias", "repetition_penalty"):
        assert len({str(getattr(case.params, name)) for case in cases}) > 1, name


@pytest.mark.parametrize("first", range(0, SCHEDULES, PER_TEST))
def test_every_request_is_what_it_is_alone(decoder: Decoder, pool: Pool, first: int) -> None:
    for seed in range(first, first + PER_TEST):
        assert schedules.compare(decoder, *pool, seed) == ""


def test_the_schedules_preempt_share_and_mix(decoder: Decoder, pool: Pool) -> None:
    """What the test above relies on happens indeed."""
    preemptions = hits = aborted = ahead = 0
    for seed in range(60):
        schedule = schedules.make_schedule(seed, pool[0], kv_cache.block_bytes(decoder, 1))
        engine, sequences = schedules.run(decoder, pool[0], schedule)
        stats = engine.stats()
        preemptions, hits = preemptions + stats.preemptions, hits + stats.prefix_hit_tokens
        ahead += stats.steps_ahead
        aborted += sum(s.finish_reason == "abort" for _, s in sequences)
    assert preemptions > 20 and hits > 200 and aborted > 5 and ahead > 20


Base: Any = type(registry.select(torch.device("cpu")))


def last_bit(x: Tensor) -> Tensor:
    """``x`` with the last bit of every element flipped."""
    return (x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()]) ^ 1).view(x.dtype)


class Op(Base):  # type: ignore[misc]
    """A backend without a fused path, so that its ops can be replaced one by one; faultless."""

    name = "faulty"

    def fuse(self, plan: object) -> None:
        del plan


class LinearDependsOnM(Op):
    def linear(self, x: Tensor, prepared: Any, out_dtype: torch.dtype | None = None) -> Tensor:
        out: Tensor = super().linear(x, prepared, out_dtype)
        return last_bit(out) if x.shape[0] > 4 else out


class SplitDependsOnBatch(Op):
    def attention(self, q: Tensor, k: Tensor, v: Tensor, batch: AttentionBatch, **options: Any) -> Tensor:
        out: Tensor = super().attention(q, k, v, batch, **options)
        return last_bit(out) if batch.context_len.shape[0] > 2 else out


class CacheDependsOnChunks(Op):
    def write_kv(self, k: Tensor, v: Tensor, *others: Any) -> None:
        super().write_kv(last_bit(k) if k.shape[0] > 4 else k, v, *others)


def first_fault(decoder: Decoder, pool: Pool) -> str:
    found = (schedules.compare(decoder, *pool, seed) for seed in range(MUTANT_SCHEDULES))
    return next((text for text in found if text), "")


@pytest.fixture(scope="module")
def small_pool(decoder: Decoder) -> Pool:
    return make_pool(decoder, 20, 24, 8)


@pytest.mark.parametrize(
    ("backend", "caught"),
    [(Op, False), (LinearDependsOnM, True), (SplitDependsOnBatch, True), (CacheDependsOnChunks, True)],
)
def test_an_op_that_is_not_invariant_is_caught(
    backend: type[Op], caught: bool, tiny_model: Path, small_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.PREFERENCE, "cpu", (*registry.PREFERENCE["cpu"], backend()))
    with Checkpoint(tiny_model) as checkpoint:
        faulty = load_decoder(checkpoint, device=torch.device("cpu"), backend="faulty")
    assert bool(first_fault(faulty, small_pool)) == caught


def test_a_wrong_bit_in_a_prefix_hit_is_caught(
    decoder: Decoder, small_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks from the prefix cache differ from computed ones in last bits."""
    run = ModelRunner.run
    spoilt: set[int] = set()

    def spoiling(self: ModelRunner, step: Any, *feed: Any) -> Any:
        for item in step:
            s = item.sequence
            if item.start and item.start == s.cached_tokens and id(s) not in spoilt:
                spoilt.add(id(s))
                cache = self.caches[0].k
                cache[s.blocks[0]] = last_bit(cache[s.blocks[0]])
        return run(self, step, *feed)

    assert first_fault(decoder, small_pool) == ""
    monkeypatch.setattr(ModelRunner, "run", spoiling)
    assert first_fault(decoder, small_pool) != ""


@pytest.mark.parametrize("family", ["mistral window", "qwen3 bias"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """A sliding window, norms of q and k, biases; unquantized."""
    make_model(family, tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        other = load_decoder(checkpoint, device=torch.device("cpu"), dtype=torch.bfloat16)
    pool = make_pool(other, 20, 40, 10)
    for seed in range(40):
        assert schedules.compare(other, *pool, seed) == ""


@pytest.fixture(scope="module")
def real_decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    with Checkpoint(real_checkpoint("ct_nvfp4", tmp_path_factory)) as checkpoint:
        return load_decoder(checkpoint, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def real_pool(real_decoder: Decoder) -> Pool:
    return make_pool(real_decoder, 40, 60, 10)


@pytest.mark.checkpoint
@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, CHECKPOINT_SCHEDULES, CHECKPOINT_PER_TEST))
def test_every_request_is_what_it_is_alone_on_a_real_model(real_decoder: Decoder, real_pool: Pool, first: int) -> None:
    for seed in range(first, first + CHECKPOINT_PER_TEST):
        assert schedules.compare(real_decoder, *real_pool, seed) == ""
