"""anyfp4 inside transformers: loading, what the layers do, what they hold, and what is refused."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.errors import InvalidArgumentError, TensorError, UnsupportedError
from anyfp4.integrations.transformers import AnyFP4Config, QuantizedLinear
from anyfp4.layers.linear import Linear
from anyfp4.models.loader import load_decoder
from anyfp4.testing.bitwise import assert_same_bits
from anyfp4.testing.models import all_logits
from tests.checkpoint.small import ct_config, ct_fp8_group
from tests.integrations.hf_models import tokens, write_model

CPU = torch.device("cpu")


def load(folder: Path, **options: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def layers_of(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.fixture(scope="module", params=["compressed-tensors", "modelopt"])
def folder(request: pytest.FixtureRequest, dense_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model, W4A4."""
    from anyfp4.tools.quantize import quantize_checkpoint

    out = tmp_path_factory.mktemp("nvfp4") / request.param
    return quantize_checkpoint(dense_model, out, layout=request.param, max_shard_bytes=40_000).out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("numerics", ["native", "blackwell"])
def test_layers_have_the_bits_of_the_decoder(folder: Path, dtype: torch.dtype, numerics: str) -> None:
    model = load(folder, dtype=dtype, quantization_config=AnyFP4Config(numerics=numerics))
    layers = layers_of(model)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = torch.randn(2, 2, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    with Checkpoint(folder) as checkpoint:
        assert sorted(layers) == checkpoint.linear_modules()
        for name, layer in layers.items():
            own = Linear([checkpoint.linear(name)], numerics=numerics)
            inputs = wide if name.endswith("down_proj") else x
            assert_same_bits(layer(inputs), own(inputs), name)
    with Checkpoint(folder) as checkpoint:
        decoder = load_decoder(checkpoint, device=CPU, dtype=dtype, numerics=numerics)
    for i, block in enumerate(decoder.blocks):
        part = model.model.layers[i]
        qkv = torch.cat([getattr(part.self_attn, f"{p}_proj")(x) for p in "qkv"], dim=-1)
        assert_same_bits(qkv, block.attention.qkv(x))
        assert_same_bits(part.self_attn.o_proj(x), block.attention.o(x))
        assert_same_bits(torch.cat([part.mlp.gate_proj(x), part.mlp.up_proj(x)], dim=-1), block.mlp.gate_up(x))
        assert_same_bits(part.mlp.down_proj(wide), block.mlp.down(wide))


def test_logits_are_as_near_to_the_truth_as_the_decoders(folder: Path, tmp_path: Path) -> None:
    """Weight-only, so that no rounding of an activation makes a jump.

    The truth is the model with dequantized weights in float64. In float32 that model, all torch's, is off by d. The
    decoder and this model round as often, or less often, since their linear layers round once where torch's do at each
    addition. Errors of the two have no reason to have one direction, so each may be as large as d, give or take: 4 d.
    """
    model = load(folder, dtype=torch.float32, quantization_config=AnyFP4Config(weight_only=True))
    model.save_pretrained(tmp_path / "weights")
    ids = tokens(length=12, batch=1)
    logits = model(ids).logits[0].double()
    with Checkpoint(tmp_path / "weights") as checkpoint:
        decoder = load_decoder(checkpoint, device=CPU, dtype=torch.float32)
    decoded = all_logits(decoder, ids[0].tolist()).double()
    plain = dequantized(model)
    single = plain(ids).logits[0].double()
    truth = plain.double()(ids).logits[0]
    d = (single - truth).abs().max()
    assert 0 < d < 1e-4
    assert (logits - truth).abs().max() < 4 * d
    assert (decoded - truth).abs().max() < 4 * d
    assert truth.std() > 100 * d


def dequantized(model: Any) -> nn.Module:
    """The same model with dense float32 weights, made without the layers of anyfp4."""
    from transformers import AutoModelForCausalLM

    from anyfp4.formats.nvfp4 import dequantize

    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {n: t for n, t in model.state_dict().items() if n in plain.state_dict() and t.is_floating_point()}
    for name, layer in layers_of(model).items():
        state[f"{name}.weight"] = dequantize(layer.to_weight().weight)
    plain.load_state_dict(state)
    return plain.eval()


def test_memory_is_that_of_the_packed_weights(folder: Path) -> None:
    model = load(folder)
    with Checkpoint(folder) as checkpoint:
        quantized = {m: checkpoint.linear(m).nbytes for m in checkpoint.linear_modules()}
        rest = sum(checkpoint.info(n).nbytes for n in checkpoint.names if n.rpartition(".")[0] not in quantized)
    layers = layers_of(model)
    for name, layer in layers.items():
        # the CPU backend pads to tiles of 16 rows and 64 columns, and keeps 12 bytes for each row and 24 for each tile
        rows, columns = -(-layer.out_features // 16) * 16, -(-layer.in_features // 64) * 64
        assert layer.nbytes <= rows * columns * 9 // 16 + rows * 12 + rows // 16 * 24 + 16, name
        assert layer.nbytes >= quantized[name]
        assert not list(layer.parameters()) and not list(layer.buffers())
    held = sum(layer.nbytes for layer in layers.values())
    rotary = sum(b.nbytes for b in model.buffers())
    assert model.get_memory_footprint() == held + rest + rotary
    assert model.get_memory_footprint(return_buffers=False) == held + rest
    gc.collect()
    kinds = (torch.uint8, torch.float8_e4m3fn)
    left = [t for t in gc.get_objects() if type(t) is Tensor and t.dtype in kinds and t.numel() > 512]
    assert not [t for t in left if tuple(t.shape) in {(96, 32), (64, 48), (64, 32)}], "raw codes are still held"


def test_generates_what_it_computes(folder: Path) -> None:
    model = load(folder)
    ids = tokens(batch=2, length=7)
    generated = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert generated.shape == (2, 12)
    for step in range(7, 12):
        assert torch.equal(model(generated[:, :step]).logits[:, -1].argmax(-1), generated[:, step])


def test_compiles_whole(dense_model: Path) -> None:
    model = load(dense_model, quantization_config=AnyFP4Config())
    ids = tokens(batch=1)
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(ids, use_cache=False).logits, expected)


def test_dtype_and_device_changes_corrupt_nothing(folder: Path) -> None:
    ids = tokens(batch=1)
    wide = load(folder, dtype=torch.float32)
    moved = load(folder, dtype=torch.bfloat16).to(torch.float32).to("cpu")
    assert_same_bits(moved(ids).logits, wide(ids).logits)
    twin = copy.deepcopy(wide)
    assert_same_bits(twin(ids).logits, wide(ids).logits)
    assert twin.get_memory_footprint() == wide.get_memory_footprint()
    with pytest.raises(UnsupportedError, match="cannot be moved to the meta device"):
        twin.to("meta")
    with pytest.raises(InvalidArgumentError, match="cannot be pickled"):
        pickle.dumps(wide)
    assert "NVFP4 W4A4, backend=" in repr(wide)


def test_state_dict_comes_and_goes(folder: Path) -> None:
    model, other = load(folder), load(folder)
    ids = tokens(batch=1)
    state = model.state_dict()
    with Checkpoint(folder) as checkpoint:
        assert {n for n in state if n != "lm_head.weight"} == checkpoint.names - {"lm_head.weight"}
    name, layer = next(iter(layers_of(other).items()))
    changed = dict(state)
    packed = f"{name}.{layer.names.packed}"
    changed[packed] = changed[packed] ^ 1
    other.load_state_dict(changed)
    assert not torch.equal(other(ids).logits, model(ids).logits)
    other.load_state_dict(state)
    assert_same_bits(other(ids).logits, model(ids).logits)
    scale = f"{name}.weight_scale"
    bad = state[scale].view(torch.uint8).clone()
    bad[0, 0] = 0x7F
    with pytest.raises(TensorError, match="are NaN or negative"):
        other.load_state_dict({**state, scale: bad.view(torch.float8_e4m3fn)})
    assert_same_bits(other(ids).logits, model(ids).logits)


def test_training_is_refused(folder: Path) -> None:
    model = load(folder)
    assert not model.hf_quantizer.is_trainable and not model.hf_quantizer.is_qat_trainable
    assert not any(p.requires_grad for p in model.parameters())
    embedded = model.get_input_embeddings()(tokens()).requires_grad_()
    with pytest.raises(UnsupportedError, match="for inference and have no gradient"):
        model(inputs_embeds=embedded)
    with torch.no_grad():
        model(inputs_embeds=embedded)


def test_only_hf_quant_config(folder: Path, tmp_path: Path) -> None:
    if folder.name != "modelopt":
        pytest.skip("only ModelOpt's layout has an hf_quant_config.json")
    for file in folder.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path, quantization_config=AnyFP4Config())
    ids = tokens(batch=1)
    assert_same_bits(model(ids).logits, load(folder)(ids).logits)


