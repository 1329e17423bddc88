"""Saving in both layouts, quantizing on the fly, calibrating: what is written is what others read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.errors import InvalidArgumentError, TensorError, UnsupportedError
from anyfp4.formats import nvfp4
from anyfp4.formats.weights import NVFP4Weight
from anyfp4.integrations.transformers import AnyFP4Config, calibrate
from anyfp4.models.loader import load_decoder
from anyfp4.testing.bitwise import assert_same_bits
from anyfp4.testing.models import all_logits
from anyfp4.tools.quantize import quantize_checkpoint
from tests.integrations.hf_models import tokens, write_model
from tests.integrations.test_transformers import layers_of, load

LAYOUTS = ("compressed-tensors", "modelopt")


@pytest.fixture(scope="module")
def quantized(dense_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model W4A4 in both layouts, written by ``anyfp4 quantize``."""
    root = tmp_path_factory.mktemp("quantized")
    return {layout: quantize_checkpoint(dense_model, root / layout, layout=layout).out for layout in LAYOUTS}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors; a head tied to the embedding may be stored or not."""
    stored: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    return stored


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(actual[name], tensor, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_as_it_was_loaded(layout: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    model = load(quantized[layout])
    model.save_pretrained(tmp_path / "one")
    assert_same_tensors(tensors_of(tmp_path / "one"), tensors_of(quantized[layout]))
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    assert_same_tensors(tensors_of(tmp_path / "shards"), tensors_of(quantized[layout]))
    with Checkpoint(quantized[layout]) as before, Checkpoint(tmp_path / "shards") as after:
        assert after.quantization.layout == layout
        assert after.linear_modules() == before.linear_modules()
        assert {after.scheme_of(m) for m in after.linear_modules()} == {before.scheme_of("model.layers.0.mlp.up_proj")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_in_the_other_layout(layout: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    other = next(one for one in LAYOUTS if one != layout)
    ids = tokens(batch=1)
    model = load(quantized[layout], quantization_config=AnyFP4Config(layout=other))
    model.save_pretrained(tmp_path / "other")
    with Checkpoint(tmp_path / "other") as written, Checkpoint(quantized[layout]) as source:
        assert written.quantization.layout == other
        for module in source.linear_modules():
            a, b = written.linear(module), source.linear(module)
            assert isinstance(a, NVFP4Weight) and isinstance(b, NVFP4Weight)
            assert_same_bits(a.weight.packed, b.weight.packed, module)
            assert_same_bits(a.weight.block_scale, b.weight.block_scale, module)
            assert_same_bits(a.weight.global_scale, b.weight.global_scale, module)
            # a divisor has no exact multiplier for about one in six: one unit in the last place
            assert torch.allclose(a.input_global_scale, b.input_global_scale, rtol=2**-22, atol=0)
    again = load(tmp_path / "other")
    if layout == "compressed-tensors":
        assert_same_bits(again(ids).logits, model(ids).logits)
    model.config.quantization_config.layout = layout
    model.save_pretrained(tmp_path / "back")
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(quantized[layout]))
    with Checkpoint(tmp_path / "other") as checkpoint:
        decoder = load_decoder(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.isfinite(all_logits(decoder, ids[0].tolist())).all()


def test_compressed_tensors_itself_reads_it(quantized: dict[str, Path], tmp_path: Path) -> None:
    """transformers' own quantizer, which an explicit ``CompressedTensorsConfig`` asks for."""
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    model = load(quantized["modelopt"], quantization_config=AnyFP4Config(layout="compressed-tensors"))
    model.save_pretrained(tmp_path)
    theirs = load(tmp_path, quantization_config=CompressedTensorsConfig(dequantize=False))
    assert type(theirs.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    state, stored = theirs.state_dict(), tensors_of(tmp_path)
    seen = 0
    for name, layer in layers_of(model).items():
        for suffix in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"):
            if f"{name}.{suffix}" in state:
                assert_same_bits(state[f"{name}.{suffix}"].data, stored[f"{name}.{suffix}"], f"{name}.{suffix}")
                seen += 1
        assert layer.scheme.kind == "nvfp4"
    assert seen == 4 * 14


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_the_fly_as_the_command_does(layout: Any, dense_model: Path, tmp_path: Path) -> None:
    expected = quantize_checkpoint(dense_model, tmp_path / "command", layout=layout, weight_only=True).out
    ids = tokens(batch=1)
    model = load(dense_model, quantization_config=AnyFP4Config(layout=layout))
    assert {layer.scheme.label for layer in layers_of(model).values()} == {"NVFP4 weight-only"}
    model.save_pretrained(tmp_path / "fly")
    assert_same_tensors(tensors_of(tmp_path / "fly"), tensors_of(expected))
    assert_same_bits(load(expected)(ids).logits, model(ids).logits)
    with Checkpoint(tmp_path / "fly") as checkpoint:
        assert len(checkpoint.linear_modules()) == 14


def test_calibrated_layers_are_w4a4(dense_model: Path, tmp_path: Path) -> None:
    model = load(dense_model, dtype=torch.float32, quantization_config=AnyFP4Config())
    batches = [tokens(1), {"input_ids": tokens(2, batch=1, length=5)}]
    seen: dict[str, float] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, x: seen.__setitem__(layer.name, max(seen.get(layer.name, 0.0), float(x[0].abs().max())))
        )
        for layer in layers_of(model).values()
    ]
    model(batches[0])
    model(**batches[1])
    for hook in hooks:
        hook.remove()
    found = calibrate(model, iter(batches))
    assert found == seen
    assert {layer.scheme.label for layer in layers_of(model).values()} == {"NVFP4 W4A4"}
    for name, layer in layers_of(model).items():
        scale = nvfp4.default_global_scale(torch.tensor(found[name])).reshape(1)
        weight = layer.to_weight()
        assert isinstance(weight, NVFP4Weight)
        assert torch.allclose(weight.input_global_scale, scale, rtol=2**-22, atol=0)
    ids = tokens(3)
    model.save_pretrained(tmp_path)
    assert_same_bits(load(tmp_path)(ids).logits, model(ids).logits)
    with pytest.raises(InvalidArgumentError, match="no weight-only NVFP4 layer"):
        calibrate(model, batches)


