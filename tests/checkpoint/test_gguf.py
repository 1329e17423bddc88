from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from anyfp4.checkpoint import gguf as gguf_source
from anyfp4.checkpoint.gguf import GGUFModel, gguf_to_folder
from anyfp4.checkpoint.gguf_config import llama3_scaling
from anyfp4.checkpoint.gguf_file import read_gguf_file
from anyfp4.errors import AnyFP4Error, CheckpointConfigError, CheckpointFileError, TensorError, UnsupportedError
from anyfp4.testing.bitwise import assert_same_bits
from tests.checkpoint.gguf_files import (
    SMALL,
    metadata_of,
    model_file,
    permuted,
    small_model,
    tensors_of,
    write_gguf,
)

ARCHITECTURES = ("llama", "qwen2", "qwen3")


def saved_like(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = {name: t.detach().bfloat16() for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gives_back_the_model(tmp_path: Path, architecture: str, tied: bool) -> None:
    overrides: dict[str, Any] = {"tie_word_embeddings": tied}
    if architecture == "llama" and tied:
        overrides["attention_bias"] = True
    original = small_model(architecture, **overrides)
    model = GGUFModel(model_file(tmp_path / "m.gguf", original))
    expected = saved_like(original)
    assert set(model.names) == set(expected)
    for name in model.names:
        assert_same_bits(model.tensor(name), expected[name], name)
        assert model.shape(name) == expected[name].shape


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_agrees_with_transformers_reading_the_gguf(tmp_path: Path, architecture: str) -> None:
    original = small_model(architecture, rms_norm_eps=1e-6)
    file = model_file(tmp_path / "m.gguf", original, metadata={"vocab_size": 320}, kind=lambda *_: Type.Q8_0)
    theirs = load_gguf_checkpoint(file, return_tensors=True, model_to_load=original, torch_dtype=torch.bfloat16)
    gguf_to_folder(file, tmp_path / "out", max_shard_bytes=50_000)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert len(theirs["tensors"]) == len(GGUFModel(file).names)
    for name, tensor in theirs["tensors"].items():
        assert_same_bits(ours.state_dict()[name], tensor, name)
    for field, value in theirs["config"].items():
        if field not in ("rms_norm_eps", "rope_theta", "_model_name_or_path", "rope_parameters"):
            assert getattr(ours.config, field) == value, field
    assert ours.config.rms_norm_eps == 1e-6
    assert ours.config.rope_parameters == {"rope_theta": 50000.0, "rope_type": "default"}


def test_permutation_is_llama_only_and_its_own_inverse_is_not_it() -> None:
    rows = np.arange(16, dtype=np.float32)
    # by hand: heads of 8 rows, pairs (0, 4), (1, 5), (2, 6), (3, 7) side by side
    assert permuted(rows, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    back = gguf_source._unpermute(torch.from_numpy(permuted(rows, 2)), 2)
    assert back.tolist() == rows.tolist()


def dequantized(data: np.ndarray, kind: Type) -> np.ndarray:
    """Blocks of 32, from the ggml sources' description: d, m in fp16; low nibbles are the first half."""
    raw = gguf.quants.quantize(data, kind).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    d = raw[:, 0:2].copy().view(np.float16).astype(np.float32)
    if kind is Type.Q8_0:
        return (d * raw[:, 2:].view(np.int8)).reshape(data.shape)
    offset = 4 if kind is Type.Q4_1 else 2
    nibbles = np.concatenate([raw[:, offset:] & 15, raw[:, offset:] >> 4], axis=1).astype(np.float32)
    if kind is Type.Q4_0:
        return (d * (nibbles - 8)).reshape(data.shape)
    m = raw[:, 2:4].copy().view(np.float16).astype(np.float32)
    return (d * nibbles + m).reshape(data.shape)


@pytest.mark.parametrize("chunk", [1, 200, 1 << 20])
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0])
def test_block_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Type, chunk: int) -> None:
    monkeypatch.setattr(gguf_source, "CHUNK_ELEMENTS", chunk)
    original = small_model("qwen2")
    model = GGUFModel(model_file(tmp_path / "m.gguf", original, kind=lambda *_: kind))
    for gguf_name, name in (("blk.1.attn_q", "self_attn.q_proj"), ("blk.1.ffn_down", "mlp.down_proj")):
        expected = dequantized(tensors_of(original)[f"{gguf_name}.weight"], kind)
        assert_same_bits(model.tensor(f"model.layers.1.{name}.weight"), torch.from_numpy(expected).bfloat16(), name)


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16])
def test_float_types(tmp_path: Path, kind: Type) -> None:
    original = small_model("llama")
    model = GGUFModel(model_file(tmp_path / "m.gguf", original, kind=lambda *_: kind))
    for name, tensor in saved_like(original).items():
        # small numbers lose bits in fp16
        expected = tensor.half().bfloat16() if kind is Type.F16 and tensor.dim() == 2 else tensor
        assert_same_bits(model.tensor(name), expected, name)


