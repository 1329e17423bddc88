"""What the reader gives: the files' bits, multipliers, memory of its own, and not too much of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyfp4.checkpoint import layout as layouts
from anyfp4.checkpoint import tensor_reader
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.errors import CheckpointConfigError, CheckpointFileError, TensorError
from anyfp4.formats.weights import DenseWeight, FP8Weight, NVFP4Weight
from anyfp4.testing.bitwise import assert_same_bits
from tests.checkpoint.small import (
    ATTENTION,
    HIDDEN,
    INTER,
    LAYER,
    LINEARS,
    UP,
    VOCAB,
    Q,
    Small,
    ct_config,
    ct_fp8_block_group,
    ct_fp8_group,
    ct_group,
    dense_tensors,
    fp8_tensors,
    modelopt_configs,
    put,
    small,
    with_kv_scales,
)
from tests.checkpoints import FULL, REFUSED_VARIANT, VARIANTS, real_checkpoint

BOTH = pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])


@BOTH
@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_nvfp4(layout: str, weight_only: bool, sharded: bool, tmp_path: Path) -> None:
    made = small(layout, weight_only)
    if sharded:  # a module's tensors may lie in different files
        made.shards = {name: i % 3 for i, name in enumerate(made.tensors)}
    packed, weight_global, input_global = (
        ("weight_packed", "weight_global_scale", "input_global_scale")
        if layout == "compressed-tensors"
        else ("weight", "weight_scale_2", "input_scale")
    )

    def multiplier(name: str) -> torch.Tensor:
        stored = made.tensors[name].reshape(1)
        return torch.ones(1) / stored if layout == "compressed-tensors" else stored

    with Checkpoint(made.write(tmp_path)) as checkpoint:
        assert checkpoint.linear_modules() == sorted(LINEARS)
        assert checkpoint.total_bytes == sum(t.numel() * t.element_size() for t in made.tensors.values())
        for module, shape in LINEARS.items():
            weight = checkpoint.linear(module, shape, bias=False)
            assert isinstance(weight, NVFP4Weight)
            assert weight.shape == shape
            assert_same_bits(weight.weight.packed, made.tensors[f"{module}.{packed}"])
            assert_same_bits(weight.weight.block_scale, made.tensors[f"{module}.weight_scale"])
            assert_same_bits(weight.weight.global_scale, multiplier(f"{module}.{weight_global}"))
            if weight_only:
                assert weight.input_global_scale is None
            else:
                assert weight.input_global_scale is not None
                assert_same_bits(weight.input_global_scale, multiplier(f"{module}.{input_global}"))
        assert checkpoint.unread() == sorted(dense_tensors())
        for name, tensor in dense_tensors().items():
            assert_same_bits(checkpoint.tensor(name, tuple(tensor.shape)), tensor)
        assert checkpoint.unread() == []


def test_negative_zero_scale_is_zero(tmp_path: Path) -> None:
    made = small()
    made.tensors[f"{UP}.weight_scale"].view(torch.uint8)[0, 0] = 0x80
    with Checkpoint(made.write(tmp_path)) as checkpoint:
        weight = checkpoint.linear(UP)
    assert isinstance(weight, NVFP4Weight)
    assert weight.weight.block_scale.view(torch.uint8)[0, 0] == 0x80


@BOTH
def test_scalars_of_either_shape(layout: str, tmp_path: Path) -> None:
    """[] and [1] mean the same; converters between the layouts leave either."""
    made = small(layout)
    other = {name: t.reshape(()) if t.dim() else t.reshape(1) for name, t in made.tensors.items() if t.numel() == 1}
    expected = Checkpoint(made.write(tmp_path / "a")).linear(UP)
    made.tensors |= other
    actual = Checkpoint(made.write(tmp_path / "b")).linear(UP)
    assert isinstance(actual, NVFP4Weight)
    assert isinstance(expected, NVFP4Weight)
    assert_same_bits(actual.weight.global_scale, expected.weight.global_scale)


def test_awq(tmp_path: Path) -> None:
    made = small("modelopt")
    made.quantization_config, made.hf_quant_config = modelopt_configs("NVFP4_AWQ")
    scale = torch.rand(HIDDEN).to(torch.bfloat16)
    made.tensors[f"{Q}.pre_quant_scale"] = scale
    with Checkpoint(made.write(tmp_path)) as checkpoint:
        q, up = checkpoint.linear(Q), checkpoint.linear(UP)
    assert isinstance(q, NVFP4Weight)
    assert isinstance(up, NVFP4Weight)
    assert q.pre_quant_scale is not None
    assert_same_bits(q.pre_quant_scale, scale)
    assert up.pre_quant_scale is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_fp8_beside_nvfp4(dtype: torch.dtype, strategy: str, dynamic: bool, tmp_path: Path) -> None:
    """llm-compressor stores FP8 scales in the model's own dtype."""
    made = small()
    made.quantization_config = ct_config(ct_group(), ct_fp8_group(strategy, dynamic, ["re:.*up_proj"]))
    scale = torch.rand((INTER, 1) if strategy == "channel" else 1).add(0.1).to(dtype)
    input_scale = None if dynamic else torch.full((1,), 0.125, dtype=dtype)
    raw = fp8_tensors(INTER, HIDDEN, 3, scale, input_scale)
    put(made, UP, raw)
    with Checkpoint(made.write(tmp_path)) as checkpoint:
        weight = checkpoint.linear(UP, (INTER, HIDDEN))
        assert isinstance(checkpoint.linear(Q), NVFP4Weight)
        assert UP in checkpoint.linear_modules()
    assert isinstance(weight, FP8Weight)
    assert_same_bits(weight.weight, raw["weight"])
    assert_same_bits(weight.weight_scale, scale.float().reshape(-1))
    if input_scale is None:
        assert weight.input_scale is None
    else:
        assert weight.input_scale is not None
        assert_same_bits(weight.input_scale, input_scale.float())