def test_others_checkpoints_go_where_they_went(folder: Path, tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    merge = AutoHfQuantizer.merge_quantization_configs
    fp8 = ct_config(ct_fp8_group())
    assert type(merge(fp8, None)) is CompressedTensorsConfig
    table = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert type(merge(table, None)) is AnyFP4Config
    if folder.name == "compressed-tensors":
        assert type(merge(table, CompressedTensorsConfig())) is CompressedTensorsConfig
    with pytest.raises(UnsupportedError, match=r"does not load .*'compressed-tensors', format 'float-quantized'"):
        merge(fp8, AnyFP4Config())
    with pytest.raises(UnsupportedError, match=r"does not load .*'gptq'"):
        merge({"quant_method": "gptq", "bits": 4}, AnyFP4Config())
    before = AutoHfQuantizer.merge_quantization_configs
    importlib.reload(importlib.import_module("anyfp4.integrations.transformers"))
    assert type(AutoHfQuantizer.merge_quantization_configs(fp8, None)) is CompressedTensorsConfig
    assert type(before(fp8, None)) is CompressedTensorsConfig


def test_choices_are_checked(folder: Path) -> None:
    for wrong in (
        {"numerics": "fast"},
        {"layout": "gguf"},
        {"weight_only": 1},
        {"kv_cache": "fp8"},
        {"ignore": "lm_head"},
        {"backend": ""},
    ):
        with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
            AnyFP4Config(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=r"unexpected keyword argument 'bits'"):
        AnyFP4Config.from_dict({"quant_method": "anyfp4", "bits": 4})
    with pytest.raises(InvalidArgumentError, match=r"ignore=.*quantizing on the fly"):
        load(folder, quantization_config=AnyFP4Config(ignore=["lm_head"]))
    with pytest.raises(UnsupportedError, match=r"dtype torch\.float64"):
        load(folder, dtype=torch.float64)
    chosen = layers_of(load(folder, quantization_config=AnyFP4Config(backend="reference")))
    assert {part.backend for layer in chosen.values() for _, part in layer._prepared().linear.parts} == {"reference"}


def test_gpt2_is_refused_by_name(tmp_path: Path) -> None:
    write_model("gpt2", tmp_path, n_embd=64, n_head=4, n_layer=1)
    with pytest.raises(InvalidArgumentError, match=r"GPT2LMHeadModel has no nn\.Linear layer left to quantize"):
        load(tmp_path, quantization_config=AnyFP4Config())


def test_device_maps(folder: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers needs accelerate for a device_map")
    ids = tokens(batch=1)
    expected = load(folder)(ids).logits
    for where in ("cpu", "auto") if not torch.cuda.is_available() else ("cpu",):
        assert_same_bits(load(folder, device_map=where)(ids).logits, expected)
    with pytest.raises(UnsupportedError, match=r"on the disk.*\(offloading\)"):
        load(folder, device_map={"model.embed_tokens": "disk", "": "cpu"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moves_to_a_gpu(folder: Path) -> None:
    ids = tokens(batch=1)
    model = load(folder, quantization_config=AnyFP4Config(numerics="blackwell"))
    state = {name: layer.stored() for name, layer in layers_of(model).items()}
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    moved = model.to("cuda")
    for name, layer in layers_of(moved).items():
        assert layer.device.type == "cuda"
        for suffix, tensor in layer.stored().items():
            assert_same_bits(tensor.cpu(), state[name][suffix], f"{name}.{suffix}")
    assert torch.isfinite(moved(ids.cuda()).logits).all()
    straight = load(folder, device_map="cuda:0", quantization_config=AnyFP4Config(numerics="blackwell"))
    assert_same_bits(straight.model.layers[0].mlp.up_proj(x.cuda()), moved.model.layers[0].mlp.up_proj(x.cuda()))


def test_says_which_release_of_transformers_it_cannot_extend() -> None:
    code = (
        "import transformers.quantizers.auto as auto; del auto.AutoHfQuantizer.merge_quantization_configs\n"
        "try: import anyfp4.integrations.transformers\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert "UnsupportedError transformers 5." in ran.stdout and "merge_quantization_configs" in ran.stdout
