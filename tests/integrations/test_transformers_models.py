"""Every architecture of the table in docs/integrations.md: quantized, saved, loaded, and computed a second time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anyfp4.testing.bitwise import assert_same_bits
from tests.integrations.hf_models import ARCHITECTURES, IGNORE, VOCAB, reference_model, tokens, write_model


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_same_logits_as_an_independent_computation(model_type: str, tmp_path: Path) -> None:
    """Bit for bit: torch's ops around the linear layers are the same ones, and these are exact on both sides."""
    from transformers import AutoModelForCausalLM

    from anyfp4.integrations.transformers import AnyFP4Config, QuantizedLinear, calibrate

    write_model(model_type, tmp_path / "dense")
    config = AnyFP4Config(ignore=IGNORE.get(model_type, []))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    layers = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) >= 8
    assert set(calibrate(model, [tokens(1)])) == set(layers)
    for layout in ("compressed-tensors", "modelopt"):
        model.config.quantization_config.layout = layout
        model.save_pretrained(tmp_path / layout)
    del model

    ids = tokens(2)
    stored = load_file(tmp_path / "compressed-tensors" / "model.safetensors")
    with torch.no_grad():
        expected = reference_model(tmp_path / "dense", stored)(ids).logits
    assert expected.shape == (*ids.shape, VOCAB)
    for layout in ("compressed-tensors", "modelopt"):
        blackwell = AnyFP4Config(numerics="blackwell")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / layout, dtype=torch.float32, quantization_config=blackwell
        )
        assert [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)] == layers
        assert_same_bits(model(ids).logits, expected, layout)
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, ids.shape[1] + 3)
    assert torch.equal(generated[:, : ids.shape[1]], ids)
