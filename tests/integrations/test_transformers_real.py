"""The real producers' checkpoints inside transformers."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from anyfp4 import LLM, EngineConfig
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.errors import UnsupportedError
from anyfp4.integrations.transformers import AnyFP4Config
from anyfp4.models.loader import load_decoder
from anyfp4.testing.bitwise import assert_same_bits
from anyfp4.testing.models import all_logits
from anyfp4.tools.evaluate import evaluate
from tests.checkpoints import FULL, REFUSED_VARIANT, VARIANTS, checkpoints_root, real_checkpoint
from tests.integrations.test_transformers import dequantized, layers_of, load

pytestmark = pytest.mark.checkpoint
WINDOWS, WINDOW = 4, 256


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str) -> None:
    folder = checkpoints_root() / variant
    model = load(folder, quantization_config=AnyFP4Config(kv_cache="dense"))
    with Checkpoint(folder) as checkpoint:
        layers = layers_of(model)
        assert sorted(layers) == checkpoint.linear_modules()
        for name, layer in layers.items():
            assert layer.scheme == checkpoint.scheme_of(name)
        decoder = load_decoder(checkpoint, device=torch.device("cpu"), max_positions=64)
    x = torch.randn(5, 576, dtype=torch.bfloat16)
    mlp = model.model.layers[0].mlp
    assert_same_bits(torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], dim=-1), decoder.blocks[0].mlp.gate_up(x), variant)
    assert torch.isfinite(model(torch.arange(2, 30).reshape(1, -1)).logits).all()


def test_w4a8_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="W4A8_NVFP4_FP8"):
        load(checkpoints_root() / REFUSED_VARIANT)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_generates_as_the_decoder(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In float32, where a near-tie of two logits is rare enough for the same greedy tokens."""
    from transformers import AutoTokenizer

    folder = real_checkpoint(name, tmp_path_factory)
    model = load(folder, dtype=torch.float32, quantization_config=AnyFP4Config(numerics="blackwell"))
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("The capital of France is").input_ids])
    generated = model.generate(ids, max_new_tokens=12, do_sample=False)[0]
    with Checkpoint(folder) as checkpoint:
        decoder = load_decoder(
            checkpoint, device=torch.device("cpu"), dtype=torch.float32, numerics="blackwell", max_positions=64
        )
    logits = all_logits(decoder, generated.tolist())
    assert torch.equal(logits.argmax(-1)[ids.shape[1] - 1 : -1], generated[ids.shape[1] :])
    ours = model(generated[None]).logits[0]
    print(f"{name}: largest difference of a logit {(ours - logits).abs().max():.2g}, spread {logits.std():.3g}")
    # float32 roundings of norms, rope and attention differ, and where one moves an activation over the border of two
    # codes, a step of a code follows: far from what a wrong layer does
    assert (ours - logits).abs().max() < 0.05 * logits.std()


@pytest.mark.slow
@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("name", FULL)
def test_perplexity_is_that_of_the_engine(
    name: str, weight_only: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = real_checkpoint(name, tmp_path_factory)
    model = load(folder, dtype=torch.float32, quantization_config=AnyFP4Config(weight_only=weight_only or None))
    if weight_only:
        model.save_pretrained(tmp_path)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / file).symlink_to((folder / file).resolve())
        folder = tmp_path
    llm = LLM(folder, dtype="float32", config=EngineConfig(max_model_len=WINDOW + 1, max_num_seqs=1))
    text = llm.tokenizer.encode((checkpoints_root() / "eval.txt").read_text())[: WINDOWS * WINDOW]
    engine = torch.tensor(evaluate(llm.engine.model, text, context=WINDOW).losses, dtype=torch.float64)
    del llm
    ours = torch.cat([losses(model, part) for part in torch.tensor(text).split(WINDOW)]).double()
    differ = ours - engine
    noise = differ.std() / math.sqrt(len(differ))
    print(
        f"{name} {'weight-only' if weight_only else 'W4A4'}: perplexity {ours.mean().exp():.3f} in transformers, "
        f"{engine.mean().exp():.3f} in the engine; a token's loss differs by {differ.std():.2g}, median "
        f"{differ.abs().median():.2g}, the mean by {differ.mean():.2g} (standard error {noise:.2g})"
    )
    if weight_only:
        assert differ.abs().max() < 0.01
    else:
        # float32 roundings of norms, rope and attention move few activations over the border of two codes, but what
        # follows from one is a step of a code, and W4A4 costs this model 20% of perplexity: losses get noise, which has
        # no direction. A wrong scale has one.
        assert abs(differ.mean()) < 5 * noise


def losses(model: nn.Module, window: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(window[None]).logits[0].float()
    return nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none")


@pytest.mark.slow
def test_the_examples_of_the_page_run_as_they_stand(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = real_checkpoint("ct_nvfp4", tmp_path_factory)
    (tmp_path / "SmolLM2-135M-Instruct-NVFP4").symlink_to(folder)
    model = load(folder)
    dense = dequantized(model).to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "SmolLM2-135M-Instruct")
    page = (Path(__file__).resolve().parents[2] / "docs" / "integrations.md").read_text()
    section = page[page.index("\n## transformers\n") :].split("\n## ")[1]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks), {})
    with Checkpoint(tmp_path / "quantized") as checkpoint:
        assert checkpoint.quantization.layout == "modelopt"
        assert {checkpoint.scheme_of(m).label for m in checkpoint.linear_modules()} == {"NVFP4 W4A4"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_peak_memory_of_loading(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """transformers reads every file, then one layer at a time is held twice."""
    folder = real_checkpoint(name, tmp_path_factory)
    code = f"""
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import anyfp4.integrations.transformers
torch.randn(64, 64) @ torch.randn(64, 64)
def peak(): return int([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1]) * 1024
before = peak()
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
print(peak() - before, model.get_memory_footprint())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    peak, held = map(int, done.stdout.split())
    print(f"{name}: peak {peak / 1e6:.0f} MB, held {held / 1e6:.0f} MB")
    assert 1e8 < held < 1.3e8
    assert peak < 1.3 * held