def test_k_quants(tmp_path: Path) -> None:
    """Types that the package reads but does not write: random blocks, against the package's own reader."""
    original = small_model("qwen2", hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (256, 210), dtype=np.uint8)  # Q6_K: 256 elements in 210 bytes
    raw[:, -2:] = np.float16(0.01).view(np.uint16).tobytes()[0], np.float16(0.01).view(np.uint16).tobytes()[1]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    for key, value in metadata_of(original).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"qwen2.{key}", value)
    for name, data in tensors_of(original).items():
        if name == "blk.0.ffn_up.weight":
            writer.add_tensor(name, raw, raw_dtype=Type.Q6_K)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFModel(tmp_path / "m.gguf").tensor("model.layers.0.mlp.up_proj.weight")
    assert_same_bits(found, torch.from_numpy(gguf.quants.dequantize(raw, Type.Q6_K)).bfloat16())


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize(("theta", "head_dim"), [(500000.0, 128), (500000.0, 64), (50000.0, 32)])
def test_llama3_rope_is_found_again(theta: float, head_dim: int, factor: float) -> None:
    parameters = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = AutoConfig.for_model("llama", head_dim=head_dim, rope_parameters={**parameters, "rope_theta": theta})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    divisors = plain / scaled
    if divisors.max() < factor * 0.999:  # no frequency is low enough to be divided in full: nothing tells the factor
        assert llama3_scaling(divisors, theta, head_dim) is None
        return
    found = llama3_scaling(divisors.round(decimals=5), theta, head_dim)
    assert found is not None
    assert found == {**parameters, "factor": pytest.approx(factor, rel=1e-5)}
    assert llama3_scaling(divisors * torch.linspace(1, 1.01, len(divisors)), theta, head_dim) is None


def test_rope_scaling_in_the_config(tmp_path: Path) -> None:
    model = small_model("llama", head_dim=64)
    tensors = tensors_of(model)
    wavelength = 2 * np.pi * 50000.0 ** (np.arange(32) / 32)
    ramp = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    tensors["rope_freqs.weight"] = (1 / ((1 - ramp) / 8 + ramp)).astype(np.float32)
    file = write_gguf(tmp_path / "a.gguf", "llama", metadata_of(model), tensors)
    config = GGUFModel(file).config
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_scaling"]["factor"] == pytest.approx(8.0)
    assert config["rope_parameters"] == {"rope_theta": 50000.0, **config["rope_scaling"]}
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 32, dtype=np.float32)
    file = write_gguf(tmp_path / "b.gguf", "llama", metadata_of(model), tensors)
    with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight"):
        GGUFModel(file)


