"""The real checkpoints through vLLM against anyfp4's own engine: every layer's bits, tokens, perplexity, speed.

What differs between the two is not the linear layers (:func:`test_layers_bit_for_bit`) but attention, norms and rotary
embedding: the same formulas in another order. In float32 that is 1e-7 of a value.

With weight-only layers it stays small, so these are compared closely. With W4A4, now and then an activation is tipped
over the middle between two E2M1 codes, which changes it by a whole step; this small model then gives log-probabilities
that differ by tenths, in either direction. There is no telling such a difference from a wrong one at a single position,
so it is compared with what anyfp4's own engine shows when the same is done to it: the change from float32 to bfloat16.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from vllm import SamplingParams

import anyfp4
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.layers.linear import Linear
from anyfp4.testing.bitwise import assert_same_bits
from anyfp4.tools.evaluate import evaluate
from anyfp4.tools.evaluate_score import Reader
from tests.checkpoints import checkpoints_root
from tests.integrations.vllm.conftest import engine, layers_of
from tests.integrations.vllm.weight_only import write_weight_only

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
CONTEXT = 512
#: vLLM's modules and the projections in them
SHARDS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass
class Pair:
    """One checkpoint in both engines; ``dtype`` is the most exact that vLLM takes for its layout."""

    folder: Path
    dtype: str
    weight_only: bool
    ours: anyfp4.LLM
    theirs: Any

    @property
    def prompts(self) -> list[list[int]]:
        return [self.ours.encode(p)[1] for p in PROMPTS]

    def say(self, what: str, capsys: pytest.CaptureFixture[str]) -> None:
        with capsys.disabled():
            print(f"\n{self.folder.name}, {self.dtype}: {what}")


CASES = [("ct_nvfp4", "float32"), ("modelopt_nvfp4", "bfloat16")]


@pytest.fixture(scope="module", params=[(*c, w) for c in CASES for w in (False, True)], ids=lambda p: f"{p[0]}-{p[2]}")
def pair(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    name, dtype, weight_only = request.param
    folder = checkpoint(name)
    if weight_only:
        folder = write_weight_only(folder, tmp_path_factory.mktemp("weight_only") / name)
    ours = anyfp4.LLM(folder, dtype=dtype, device="cpu")
    with engine(folder, dtype=dtype) as theirs:
        yield Pair(folder, dtype, weight_only, ours, theirs)


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
            if last == "o_proj":
                bias = torch.randn(576, generator=generator).to(torch.bfloat16)
                biased = Linear([replace(source.linear(name), bias=bias)])
                x = torch.randn(5, 576, generator=generator).to(torch.bfloat16)
                assert_same_bits(layer.quant_method.apply(layer, x, bias), biased(x), f"{name} with a bias")


def test_greedy_tokens(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """Both generate; then vLLM chooses after each of anyfp4's tokens, so that one difference is counted once."""
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
    theirs = [prompt_losses(pair.theirs, s)[-TOKENS:] for s in sequences]
    alike = [chosen for one in theirs for _, chosen in one]
    between_dtypes = alike_between_dtypes(pair, sequences)
    count = len(PROMPTS) * TOKENS
    pair.say(
        f"{whole} of {len(PROMPTS)} completions alike whole, {sum(alike)} of {count} tokens after the same ones "
        f"({between_dtypes} between anyfp4's own dtypes); tokens/s of ten at once: vLLM {count / seconds:.0f}, "
        f"anyfp4's engine {count / own_seconds:.0f}",
        capsys,
    )
    if pair.weight_only and pair.dtype == "float32":
        assert whole == len(PROMPTS) and all(alike)
    # not further off than anyfp4's own dtypes from each other; in bfloat16 both engines round, each in its own way:
    # twice as many differ then, and where that is a handful, chance may make it three times
    assert count - sum(alike) <= (1 if pair.dtype == "float32" else 3) * (count - between_dtypes)


def alike_between_dtypes(pair: Pair, sequences: Sequence[Sequence[int]]) -> int:
    """In how many of the last tokens anyfp4's engine chooses the same in float32 and in bfloat16."""
    other = anyfp4.LLM(pair.folder, dtype="bfloat16" if pair.dtype == "float32" else "float32", device="cpu")
    return sum(int((best(pair.ours, s) == best(other, s)).sum()) for s in sequences)


def best(llm: anyfp4.LLM, tokens: Sequence[int]) -> torch.Tensor:
    """int64 [TOKENS]: what anyfp4 would choose for each of the last tokens."""
    reader = Reader(llm.engine.model, CONTEXT)
    hidden = reader.hidden(tokens)[-TOKENS - 1 : -1]
    return torch.cat([logits.argmax(-1) for _, logits in reader.logits(hidden)])


def test_perplexity(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    text = (checkpoints_root() / "eval.txt").read_text()
    tokens = pair.ours.encode(text)[1][:CONTEXT]
    own = evaluate(pair.ours.engine.model, tokens, context=CONTEXT).losses
    theirs = np.array([loss for loss, _ in prompt_losses(pair.theirs, tokens)])
    differences = theirs - own
    off = float(differences.mean())
    error = float(differences.std() / len(differences) ** 0.5)
    pair.say(
        f"perplexity {np.exp(theirs.mean()):.4f} in vLLM, {np.exp(own.mean()):.4f} in anyfp4's engine ({off:+.3%} ± "
        f"{error:.3%}); losses of a token at most {abs(differences).max():.1e} apart",
        capsys,
    )
    # W4A4: the tipped codes' part of the mean is of no direction; three times its standard error is left to it
    assert abs(off) < 0.005 + (0 if pair.weight_only else 3 * error)
    if pair.weight_only and pair.dtype == "float32":
        assert abs(differences).max() < 1e-3  # 6e-5 seen


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in CASES])
def test_perplexity_of_the_whole_text(
    name: str, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """W4A4 in bfloat16, 20,460 predictions: what tipped codes add has nearly averaged out."""
    folder = checkpoint(name)
    ours = anyfp4.LLM(folder, dtype="bfloat16", device="cpu")
    tokens = ours.encode((checkpoints_root() / "eval.txt").read_text())[1]
    own = evaluate(ours.engine.model, tokens, context=1024).losses
    windows = [tokens[i : i + 1024] for i in range(0, len(tokens), 1024)]
    with engine(folder, dtype="bfloat16") as llm:
        theirs = np.array([loss for window in windows for loss, _ in prompt_losses(llm, window)])
    assert len(theirs) == len(own) == 20_460
    off, error = float((theirs - own).mean()), float((theirs - own).std() / len(own) ** 0.5)
    with capsys.disabled():
        print(
            f"\n{name}: perplexity {np.exp(theirs.mean()):.3f} in vLLM, {np.exp(own.mean()):.3f} in anyfp4's engine "
            f"({off:+.3%} ± {error:.3%})"
        )
    assert abs(off) < 0.005 + 2 * error


def prompt_losses(llm: Any, tokens: Sequence[int]) -> list[tuple[float, bool]]:
    """For each token but the first, vLLM's −ln p, and whether it is the one that vLLM would have chosen."""
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    (output,) = llm.generate({"prompt_token_ids": list(tokens)}, sampling, use_tqdm=False)
    found = [position[token] for position, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)]
    return [(-f.logprob, f.rank == 1) for f in found]