def fp8_blocks(n: int, k: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return fp8_tensors(n, k, 3, torch.rand(shape, generator=torch.Generator().manual_seed(4)).add(0.1).to(dtype), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("shape", [(300, 200), (256, 384), (1, 129)])
def test_block_wise_fp8_beside_nvfp4(
    shape: tuple[int, int], weight_only: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """What the library decompresses is code × scale of what is read here, last blocks included."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    library = pytest.importorskip("compressed_tensors.quantization")
    made = small()
    group = ct_fp8_block_group(weight_only, ["re:.*up_proj"])
    made.quantization_config = ct_config(ct_group(), group)
    n, k = shape
    raw = fp8_blocks(n, k, (-(-n // 128), -(-k // 128)), dtype)
    put(made, UP, raw)
    with Checkpoint(made.write(tmp_path)) as checkpoint:
        weight = checkpoint.linear(UP, shape)
        assert isinstance(checkpoint.linear(Q), NVFP4Weight)
        assert UP in checkpoint.linear_modules()
    assert isinstance(weight, FP8Weight)
    assert weight.block_wise and weight.weight_only == weight_only and weight.input_scale is None
    assert_same_bits(weight.weight, raw["weight"])
    assert_same_bits(weight.weight_scale, raw["weight_scale"].float())
    compressor = compressors.BaseCompressor.get_value_from_registry(group["format"])
    scheme = library.QuantizationScheme(
        targets=["Linear"], weights=group["weights"], input_activations=group["input_activations"]
    )
    decompressed = compressor.decompress(dict(raw), scheme)["weight"]
    rows, columns = torch.arange(n) // 128, torch.arange(k) // 128
    # the library multiplies in the scales' dtype, with one rounding; if that has 16 bits, float32 adds none
    ours = (weight.weight.float() * weight.weight_scale[rows][:, columns]).to(dtype)
    assert_same_bits(ours, decompressed)


@BOTH
@pytest.mark.parametrize("spread", [False, True])
def test_block_scales_with_or_without_ones(layout: str, spread: bool, tmp_path: Path) -> None:
    """ModelOpt writes [rows, 1, columns, 1], compressed-tensors [rows, columns]."""
    made = small(layout)
    raw = fp8_blocks(300, 200, (3, 1, 2, 1) if spread else (3, 2))
    raw["weight_scale"].view(-1)[0] = 2.6e-41  # ModelOpt has given such scales to blocks of zeros
    put(made, UP, raw)
    if layout == "modelopt":
        layers = {m: {"quant_algo": "fp8_pb_wo"} if m == UP else {"quant_algo": "NVFP4"} for m in LINEARS}
        made.quantization_config, _ = modelopt_configs("MIXED_PRECISION", [])
        made.quantization_config["quantized_layers"] = layers
        made.hf_quant_config = None
    else:
        made.quantization_config = ct_config(ct_group(), ct_fp8_block_group(True, ["re:.*up_proj"]))
    with Checkpoint(made.write(tmp_path)) as checkpoint:
        weight = checkpoint.linear(UP)
    assert isinstance(weight, FP8Weight) and weight.weight_only
    assert_same_bits(weight.weight, raw["weight"])
    assert_same_bits(weight.weight_scale, raw["weight_scale"].reshape(3, 2))


def test_bad_block_scales_are_named() -> None:
    stored = torch.ones(3, 1, 2, 1, dtype=torch.bfloat16)
    stored[1, 0, 1], stored[2] = -0.5, torch.nan
    with pytest.raises(TensorError, match=r"a\.b: x\.weight_scale: the scale of block \[1, 1\] is -0.5, and 3 in all"):
        layouts.fp8_block_scales(stored, "x.weight_scale", Path("a.b"))


def test_mixed_precision_modelopt(tmp_path: Path) -> None:
    made = small("modelopt")
    put(made, UP, fp8_tensors(INTER, HIDDEN, 3, torch.tensor(0.5), torch.tensor(0.25)))
    down = f"{LAYER}.mlp.down_proj"
    put(made, down, {"weight": torch.zeros(HIDDEN, INTER, dtype=torch.bfloat16)})
    layers = {module: {"quant_algo": "NVFP4", "group_size": 16} for module in LINEARS if module != down}
    layers[UP] = {"quant_algo": "FP8"}
    made.quantization_config, _ = modelopt_configs("MIXED_PRECISION", [])
    made.quantization_config["quantized_layers"] = layers
    made.hf_quant_config = None
    with Checkpoint(made.write(tmp_path)) as checkpoint:
        assert isinstance(checkpoint.linear(UP), FP8Weight)
        assert isinstance(checkpoint.linear(Q), NVFP4Weight)
        assert isinstance(checkpoint.linear(down), DenseWeight)
        assert down not in checkpoint.linear_modules()


@BOTH
def test_dense_layer_and_bias(layout: str, tmp_path: Path) -> None:
    made = small(layout)
    if layout == "modelopt":
        made.quantization_config, made.hf_quant_config = modelopt_configs(excludes=["*.up_proj", "model.embed_tokens"])
    else:
        made.quantization_config = ct_config() | {"ignore": ["re:.*up_proj"]}
    dense, bias = torch.randn(INTER, HIDDEN), torch.randn(INTER)
    put(made, UP, {"weight": dense, "bias": bias})
    made.tensors[f"{Q}.bias"] = torch.randn(HIDDEN).to(torch.bfloat16)
    with Checkpoint(made.write(tmp_path)) as checkpoint:
        weight = checkpoint.linear(UP, (INTER, HIDDEN), bias=True)
        assert isinstance(weight, DenseWeight)
        assert_same_bits(weight.weight, dense)
        assert weight.bias is not None
        assert_same_bits(weight.bias, bias)
        quantized = checkpoint.linear(Q, bias=True)
        assert quantized.bias is not None
        assert_same_bits(quantized.bias, made.tensors[f"{Q}.bias"])
        with pytest.raises(TensorError, match=rf"{Q}.bias: is not expected"):
            checkpoint.linear(Q, bias=False)
        with pytest.raises(TensorError, match=r"o_proj.bias: is missing"):
            checkpoint.linear(f"{ATTENTION}.o_proj", bias=True)


@BOTH
def test_kv_scales(layout: str, tmp_path: Path) -> None:
    made = with_kv_scales(small(layout))
    with Checkpoint(made.write(tmp_path)) as checkpoint:
        assert checkpoint.kv_scales(ATTENTION) == (0.5, 0.25)
        assert not any(name.endswith(("k_scale", "v_scale")) for name in checkpoint.unread())
        assert checkpoint.linear_modules() == sorted(LINEARS)  # a KV scale is no part of its module
        assert isinstance(checkpoint.linear(f"{ATTENTION}.k_proj"), NVFP4Weight)


def test_no_kv_scales(tmp_path: Path) -> None:
    with Checkpoint(small().write(tmp_path / "none")) as checkpoint:
        assert checkpoint.kv_scales(ATTENTION) == (None, None)
    made = with_kv_scales(small("modelopt"))  # ModelOpt stores none where it fixed them to 1
    made.tensors = {n: t for n, t in made.tensors.items() if not n.endswith(("k_scale", "v_scale"))}
    with Checkpoint(made.write(tmp_path / "fixed")) as checkpoint:
        assert checkpoint.quantization.kv_cache == "fp8"
        assert checkpoint.kv_scales(ATTENTION) == (None, None)


def test_unquantized(tmp_path: Path) -> None:
    tensors = dense_tensors() | {f"{m}.weight": torch.randn(shape).to(torch.float16) for m, shape in LINEARS.items()}
    with Checkpoint(Small(tensors).write(tmp_path)) as checkpoint:
        assert checkpoint.quantization.layout == "none"
        assert checkpoint.linear_modules() == []
        weight = checkpoint.linear(UP, (INTER, HIDDEN))
        assert isinstance(weight, DenseWeight)
        assert_same_bits(weight.weight, tensors[f"{UP}.weight"])


@BOTH
def test_what_the_model_needs_and_the_checkpoint_has_not(layout: str, tmp_path: Path) -> None:
    with Checkpoint(small(layout).write(tmp_path)) as checkpoint:
        with pytest.raises(TensorError, match=rf"model.norm.weight: has shape \[{HIDDEN}\], .* needs \[8\]"):
            checkpoint.tensor("model.norm.weight", (8,))
        with pytest.raises(TensorError, match=rf"has shape \[{INTER}, {HIDDEN}\], .* needs \[{HIDDEN}, {INTER}\]"):
            checkpoint.linear(UP, (HIDDEN, INTER))
        with pytest.raises(TensorError, match=r"lm_head.weight: is missing"):
            checkpoint.linear("lm_head")
        with pytest.raises(TensorError, match=r"no.such: is missing"):
            checkpoint.tensor("no.such")
        with pytest.raises(TensorError, match=r"weight_scale: must be bfloat16, float16 or float32, got float8_e4m3fn"):
            checkpoint.tensor(f"{UP}.weight_scale")


def test_asking_for_an_embedding_as_a_linear_layer(tmp_path: Path) -> None:
    """compressed-tensors does not exclude the embedding, because it is no Linear; only asking for it is wrong."""
    with (
        Checkpoint(small().write(tmp_path)) as checkpoint,
        pytest.raises(CheckpointConfigError, match=r"embed_tokens.weight: is dense .*configuration says NVFP4"),
    ):
        checkpoint.linear("model.embed_tokens")


def test_asking_for_a_norm_as_a_linear_layer(tmp_path: Path) -> None:
    with (
        Checkpoint(Small(dense_tensors()).write(tmp_path)) as checkpoint,
        pytest.raises(TensorError, match=r"model.norm.weight: must be a matrix"),
    ):
        checkpoint.linear("model.norm")


def test_files_without_an_index(tmp_path: Path) -> None:
    """All *.safetensors together, unless there is a model.safetensors."""
    made = small()
    made.shards = {name: i % 2 for i, name in enumerate(made.tensors)}
    made.write(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names == made.tensors.keys()
        assert {checkpoint.file_of(name).name for name in checkpoint.names} == {
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        }
    save_file(small().tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert {checkpoint.file_of(name).name for name in checkpoint.names} == {"model.safetensors"}


def test_info(tmp_path: Path) -> None:
    with Checkpoint(small().write(tmp_path)) as checkpoint:
        info = checkpoint.info("model.embed_tokens.weight")
        assert (info.dtype, info.shape, info.nbytes) == (torch.bfloat16, (VOCAB, HIDDEN), 2 * VOCAB * HIDDEN)
        assert info.file == checkpoint.file_of("model.embed_tokens.weight") == tmp_path / "model.safetensors"


def test_memory_is_its_own(tmp_path: Path) -> None:
    """A tensor stays as it was when the file changes after it was read."""
    made = small()
    folder = made.write(tmp_path)
    file = folder / "model.safetensors"
    with Checkpoint(folder) as checkpoint:
        weight = checkpoint.linear(UP)
        size = file.stat().st_size
        with file.open("r+b") as stream:
            stream.seek(size // 4)
            stream.write(bytes(size - size // 4))
    assert isinstance(weight, NVFP4Weight)
    assert_same_bits(weight.weight.packed, made.tensors[f"{UP}.weight_packed"])
    assert_same_bits(weight.weight.block_scale, made.tensors[f"{UP}.weight_scale"])


@pytest.mark.parametrize("limit", [1, 7, 64, 1000, 1 << 20])
def test_reading_in_pieces(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_reader, "_MAPPED_BYTES", limit)
    tensors = {
        "matrix": torch.randn(37, 5),
        "column": torch.randn(41, 1).to(torch.bfloat16),
        "vector": torch.randn(129).to(torch.float16),
        "cube": torch.randn(3, 4, 5),
        "number": torch.tensor(2.5),
        "one": torch.tensor([2.5]),
        "nothing": torch.zeros(0, 3),
    }
    folder = Small(tensors).write(tmp_path)
    with Checkpoint(folder) as checkpoint:
        for name, tensor in tensors.items():
            assert_same_bits(checkpoint.tensor(name), tensor, name)


def test_odd_alignment(tmp_path: Path) -> None:
    """Data may start at any byte: other producers do not pad the header."""
    number = torch.tensor([3.0, 4.0])
    header = {
        "pad": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + b"abc" + number.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint(tmp_path) as checkpoint:
        assert_same_bits(checkpoint.tensor("x"), number)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    folder = small().write(tmp_path)
    with Checkpoint(folder) as checkpoint:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
        with pytest.raises(CheckpointFileError, match=r"model.safetensors: changed while"):
            checkpoint.linear(UP)


@pytest.mark.checkpoint
@pytest.mark.parametrize("name", [*FULL, *VARIANTS])
def test_real(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every tensor of every real checkpoint, against safetensors' own reading."""
    folder = real_checkpoint(name, tmp_path_factory)
    raw = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    convert: Callable[[torch.Tensor], torch.Tensor]
    with Checkpoint(folder) as checkpoint:
        ct = checkpoint.quantization.layout == "compressed-tensors"
        packed, weight_global = ("weight_packed", "weight_global_scale") if ct else ("weight", "weight_scale_2")
        convert = (lambda d: 1 / d) if ct else (lambda m: m.reshape(1))
        layers = 30 if name in FULL else 1
        assert len(checkpoint.linear_modules()) == layers * (3 if "mlponly" in name else 7)
        for module in checkpoint.linear_modules():
            weight = checkpoint.linear(module, bias=False)
            assert isinstance(weight, NVFP4Weight)
            assert weight.weight_only == ("a16" in name)
            assert torch.equal(weight.weight.packed, raw[f"{module}.{packed}"])
            scales = raw[f"{module}.weight_scale"].view(torch.uint8)
            assert torch.equal(weight.weight.block_scale.view(torch.uint8), scales)
            assert torch.equal(weight.weight.global_scale, convert(raw[f"{module}.{weight_global}"]))
            assert (weight.pre_quant_scale is not None) == (f"{module}.pre_quant_scale" in raw)
        k, v = checkpoint.kv_scales("model.layers.0.self_attn")
        if "fp8kv" in name:
            assert k == raw["model.layers.0.self_attn.k_proj.k_scale"].item()
            assert v == raw["model.layers.0.self_attn.v_proj.v_scale"].item()
        else:
            assert (k, v) == (None, None)
        for tensor in checkpoint.unread():
            assert torch.equal(checkpoint.tensor(tensor), raw[tensor])
        assert checkpoint.unread() == []


@pytest.mark.checkpoint
def test_real_with_flattened_links_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = real_checkpoint("ct_nvfp4", tmp_path_factory)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.write_text("../common/embed.safetensors")
    with pytest.raises(CheckpointFileError, match=r"00002.safetensors: is a text file that holds the path"):
        Checkpoint(folder)


MEASURE = """
import sys
from pathlib import Path
import torch
from anyfp4.checkpoint.reader import Checkpoint

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

small = Checkpoint(Path(sys.argv[2]))  # code and libraries that reading needs are resident before the measurement
kept = [small.linear(module) for module in small.linear_modules()]
kept += [small.tensor(name) for name in small.unread()]
small.close()
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
before = status("VmRSS")
checkpoint = Checkpoint(Path(sys.argv[1]))
kept += [checkpoint.linear(module) for module in checkpoint.linear_modules()]
kept += [checkpoint.tensor(name) for name in checkpoint.unread()]
print(status("VmHWM") - before, checkpoint.total_bytes)
"""


@pytest.mark.checkpoint
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", FULL)
def test_peak_memory(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Reading everything and keeping it takes at most 1.3 times the checkpoint's bytes."""
    folder = real_checkpoint(name, tmp_path_factory)
    variant = real_checkpoint(f"variants/{name}", tmp_path_factory)
    command = [sys.executable, "-c", MEASURE, str(folder), str(variant)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    growth, total = map(int, done.stdout.split())
    print(f"{name}: {growth / 1e6:.1f} MB for {total / 1e6:.1f} MB, {growth / total:.2f} times")
    assert total < growth <= 1.3 * total


@pytest.mark.checkpoint
def test_real_refused_variant(tmp_path_factory: pytest.TempPathFactory) -> None:
    from anyfp4.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match="W4A8_NVFP4_FP8"):
        Checkpoint(real_checkpoint(REFUSED_VARIANT, tmp_path_factory))