def test_yarn_in_the_config(tmp_path: Path) -> None:
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 128,
        "rope.scaling.finetuned": True,
    }
    config = GGUFModel(model_file(tmp_path / "m.gguf", small_model("qwen3"), metadata=yarn)).config
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def test_config_is_what_the_model_was_made_of(tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    config = GGUFModel(model_file(tmp_path / "m.gguf", small_model("qwen3"), extra=extra)).config
    for field, value in SMALL.items():
        assert config[field] == value, field
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["dtype"] == "bfloat16"


def without(key: str) -> dict[str, Any]:
    return {"drop": key}


MODEL = "Llama"
REFUSED: dict[str, tuple[dict[str, Any], type[AnyFP4Error], str]] = {
    "experts": ({"metadata": {"expert_count": 8}}, UnsupportedError, r"llama.expert_count = 8 is not supported"),
    "unknown key": (
        {"metadata": {"attention.sliding_window": 4096}},
        UnsupportedError,
        r"llama.attention.sliding_window = 4096 is not supported",
    ),
    "partial rotary": ({"metadata": {"rope.dimension_count": 16}}, UnsupportedError, "rope.dimension_count is 16"),
    "longrope": (
        {"metadata": {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}},
        UnsupportedError,
        "longrope",
    ),
    "attn_factor": (
        {"metadata": {"rope.scaling.type": "yarn", "rope.scaling.attn_factor": 2.0}},
        UnsupportedError,
        "attn_factor",
    ),
    "per-layer heads": (
        {"metadata": {"attention.head_count_kv": [2, 1]}},
        UnsupportedError,
        "attention.head_count_kv differs between layers",
    ),
    "zero layers": ({"metadata": {"block_count": 0}}, CheckpointConfigError, "block_count must be a positive integer"),
    "negative eps": (
        {"metadata": {"attention.layer_norm_rms_epsilon": -1.0}},
        CheckpointConfigError,
        "layer_norm_rms_epsilon must be a positive number",
    ),
    "missing key": (without("context_length"), CheckpointConfigError, "llama.context_length is missing"),
    "missing tensor": (without("blk.1.ffn_up.weight"), TensorError, "model.layers.1.mlp.up_proj.weight: missing"),
    "missing embedding": (without("token_embd.weight"), CheckpointConfigError, "no tensor token_embd.weight"),
    "wrong shape": (
        {"metadata": {"feed_forward_length": 128}},
        TensorError,
        r"has shape \[96, 64\], must be \[128, 64\]",
    ),
    "extra layer": ({"metadata": {"block_count": 1}}, UnsupportedError, "blk.1.*no tensor of a llama model"),
    "extra tensor": ({"tensor": "blk.0.attn_sinks.weight"}, UnsupportedError, "attn_sinks"),
    "bias in part": ({"tensor": "blk.0.attn_v.bias"}, UnsupportedError, "blk.0.attn_v.bias"),
    "split": ({"extra": {"split.count": 3}}, UnsupportedError, "one of 3 parts"),
    "architecture": (
        {"architecture": "gemma3"},
        UnsupportedError,
        "'gemma3' is not supported; supported: llama, qwen2",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda name: name.replace(" ", "-"))
def test_refuses(tmp_path: Path, case: str) -> None:
    change, error, message = REFUSED[case]
    model = small_model("llama")
    metadata = {**metadata_of(model), **change.get("metadata", {})}
    tensors = tensors_of(model)
    metadata.pop(change.get("drop", ""), None)
    tensors.pop(change.get("drop", ""), None)
    if "tensor" in change:
        tensors[change["tensor"]] = np.zeros(64, dtype=np.float32)
    file = write_gguf(
        tmp_path / "m.gguf", change.get("architecture", "llama"), metadata, tensors, extra=change.get("extra")
    )
    with pytest.raises(error, match=message) as caught:
        GGUFModel(file)
    assert str(file) in str(caught.value)


def test_refuses_a_truncated_file_at_every_length(tmp_path: Path) -> None:
    whole = model_file(tmp_path / "m.gguf", small_model("llama", num_hidden_layers=1)).read_bytes()
    head = read_gguf_file(tmp_path / "m.gguf")
    data_begins = min(t.offset for t in head.tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 23, 24, 40, *range(100, data_begins, 131), data_begins, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointFileError):
            GGUFModel(cut)


def test_refuses_what_is_not_gguf(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    with pytest.raises(CheckpointFileError, match="no such file"):
        read_gguf_file(file)
    file.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointFileError, match="does not start with 'GGUF'"):
        read_gguf_file(file)
    for version in (1, 4, 3 << 24):  # the last one is version 3 in the other byte order
        file.write_bytes(b"GGUF" + struct.pack("<I", version) + bytes(100))
        with pytest.raises(UnsupportedError, match="GGUF version"):
            read_gguf_file(file)


def test_huge_counts_do_not_allocate(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    for head in (
        struct.pack("<IQQ", 3, 1 << 60, 0),  # tensors
        struct.pack("<IQQ", 3, 0, 1 << 60),  # metadata
        struct.pack("<IQQQ", 3, 0, 1, 1 << 60),  # a string's length
        struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 1 << 60),  # an array's length
    ):
        file.write_bytes(b"GGUF" + head + bytes(40))
        with pytest.raises(CheckpointFileError):
            read_gguf_file(file)


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = model_file(tmp_path / "m.gguf", small_model("llama"))
    seen = []

    def fail(model: GGUFModel, name: str) -> torch.Tensor:
        seen.append(name)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return torch.zeros(1)

    monkeypatch.setattr(GGUFModel, "tensor", fail)
    with pytest.raises(KeyboardInterrupt):
        gguf_to_folder(file, tmp_path / "out", max_shard_bytes=4)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_metadata_agree_with_the_package_reader(tmp_path: Path) -> None:
    file = model_file(tmp_path / "m.gguf", small_model("llama"), extra={"a.list": [1.5, 2.5], "a.flag": True, "s": "ü"})
    ours = read_gguf_file(file)
    theirs = gguf.GGUFReader(file)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.metadata[name] == field.contents(), name
    assert json.dumps(ours.metadata["a.list"]) == "[1.5, 2.5]"
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].offset == tensor.data_offset
        assert ours.tensors[tensor.name].shape == tuple(int(n) for n in tensor.shape[::-1])
