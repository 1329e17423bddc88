"""The real producers' checkpoints: they generate, agree with published figures, and load within their memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyfp4 import LLM, EngineConfig, SamplingParams
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.errors import UnsupportedError
from anyfp4.models.loader import load_decoder
from anyfp4.testing.bitwise import assert_same_bits
from anyfp4.testing.models import all_logits
from anyfp4.tools.perplexity import perplexity
from tests.checkpoints import REFUSED_VARIANT, VARIANTS, checkpoints_root, real_checkpoint

pytestmark = pytest.mark.checkpoint

#: perplexity on eval.txt, measured with the producers' own libraries
PUBLISHED = {
    ("ct_nvfp4", "W4A4"): 18.622,
    ("ct_nvfp4", "weight-only"): 15.525,
    ("modelopt_nvfp4", "W4A4"): 18.795,
    ("modelopt_nvfp4", "weight-only"): 15.624,
}


def weight_only(folder: Path, out: Path) -> Path:
    """The same weights without input scales: what each layout's weight-only export looks like."""
    out.mkdir()
    for file in folder.iterdir():
        if file.name == "model-00001-of-00002.safetensors":
            tensors = {
                k: v for k, v in load_file(file).items() if not k.endswith(("input_scale", "input_global_scale"))
            }
            save_file(tensors, out / file.name, {"format": "pt"})
        elif file.name not in ("config.json", "hf_quant_config.json", "model.safetensors.index.json"):
            (out / file.name).symlink_to(file.resolve())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = index["weight_map"]
    index["weight_map"] = {k: v for k, v in names.items() if not k.endswith(("input_scale", "input_global_scale"))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    if quantization["quant_method"] == "modelopt":
        quantization["quant_algo"] = "W4A16_NVFP4"
        hf = json.loads((folder / "hf_quant_config.json").read_text())
        hf["quantization"]["quant_algo"] = "W4A16_NVFP4"
        (out / "hf_quant_config.json").write_text(json.dumps(hf))
        del quantization["config_groups"]["group_0"]["input_activations"]
    else:
        quantization["config_groups"]["group_0"]["input_activations"] = None
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("name", ["ct_nvfp4", "modelopt_nvfp4"])
def test_fluent_english(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    llm = LLM(real_checkpoint(name, tmp_path_factory), config=EngineConfig(max_model_len=512))
    params = SamplingParams(temperature=0, max_tokens=24)
    text = llm.chat([{"role": "user", "content": "What is gravity?"}], params)[0].outputs[0].text
    assert "gravity" in text.lower() and len(text.split()) > 10
    assert all(ord(c) < 128 for c in text), text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), PUBLISHED)
def test_perplexity(name: str, kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = real_checkpoint(name, tmp_path_factory)
    if kind == "weight-only":
        folder = weight_only(folder, tmp_path_factory.mktemp("weight_only") / name)
    llm = LLM(folder, config=EngineConfig(max_model_len=1025, max_num_seqs=1))
    tokens = llm.tokenizer.encode((checkpoints_root() / "eval.txt").read_text())[:20480]
    got = perplexity(llm, tokens)
    print(f"{name} {kind}: {got.perplexity:.3f}, published {PUBLISHED[name, kind]}")
    assert got.predictions == 20460
    # the published emulations round dequantized operands to bfloat16, exact arithmetic does not
    assert abs(got.perplexity / PUBLISHED[name, kind] - 1) < 0.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_load_and_are_invariant(variant: str) -> None:
    with Checkpoint(checkpoints_root() / variant) as checkpoint:
        decoder = load_decoder(checkpoint, device=torch.device("cpu"), max_positions=128)
    tokens = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = all_logits(decoder, tokens)
    assert torch.isfinite(logits).all()
    assert (decoder.kv_dtype == torch.float8_e4m3fn) == ("fp8kv" in variant)
    assert_same_bits(all_logits(decoder, tokens, chunks=[13, 1, 26]), logits, variant)


def test_w4a8_is_refused_by_name() -> None:
    with (
        pytest.raises(UnsupportedError, match="W4A8_NVFP4_FP8"),
        Checkpoint(checkpoints_root() / REFUSED_VARIANT),
    ):
        pass


@pytest.mark.parametrize("name", ["ct_nvfp4", "modelopt_nvfp4"])
def test_loading_memory(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Peak resident memory of loading, beyond what imports take, is at most 1.3 × the checkpoint's bytes."""
    folder = real_checkpoint(name, tmp_path_factory)
    code = f"""
import resource, torch
from pathlib import Path
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.models.loader import load_decoder
import anyfp4.llm
torch.randn(64, 64) @ torch.randn(64, 64)
peak = lambda: int([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1]) * 1024
before = peak()
with Checkpoint(Path({str(folder)!r})) as checkpoint:
    decoder = load_decoder(checkpoint, device=torch.device('cpu'), max_positions=1024)
    print((peak() - before) / checkpoint.total_bytes, checkpoint.total_bytes)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    ratio, total = map(float, done.stdout.split())
    print(f"{name}: peak {ratio:.2f} x {total / 1e6:.1f} MB")
    assert total > 1e8
    assert ratio <= 1.3
