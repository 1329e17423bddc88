"""Writing and reading again gives the same bits; names, dtypes, shapes and configuration are the producers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyfp4.checkpoint import compressed_tensors, emit, modelopt
from anyfp4.checkpoint.layout import Suffixes
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.checkpoint.scheme import DENSE
from anyfp4.errors import InvalidArgumentError, UnsupportedError
from anyfp4.formats.nvfp4 import NVFP4Tensor
from anyfp4.formats.weights import DenseWeight, FP8Weight, LinearWeight, NVFP4Weight, fp8_grid
from anyfp4.testing.bitwise import assert_same_bits
from tests.checkpoint.small import MODEL_CONFIG, block_scales
from tests.checkpoints import FULL, VARIANTS, real_checkpoint

N, K = 24, 48
MODULE = "model.layers.0.mlp.up_proj"
LAYOUTS = {"compressed-tensors": compressed_tensors, "modelopt": modelopt}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def nvfp4(weight_only: bool = False, bias: bool = False, awq: bool = False, scale: float = 0.0009765625) -> NVFP4Weight:
    g = generator()
    packed = torch.randint(0, 256, (N, K // 2), generator=g, dtype=torch.uint8)
    weight = NVFP4Tensor(packed, block_scales(N, K, g), torch.tensor([scale]))
    return NVFP4Weight(
        weight,
        None if weight_only else torch.tensor([4 * scale]),
        torch.rand(K, generator=g).to(torch.bfloat16) if awq else None,
        torch.randn(N, generator=g).to(torch.bfloat16) if bias else None,
    )


def fp8(rows: bool, inputs: str = "static", bias: bool = False) -> FP8Weight:
    g = generator()
    weight = torch.randn(N, K, generator=g).to(torch.float8_e4m3fn)
    return FP8Weight(
        weight,
        torch.rand(N if rows else 1, generator=g) + 0.1,
        torch.rand(1, generator=g) + 0.1 if inputs == "static" else None,
        torch.randn(N, generator=g) if bias else None,
        inputs == "weight-only",
    )


def fp8_blocks(n: int, k: int, weight_only: bool, bias: bool = False) -> FP8Weight:
    g = generator()
    weight = torch.randn(n, k, generator=g).to(torch.float8_e4m3fn)
    grid = torch.rand(*fp8_grid(n, k), generator=g) + 0.1
    return FP8Weight(weight, grid, None, torch.randn(n, generator=g) if bias else None, weight_only)


WEIGHTS: dict[str, LinearWeight] = {
    "W4A4": nvfp4(),
    "W4A4 with bias": nvfp4(bias=True),
    "weight-only": nvfp4(weight_only=True),
    "AWQ": nvfp4(awq=True),
    "FP8": fp8(rows=False),
    "FP8 rows, dynamic": fp8(rows=True, inputs="dynamic", bias=True),
    "FP8 weight-only": fp8(rows=False, inputs="weight-only"),
    "FP8 blocks": fp8_blocks(300, 200, weight_only=False),
    "FP8 blocks, weight-only": fp8_blocks(300, 200, weight_only=True, bias=True),
    "FP8, one block": fp8_blocks(N, K, weight_only=True),
    "dense": DenseWeight(torch.randn(N, K, generator=generator()).to(torch.bfloat16), torch.zeros(N)),
}
#: ModelOpt has no name for them
NOT_MODELOPT = ("FP8 weight-only", "FP8 blocks")


def fields(weight: LinearWeight) -> dict[str, Tensor]:
    """All tensors of a weight."""
    flat = dict(vars(weight))
    if isinstance(weight, NVFP4Weight):
        flat |= {f"weight.{name}": value for name, value in vars(flat.pop("weight")).items()}
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}


def assert_same_weight(actual: LinearWeight, expected: LinearWeight) -> None:
    assert type(actual) is type(expected)
    assert fields(actual).keys() == fields(expected).keys()
    for name, tensor in fields(expected).items():
        assert_same_bits(fields(actual)[name], tensor, name)


def write(folder: Path, layout: str, weight: LinearWeight) -> Path:
    """A checkpoint of this one module and a quantized companion."""
    module = LAYOUTS[layout]
    companion = nvfp4()
    schemes = {MODULE: emit.scheme_of_weight(weight), "other": emit.scheme_of_weight(companion), "lm_head": DENSE}
    tensors = module.tensors(MODULE, weight) | module.tensors("other", companion)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = MODEL_CONFIG | {"quantization_config": module.quantization_config(schemes)}
    (folder / "config.json").write_text(json.dumps(config))
    if layout == "modelopt":
        (folder / "hf_quant_config.json").write_text(json.dumps(modelopt.hf_quant_config(schemes)))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_round_trip(layout: str, name: str, tmp_path: Path) -> None:
    weight = WEIGHTS[name]
    if layout == "compressed-tensors" and name == "AWQ":
        with pytest.raises(UnsupportedError, match=rf"{MODULE} has a pre_quant_scale, for which compressed-tensors"):
            compressed_tensors.tensors(MODULE, weight)
        return
    if layout == "modelopt" and name in NOT_MODELOPT:
        with pytest.raises(UnsupportedError, match="the modelopt layout has no name for Scheme"):
            write(tmp_path, layout, weight)
        return
    with Checkpoint(write(tmp_path, layout, weight)) as checkpoint:
        read = checkpoint.linear(MODULE, weight.shape)
        assert_same_weight(read, weight)
        assert emit.scheme_of_weight(read) == emit.scheme_of_weight(weight)


def test_block_scales_are_written_as_the_producers_do() -> None:
    weight = WEIGHTS["FP8 blocks, weight-only"]
    for module, shape in ((compressed_tensors, [3, 2]), (modelopt, [3, 1, 2, 1])):
        written = module.tensors(MODULE, weight)
        assert written.keys() == {f"{MODULE}.{suffix}" for suffix in ("weight", "weight_scale", "bias")}
        assert list(written[f"{MODULE}.weight_scale"].shape) == shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_weights_are_not_written(layout: str) -> None:
    one = nvfp4().weight
    fused = NVFP4Tensor(one.packed, one.block_scale, torch.ones(2), (8, 16))
    with pytest.raises(InvalidArgumentError, match=f"{MODULE} is 2 projections fused into one"):
        LAYOUTS[layout].tensors(MODULE, NVFP4Weight(fused))


def test_divisor_is_the_best_there_is() -> None:
    """Compared with every divisor within three units in the last place, divided by numpy."""
    g = generator()
    m = torch.exp2(torch.rand(100_000, generator=g) * 60 - 30) * (1 + torch.rand(100_000, generator=g))
    near = np.float32(1) / m.numpy()
    candidates = (near.view(np.int32)[None] + np.arange(-3, 4, dtype=np.int32)[:, None]).view(np.float32)
    best = np.abs(np.float32(1) / candidates - m.numpy()).min(axis=0)
    error = np.abs(np.float32(1) / emit.divisor(m).numpy() - m.numpy())
    assert np.array_equal(error, best)
    assert (error <= np.spacing(m.numpy())).all()  # so at most one unit in the last place
    share = float((error > 0).mean())
    # ∫ (1 − 2/m²) over significands m from √2 to 2 is 0.17 for equally likely m, 0.14 for equally likely log m
    assert 0.12 < share < 0.19, share


def test_storable_global_scale_comes_back() -> None:
    m = torch.rand(100_000, generator=generator()) + 1e-6
    stored = compressed_tensors.storable_global_scale(m)
    assert_same_bits(compressed_tensors.storable_global_scale(stored), stored)
    assert_same_bits(1 / emit.divisor(stored), stored)


def raw_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.checkpoint
@pytest.mark.parametrize("name", [*FULL, *VARIANTS])
def test_same_as_the_real_export(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Reading a real export and writing it again gives its tensors and its configuration."""
    folder = real_checkpoint(name, tmp_path_factory)
    raw = raw_tensors(folder)
    with Checkpoint(folder) as checkpoint:
        layout = LAYOUTS[checkpoint.quantization.layout]
        schemes = {module: checkpoint.scheme_of(module) for module in checkpoint.linear_modules()}
        for module in [m for m in schemes if ".layers.0." in m or ".layers.29." in m]:
            written = layout.tensors(module, checkpoint.linear(module))
            kv = ("k_scale", "v_scale")
            assert written.keys() == {n for n in raw if n.startswith(f"{module}.") and not n.endswith(kv)}
            for tensor, value in written.items():
                assert (value.dtype, value.shape) == (raw[tensor].dtype, raw[tensor].shape), tensor
                if layout is compressed_tensors and tensor.endswith("global_scale"):
                    # of the divisors that give one multiplier, another one may be chosen; the multiplier is the same
                    assert_same_bits(1 / value, 1 / raw[tensor], tensor)
                else:
                    assert_same_bits(value, raw[tensor], tensor)
        quantization, config, kv_cache = checkpoint.quantization, checkpoint.config, checkpoint.quantization.kv_cache
    schemes["lm_head"] = DENSE
    if layout is modelopt:
        schemes["model.embed_tokens"] = DENSE
    real: dict[str, Any] = config["quantization_config"]
    ours = layout.quantization_config(schemes, kv_cache)
    assert ours.keys() == real.keys()
    excluded_by_glob = {"ignore": real["ignore"]} if "mlponly" in name else {}
    producer = {"producer": real["producer"]} if layout is modelopt else {}
    assert ours | producer | excluded_by_glob == real
    if layout is modelopt:
        real = json.loads((folder / "hf_quant_config.json").read_text())
        ours = modelopt.hf_quant_config(schemes, kv_cache)
        assert ours.keys() == real.keys()
        if excluded_by_glob:
            ours["quantization"]["exclude_modules"] = real["quantization"]["exclude_modules"]
        assert ours["quantization"] == real["quantization"]
        assert ours["producer"].keys() == real["producer"].keys()
    assert quantization.groups


def test_layout_names_differ() -> None:
    """The same suffix means different things: guards against mixing the tables up."""
    ct: Suffixes = compressed_tensors.NAMES
    mo: Suffixes = modelopt.NAMES
    assert (ct.divisors, mo.divisors) == (True, False)
    assert (ct.packed, mo.packed) == ("weight_packed", "weight")
