"""Damaged and unusual checkpoints inside transformers: the reader's errors, FP8 layers, FP8 caches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.errors import TensorError, UnsupportedError
from anyfp4.integrations.transformers import AnyFP4Config
from anyfp4.layers.linear import Linear
from anyfp4.testing.bitwise import assert_same_bits
from tests.checkpoint.damage import modelopt_config, tensors
from tests.checkpoint.damage.case import CT, MO, Case
from tests.checkpoint.small import (
    HIDDEN,
    INTER,
    UP,
    ct_config,
    ct_fp8_group,
    ct_group,
    fp8_tensors,
    put,
    small,
    with_kv_scales,
)
from tests.integrations.test_transformers import layers_of, load


def fits_a_model(folder: Path) -> Path:
    """What ``tests.checkpoint.small`` leaves out of config.json, so that the model has the shapes of its tensors."""
    file = folder / "config.json"
    more = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return folder


#: values of scales that nobody reads here, since the cache stays dense
_UNREAD = ("NaN k_scale", "zero v_scale")
SAME_ERRORS = [case for case in (*tensors.CASES, *modelopt_config.CASES) if case.name not in _UNREAD]


@pytest.mark.parametrize("case", SAME_ERRORS, ids=lambda case: f"{case.layout}: {case.name}")
def test_damage_gives_the_readers_errors(case: Case, tmp_path: Path) -> None:
    damaged = fits_a_model(case.write(tmp_path / "model"))
    with pytest.raises(case.error, match=case.match) as raised:
        load(damaged, quantization_config=AnyFP4Config(kv_cache="dense"))
    assert type(raised.value) is case.error


@pytest.mark.parametrize("layout", [CT, MO])
def test_a_layer_without_tensors_is_not_filled_at_random(layout: str, tmp_path: Path) -> None:
    made = small(layout)
    made.drop(UP)
    with pytest.raises(TensorError, match=rf"{UP}.weight: is missing \(NVFP4 W4A4"):
        load(fits_a_model(made.write(tmp_path)))


def test_a_layer_that_the_model_has_not(tmp_path: Path) -> None:
    made = small(CT)
    made.tensors |= {n.replace(UP, "model.layers.1.mlp.up_proj"): t.clone() for n, t in made.tensors.items() if UP in n}
    with pytest.raises(TensorError, match=r"model.layers.1.mlp.up_proj: is NVFP4 W4A4, but a LlamaForCausalLM has no"):
        load(fits_a_model(made.write(tmp_path)))


def test_shape_and_bias_must_fit_the_model(tmp_path: Path) -> None:
    folder = fits_a_model(small(CT).write(tmp_path / "shape"))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_key_value_heads": 2}))
    with pytest.raises(TensorError, match=r"k_proj.weight_packed: has shape \[16, 32\], but the model's .* \[32, 32\]"):
        load(folder)
    made = small(CT)
    made.tensors[f"{UP}.bias"] = torch.zeros(INTER, dtype=torch.bfloat16)
    with pytest.raises(TensorError, match=rf"{UP}.bias: is not expected"):
        load(fits_a_model(made.write(tmp_path / "bias")))


def test_fp8_layers_beside_nvfp4_ones(tmp_path: Path) -> None:
    made = small(CT)
    made.quantization_config = ct_config(ct_group(), ct_fp8_group("channel", True, targets=["re:.*up_proj"]))
    scale = torch.rand(INTER, 1, generator=torch.Generator().manual_seed(0)) / 100 + 0.001
    put(made, UP, fp8_tensors(INTER, HIDDEN, 3, scale.to(torch.bfloat16), None))
    folder = fits_a_model(made.write(tmp_path / "in"))
    model = load(folder)
    layer = layers_of(model)[UP]
    assert layer.scheme.label == "FP8 dynamic"
    x = torch.randn(5, HIDDEN, dtype=torch.bfloat16)
    with Checkpoint(folder) as checkpoint:
        assert_same_bits(layer(x), Linear([checkpoint.linear(UP)])(x))
    model.save_pretrained(tmp_path / "out")
    with Checkpoint(folder) as before, Checkpoint(tmp_path / "out") as after:
        assert before.scheme_of(UP) == after.scheme_of(UP)
        for name in before.names:
            assert_same_bits(after._reader.read(name), before._reader.read(name), name)


@pytest.mark.parametrize("layout", [CT, MO])
def test_fp8_cache_needs_a_word(layout: str, tmp_path: Path) -> None:
    folder = fits_a_model(with_kv_scales(small(layout)).write(tmp_path))
    with pytest.raises(UnsupportedError, match=r"KV cache in FP8.*AnyFP4Config\(kv_cache='dense'\)"):
        load(folder)
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=AnyFP4Config(kv_cache="dense"), output_loading_info=True
    )
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert len(layers_of(model)) == 7