def test_what_cannot_be_calibrated(dense_model: Path) -> None:
    model = load(dense_model, quantization_config=AnyFP4Config(ignore=["model.layers.0.*"]))
    assert len(layers_of(model)) == 7
    with pytest.raises(InvalidArgumentError, match="no batch"):
        calibrate(model, [])
    with torch.no_grad():
        model.model.norm.weight.fill_(1)
        model.model.layers[1].input_layernorm.weight.zero_()
    with pytest.raises(TensorError, match=r"layers.1.self_attn.q_proj: .*zero throughout"):
        calibrate(model, [tokens()])
    with pytest.raises(UnsupportedError, match=r"weight_only=False\): W4A4 needs input scales.*calibrate"):
        load(dense_model, quantization_config=AnyFP4Config(weight_only=False))


def test_weight_only_although_there_are_input_scales(quantized: dict[str, Path], tmp_path: Path) -> None:
    model = load(quantized["modelopt"], quantization_config=AnyFP4Config(weight_only=True))
    assert {layer.scheme.label for layer in layers_of(model).values()} == {"NVFP4 weight-only"}
    model.save_pretrained(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.quantization.algorithm == "W4A16_NVFP4"
        assert not [name for name in checkpoint.names if name.endswith("input_scale")]
    with pytest.raises(UnsupportedError, match=r"weight_only=False\): layers of this checkpoint are weight-only"):
        load(tmp_path, quantization_config=AnyFP4Config(weight_only=False))


def test_ignored_layers_stay_dense_and_are_saved_so(dense_model: Path, tmp_path: Path) -> None:
    model = load(dense_model, quantization_config=AnyFP4Config(ignore=["*.down_proj", "re:.*layers.1.self_attn"]))
    names = set(layers_of(model))
    assert len(names) == 8 and "model.layers.0.mlp.up_proj" in names
    for layout in LAYOUTS:
        model.config.quantization_config.layout = layout
        model.save_pretrained(tmp_path / layout)
        with Checkpoint(tmp_path / layout) as checkpoint:
            assert set(checkpoint.linear_modules()) == names
        assert_same_bits(load(tmp_path / layout)(tokens()).logits, model(tokens()).logits)
    with pytest.raises(InvalidArgumentError, match=r"'model.layers.7.\*' matches no linear layer"):
        load(dense_model, quantization_config=AnyFP4Config(ignore=["model.layers.7.*"]))


@pytest.mark.parametrize(("value", "match"), [(torch.nan, "holds a NaN"), (None, r"o_proj.weight: is missing")])
def test_bad_weights_are_not_quantized(value: float | None, match: str, dense_model: Path, tmp_path: Path) -> None:
    stored = tensors_of(dense_model)
    if value is None:
        del stored["model.layers.1.self_attn.o_proj.weight"]
    else:
        stored["model.layers.1.self_attn.o_proj.weight"][3, 4] = value
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((dense_model / "config.json").read_text())
    with pytest.raises(TensorError, match=match):
        load(tmp_path, quantization_config=AnyFP4Config())


def test_experts_are_refused_or_left_dense(tmp_path: Path) -> None:
    write_model("mixtral", tmp_path / "dense", num_local_experts=2)
    with pytest.raises(UnsupportedError, match=r"mlp.experts is a \w+ with the matrices of several experts in one"):
        load(tmp_path / "dense", quantization_config=AnyFP4Config())
    model = load(tmp_path / "dense", quantization_config=AnyFP4Config(ignore=["*.experts"]))
    assert {name.rpartition(".")[2] for name in layers_of(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model.save_pretrained(tmp_path / "saved")
    assert_same_bits(load(tmp_path / "saved")(tokens()).logits, model(tokens()).logits)
    with Checkpoint(tmp_path / "saved") as checkpoint:
        assert len(checkpoint.linear_modules()) == 8


def test_quantized_experts_are_refused(tmp_path: Path) -> None:
    """As llm-compressor and ModelOpt store them: each expert's matrices by name."""
    write_model("mixtral", tmp_path / "dense", num_local_experts=2)
    model = load(tmp_path / "dense", quantization_config=AnyFP4Config(ignore=["*.experts"]))
    model.save_pretrained(tmp_path / "saved")
    stored = tensors_of(tmp_path / "saved")
    experts = [name for name in stored if ".experts." in name]
    assert experts
    for name in experts:
        module = name.removesuffix(".weight")
        weight = nvfp4.quantize(stored.pop(name))
        stored |= {f"{module}.weight_packed": weight.packed, f"{module}.weight_scale": weight.block_scale}
        stored[f"{module}.weight_global_scale"] = 1 / weight.global_scale
    save_file(stored, tmp_path / "saved" / "model.safetensors", {"format": "pt"})
    config = tmp_path / "saved" / "config.json"
    config.write_text(config.read_text().replace("experts", "xperts"))
    with pytest.raises(UnsupportedError, match=r"experts.0.w1 is quantized, but transformers joins or reshapes"):
        load(tmp_path / "saved")


def test_a_model_under_another_prefix(quantized: dict[str, Path], tmp_path: Path) -> None:
    """Without its head the model's modules have other names than the files."""
    from transformers import AutoModel

    bare = AutoModel.from_pretrained(quantized["compressed-tensors"])
    assert "layers.0.mlp.up_proj" in layers_of(bare)
    ids = tokens()
    whole = load(quantized["compressed-tensors"])
    assert_same_bits(bare(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    bare.save_pretrained(tmp_path)
    assert_same_bits(AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state, bare(ids).last_hidden_state)
