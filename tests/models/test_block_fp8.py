"""Whole models with block-wise FP8 layers, in both layouts: against transformers, and backend against backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyfp4.checkpoint import compressed_tensors, emit, modelopt
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.checkpoint.scheme import DENSE
from anyfp4.formats import quantize
from anyfp4.formats.weights import FP8Weight, LinearWeight, NVFP4Weight, fp8_grid
from anyfp4.models.decoder import Decoder
from anyfp4.models.loader import load_decoder
from anyfp4.testing.bitwise import assert_same_bits
from anyfp4.testing.models import all_logits

TOKENS = torch.randint(3, 97, (40,), generator=torch.Generator().manual_seed(0)).tolist()
#: q, k and v of 256, 128 and 128 rows end with whole blocks; those of 192, 64 and 64 do not
LINING_UP = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
NOT_LINING_UP = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1}


def make(sizes: dict[str, int]) -> Any:
    import transformers

    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        **sizes,
        head_dim=64,
        intermediate_size=320,
        num_hidden_layers=2,
        vocab_size=97,
        max_position_embeddings=128,
        architectures=["LlamaForCausalLM"],
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    return model


def in_blocks(w: torch.Tensor, weight_only: bool) -> FP8Weight:
    """amax / 448 of each block, and the nearest codes."""
    rows, columns = (torch.arange(size) // 128 for size in w.shape)
    scale = torch.empty(fp8_grid(*w.shape))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            scale[i, j] = w[rows == i][:, columns == j].abs().max() / 448
    return FP8Weight((w / scale[rows][:, columns]).to(torch.float8_e4m3fn), scale, None, None, weight_only)


def write(model: Any, folder: Path, layout: str, weight_only: bool, nvfp4_mlp: bool) -> Path:
    """The model in block-wise FP8, its MLPs in NVFP4 if asked for."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    module, schemes = (modelopt if layout == "modelopt" else compressed_tensors), {"lm_head": DENSE}
    for name in [n for n in tensors if "_proj.weight" in n]:
        w, projection = tensors.pop(name).float(), name.removesuffix(".weight")
        weight: LinearWeight = in_blocks(w, weight_only)
        if nvfp4_mlp and ".mlp." in name:
            weight = NVFP4Weight(quantize(w), torch.tensor([2.0**-9]))
        schemes[projection] = emit.scheme_of_weight(weight)
        tensors |= module.tensors(projection, weight)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = module.quantization_config(schemes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, backend: str, dtype: torch.dtype) -> Decoder:
    with Checkpoint(folder) as checkpoint:
        return load_decoder(checkpoint, device=torch.device("cpu"), dtype=dtype, backend=backend)


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("sizes", [LINING_UP, NOT_LINING_UP], ids=["lining up", "not lining up"])
def test_weight_only_against_transformers(layout: str, sizes: dict[str, int], tmp_path: Path) -> None:
    model = make(sizes)
    decoder = load(write(model, tmp_path, layout, weight_only=True, nvfp4_mlp=False), "auto", torch.float32)
    with torch.no_grad():
        for name, linear in model.named_modules():
            if name.endswith("_proj"):
                w = in_blocks(linear.weight, True)
                rows, columns = (torch.arange(size) // 128 for size in w.shape)
                linear.weight.copy_(w.weight.float() * w.weight_scale[rows][:, columns])
        theirs = model(torch.tensor([TOKENS])).logits[0].double()
        truth = model.double()(torch.tensor([TOKENS])).logits[0]
    # as in test_against_transformers: no further from float64 than transformers' own float32 run, with a factor of two
    scale = truth.abs().max()
    got = all_logits(decoder, TOKENS).double()
    our_error, their_error = ((x - truth).abs().max() / scale for x in (got, theirs))
    assert our_error <= max(2 * their_error, 3e-7), f"ours {our_error:.2e}, transformers {their_error:.2e}"


@pytest.mark.parametrize("sizes", [LINING_UP, NOT_LINING_UP], ids=["lining up", "not lining up"])
@pytest.mark.parametrize(("layout", "weight_only"), [("compressed-tensors", False), ("modelopt", True)])
def test_beside_nvfp4(sizes: dict[str, int], layout: str, weight_only: bool, tmp_path: Path) -> None:
    folder = write(make(sizes), tmp_path, layout, weight_only, nvfp4_mlp=True)
    decoder = load(folder, "auto", torch.bfloat16)
    assert len(decoder.blocks[0].attention.qkv.parts) == (1 if sizes is LINING_UP else 3)
    expected = all_logits(load(folder, "reference", torch.bfloat16), TOKENS)
    assert_same_bits(all_logits(decoder, TOKENS), expected, "one step")
    assert_same_bits(all_logits(decoder, TOKENS, chunks=[17, 1, 1, 21]), expected, "four steps")
