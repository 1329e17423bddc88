"""The real checkpoints through vLLM against anyfp4's own engine: tokens, perplexity, every layer's bits, speed.

What differs between the two is not the linear layers (:func:`test_layers_bit_for_bit`) but attention, norms and rotary
embedding: the same formulas in another order. In float32 that is 1e-7 of a value, until it tips an activation over the
middle between two E2M1 codes: then that code changes by a whole step, and the log-probabilities by tenths. So tokens are
compared where the choice is clear. How clear it must be is measured on anyfp4 alone: the change of a log-probability from
float32 to bfloat16 arithmetic, the rounding that the checkpoint's own dtype stands for, which tips codes in the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

import math

import anyfp4
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.layers.linear import Linear
from anyfp4.testing.bitwise import assert_same_bits
from anyfp4.tools.evaluate import evaluate
from anyfp4.tools.evaluate_score import Reader
from tests.checkpoints import checkpoints_root
from tests.integrations.vllm.conftest import engine, layers_of

pytestmark = pytest.mark.checkpoint

PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "Once upon a time",
    "The three primary colors are",
    "Photosynthesis is the process by which",
    "In 1969, astronauts",
    "A list of prime numbers:",
    "The quick brown fox",
    "To make bread you need",
)
TOKENS = 32
CONTEXT, WINDOWS = 1024, 2
#: vLLM's modules and the projections in them
SHARDS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass
class Pair:
    """One checkpoint in both engines; ``dtype`` is the most exact that vLLM takes for its layout."""

    folder: Path
    dtype: str
    ours: anyfp4.LLM
    theirs: Any

    @property
    def prompts(self) -> list[list[int]]:
        return [self.ours.encode(p)[1] for p in PROMPTS]


@pytest.fixture(scope="module", params=[("ct_nvfp4", "float32"), ("modelopt_nvfp4", "bfloat16")], ids=lambda p: p[0])
def pair(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Iterator[Pair]:
    name, dtype = request.param
    folder = checkpoint(name)
    ours = anyfp4.LLM(folder, dtype=dtype, device="cpu")
    with engine(folder, dtype=dtype) as theirs:
        yield Pair(folder, dtype, ours, theirs)


def log_probabilities(llm: anyfp4.LLM, tokens: Sequence[int], last: int) -> torch.Tensor:
    """float32 [last, V]: what anyfp4 predicts for each of the last tokens."""
    reader = Reader(llm.engine.runner.decoder, CONTEXT)
    hidden = reader.hidden(tokens)[-last - 1 : -1]
    return torch.cat([logits.float().log_softmax(-1) for _, logits in reader.logits(hidden)])


def test_layers_bit_for_bit(pair: Pair) -> None:
    """Every layer gives the bits of anyfp4's own, whatever is in the batch; vLLM's copies of the weights are gone."""
    layers = layers_of(pair.theirs)
    assert len(layers) == 30 * 4
    generator = torch.Generator().manual_seed(0)
    with Checkpoint(pair.folder) as source:
        for name, layer in layers.items():
            parent, last = name.rsplit(".", 1)
            own = Linear(source.linear(f"{parent}.{shard}") for shard in SHARDS.get(last, (last,)))
            for dtype in (torch.bfloat16, torch.float32):
                x = torch.randn(17, own.parts[0][1].shape[1], generator=generator).to(dtype)
                y = layer.quant_method.apply(layer, x, None)
                assert_same_bits(y, own(x), name)
                for i in (0, 16):
                    assert_same_bits(layer.quant_method.apply(layer, x[i : i + 1], None), y[i : i + 1], name)
            assert sum(p.numel() for p in layer.parameters()) < 8, f"{name} still holds weights"


def test_greedy_tokens(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM's choice after each of anyfp4's tokens is anyfp4's wherever that was clear; both generate, for the record."""
    from vllm import SamplingParams

    sampling = anyfp4.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    started = time.perf_counter()
    own = [list(o.outputs[0].token_ids) for o in pair.ours.generate(pair.prompts, sampling)]
    own_seconds = time.perf_counter() - started
    started = time.perf_counter()
    free = pair.theirs.generate(
        [{"prompt_token_ids": p} for p in pair.prompts],
        SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True),
        use_tqdm=False,
    )
    seconds = time.perf_counter() - started
    whole = sum(list(o.outputs[0].token_ids) == tokens for o, tokens in zip(free, own, strict=True))

    sequences = [p + tokens for p, tokens in zip(pair.prompts, own, strict=True)]
    forced = pair.theirs.generate(
        [{"prompt_token_ids": s} for s in sequences],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1),
        use_tqdm=False,
    )
    other = anyfp4.LLM(pair.folder, dtype="bfloat16" if pair.dtype == "float32" else "float32", device="cpu")
    noise, margins, agreed = 0.0, [], []
    for sequence, output in zip(sequences, forced, strict=True):
        mine = log_probabilities(pair.ours, sequence, TOKENS)
        best = mine.topk(2).values
        changed = log_probabilities(other, sequence, TOKENS)
        noise = max(noise, float((mine - changed).gather(1, mine.topk(2).indices).abs().max()))
        margins += (best[:, 0] - best[:, 1]).tolist()
        for position, token in zip(output.prompt_logprobs[-TOKENS:], sequence[-TOKENS:], strict=True):
            agreed.append(next(t for t, p in position.items() if p.rank == 1) == token)
    # one of two log-probabilities may rise and the other fall
    clear = [m > 2 * noise for m in margins]
    with capsys.disabled():
        count = len(PROMPTS) * TOKENS
        print(
            f"\n{pair.folder.name} {pair.dtype}: {whole} of {len(PROMPTS)} completions alike whole, {sum(agreed)} of {count} "
            f"tokens after the same ones; {sum(clear)} were clear (margin > {2 * noise:.2f}); tokens/s of ten at once: "
            f"vLLM {count / seconds:.0f}, anyfp4's engine {count / own_seconds:.0f}"
        )
    assert all(a for a, c in zip(agreed, clear, strict=True) if c)
    assert sum(agreed) >= 0.9 * len(agreed)  # 97% seen in float32, 95% in bfloat16
    assert sum(clear) > len(clear) / 4, "hardly a choice was clear: the test says nothing"


def test_perplexity(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    text = (checkpoints_root() / "eval.txt").read_text()
    tokens = pair.ours.encode(text)[1][: CONTEXT * WINDOWS]
    own = evaluate(pair.ours.engine.runner.decoder, tokens, context=CONTEXT).perplexity
    theirs = perplexity(pair.theirs, tokens)
    with capsys.disabled():
        print(f"\n{pair.folder.name} {pair.dtype}: perplexity {theirs:.4f} in vLLM, {own:.4f} in anyfp4's engine")
    assert abs(theirs / own - 1) < 0.005


def perplexity(llm: Any, tokens: Sequence[int], context: int = CONTEXT) -> float:
    """As ``anyfp4.tools.evaluate``: windows without overlap, the first token of each not scored."""
    from vllm import SamplingParams

    windows = [list(tokens[i : i + context]) for i in range(0, len(tokens), context)]
    losses = []
    for window in windows:
        (output,) = llm.generate(
            {"prompt_token_ids": window}, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0), use_tqdm=False
        )
        losses += [-p[t].logprob for p, t in zip(output.prompt_logprobs[1:], window[1:], strict=True)]
    return math.exp(math.fsum(losses) / len(losses))
