from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedTokenizerFast

from anyfp4.checkpoint.gguf import gguf_to_folder
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.checkpoint.writer import CheckpointWriter
from anyfp4.errors import AnyFP4Error, CheckpointFileError, InvalidArgumentError, TensorError, UnsupportedError
from anyfp4.formats import nvfp4
from anyfp4.formats.weights import NVFP4Weight
from anyfp4.testing.bitwise import assert_same_bits
from anyfp4.tools import quantize as quantize_module
from anyfp4.tools.quantize import Summary, quantize_checkpoint, weight_global_scale
from tests.checkpoint.gguf_files import TEXT, digits_first, model_file, small_model, trained_tokenizer
from tests.checkpoints import checkpoints_root

LAYOUTS = ("compressed-tensors", "modelopt")
PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
MODULES = [f"model.layers.{i}.{name}" for i in range(2) for name in PROJECTIONS]


def model_folder(
    folder: Path, architecture: str = "llama", *, dtype: torch.dtype = torch.bfloat16, **config: Any
) -> Path:
    small_model(architecture, **config).to(dtype).save_pretrained(folder, max_shard_size="100KB")
    tokenizer = trained_tokenizer(digits_first())
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "small")


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def linear(checkpoint: Checkpoint, module: str) -> NVFP4Weight:
    weight = checkpoint.linear(module)
    assert isinstance(weight, NVFP4Weight)
    return weight


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_only", [False, True])
def test_every_linear_layer_and_nothing_else(source: Path, tmp_path: Path, layout: Any, weight_only: bool) -> None:
    seen: list[tuple[str, int, int]] = []
    summary = quantize_checkpoint(
        source, tmp_path / "out", layout=layout, weight_only=weight_only, progress=lambda *step: seen.append(step)
    )
    assert sorted(summary.quantized) == sorted(MODULES)
    assert summary.dense == summary.warnings == ()
    original = tensors_in(source)
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.quantization.layout == layout
        assert checkpoint.linear_modules() == sorted(MODULES)
        for module in MODULES:
            weight = linear(checkpoint, module)
            assert weight.weight_only == weight_only
            expected = original[f"{module}.weight"].float()
            error = (nvfp4.dequantize(weight.weight) - expected).norm() / expected.norm()
            assert 0.05 < error < 0.12, module  # 0.095 is what 4-bit rounding of a normal distribution costs
        left = set(checkpoint.unread())
        assert left == {n for n in original if n.removesuffix(".weight") not in MODULES}
        for name in left:
            assert_same_bits(checkpoint.tensor(name), original[name], name)
        assert summary.written_bytes == checkpoint.total_bytes
    assert summary.source_bytes == sum(t.numel() * t.element_size() for t in original.values())
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["reading weights", *([] if weight_only else ["calibrating"]), "quantizing"]
    for stage in stages:
        steps = [(done, total) for name, done, total in seen if name == stage]
        assert [done for done, _ in steps] == list(range(1, steps[0][1] + 1))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_global_scales_are_shared_powers_of_two(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", weight_only=True)
    original = tensors_in(source)
    with Checkpoint(tmp_path / "out") as checkpoint:
        for layer in ("model.layers.0", "model.layers.1"):
            for group in (PROJECTIONS[:3], PROJECTIONS[3:4], PROJECTIONS[4:6], PROJECTIONS[6:]):
                amax = max(float(original[f"{layer}.{name}.weight"].abs().max()) for name in group)
                for name in group:
                    tensor = linear(checkpoint, f"{layer}.{name}").weight
                    scale = float(tensor.global_scale)
                    assert math.frexp(scale)[0] == 0.5
                    assert scale / 2 < amax / 2688 <= scale
                    blocks = original[f"{layer}.{name}.weight"].float().unflatten(1, (-1, 16)).abs().amax(-1)
                    # exact: the global scale is a power of two, and 1/6 is one float32 factor
                    wanted = (blocks * torch.tensor(1 / 6) / scale).to(torch.float8_e4m3fn)
                    assert_same_bits(tensor.block_scale, wanted)


@pytest.mark.parametrize(
    ("amax", "scale"),
    [
        (2688.0, 1.0),
        (math.nextafter(2688.0, 3000), 2.0),
        (math.nextafter(2688.0, 0), 1.0),
        (1.0, 2.0**-11),
        (5.25, 2.0**-9),
        (0.0, 1.0),
        (1e-38, 2.0**-126),
        (1e-45, 2.0**-126),
        (3e38, 2.0**117),
    ],
)
def test_weight_global_scale(amax: float, scale: float) -> None:
    assert_same_bits(weight_global_scale(amax), torch.tensor(scale))


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """Every quantized weight as the compressed-tensors library sees it."""
    table = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig(**table).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    raw = tensors_in(folder)
    weights = {}
    for name in raw:
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            state = {k: raw[f"{module}.{k}"] for k in ("weight_packed", "weight_scale", "weight_global_scale")}
            weights[module] = compressor.decompress(state, scheme)["weight"]
    return weights


@pytest.mark.parametrize("weight_only", [False, True])
def test_compressed_tensors_reads_the_same_weights(source: Path, tmp_path: Path, weight_only: bool) -> None:
    quantize_checkpoint(source, tmp_path / "out", weight_only=weight_only, max_shard_bytes=50_000)
    theirs = decompressed(tmp_path / "out")
    assert sorted(theirs) == sorted(MODULES)
    # named, or it would be anyfp4's own where another test of the process has imported anyfp4.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig()
    )
    model(torch.tensor([[1, 2, 3]]))  # decompresses at the first call
    with Checkpoint(tmp_path / "out") as checkpoint:
        for module, weight in theirs.items():
            ours = nvfp4.dequantize(linear(checkpoint, module).weight, torch.bfloat16)
            assert_same_bits(weight, ours, module)
            assert_same_bits(model.get_submodule(module).weight.detach(), ours, module)
            if not weight_only:
                scale = model.get_submodule(module).input_global_scale
                assert_same_bits(1 / scale.detach(), linear(checkpoint, module).input_global_scale, module)


def test_the_layouts_hold_the_same_numbers(source: Path, tmp_path: Path) -> None:
    for layout in LAYOUTS:
        quantize_checkpoint(source, tmp_path / layout, layout=layout)  # type: ignore[arg-type]
    with Checkpoint(tmp_path / LAYOUTS[0]) as a, Checkpoint(tmp_path / LAYOUTS[1]) as b:
        for module in MODULES:
            one, other = linear(a, module), linear(b, module)
            assert_same_bits(one.weight.packed, other.weight.packed)
            assert_same_bits(one.weight.block_scale, other.weight.block_scale)
            assert_same_bits(one.weight.global_scale, other.weight.global_scale)
            assert one.input_global_scale is not None
            assert other.input_global_scale is not None
            # a divisor holds most multipliers, the others come back one unit in the last place off
            torch.testing.assert_close(one.input_global_scale, other.input_global_scale, rtol=2**-23, atol=0)


def test_two_runs_write_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize_checkpoint(source, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_rows_are_quantized_independently(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    weight = torch.randn(64, 48).bfloat16()
    scale = weight_global_scale(float(weight.abs().max()))
    whole = nvfp4.quantize(weight, scale)
    monkeypatch.setattr(quantize_module, "CHUNK_ELEMENTS", rows * 48)
    parts = quantize_module.quantize_weight(weight, scale)
    assert_same_bits(parts.packed, whole.packed)
    assert_same_bits(parts.block_scale, whole.block_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_source_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = model_folder(tmp_path / "source", "qwen2", dtype=dtype)
    quantize_checkpoint(folder, tmp_path / "out", weight_only=True)
    written = tensors_in(tmp_path / "out")
    assert written["model.norm.weight"].dtype == dtype
    assert_same_bits(
        written["model.layers.0.self_attn.q_proj.bias"], tensors_in(folder)["model.layers.0.self_attn.q_proj.bias"]
    )
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert linear(checkpoint, MODULES[0]).bias is not None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gguf_source_is_the_same_as_its_folder(tmp_path: Path, layout: Any) -> None:
    (tmp_path / "model").mkdir()
    file = model_file(tmp_path / "model" / "m.gguf", small_model("qwen3"), tokenizer=trained_tokenizer(digits_first()))
    gguf_to_folder(file, tmp_path / "bf16")
    for name, origin in (("file", file), ("folder", file.parent), ("bf16-out", tmp_path / "bf16")):
        quantize_checkpoint(origin, tmp_path / name, layout=layout)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "bf16-out").iterdir()}
    for name in ("file", "folder"):
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16", "bf16-out", "file", "folder", "model"]


def test_columns_that_are_no_multiple_of_sixteen(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "source", intermediate_size=72)
    summary = quantize_checkpoint(folder, tmp_path / "out")
    downs = tuple(f"model.layers.{i}.mlp.down_proj" for i in range(2))
    assert summary.dense == downs
    assert [w for w in summary.warnings if "down_proj stays dense: its 72 inputs" in w] == list(summary.warnings)
    assert len(summary.warnings) == 2
    named = CompressedTensorsConfig()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=named)(torch.tensor([[1, 2]]))
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.linear_modules() == sorted(set(MODULES) - set(downs))
        assert_same_bits(checkpoint.tensor(f"{downs[0]}.weight"), tensors_in(folder)[f"{downs[0]}.weight"])


@pytest.mark.parametrize(
    ("patterns", "dense"),
    [
        (["model.layers.1.mlp.down_proj"], ["model.layers.1.mlp.down_proj"]),
        (["model.layers.0.mlp.*"], [m for m in MODULES if ".0.mlp." in m]),
        (["*self_attn*", "lm_head"], [m for m in MODULES if "self_attn" in m]),
        ([r"re:.*\.(q|k|v)_proj"], [m for m in MODULES if m[-6:-5] in "qkv"]),
        (["re:model.layers.0.*o_proj$", "*.down_proj"], [m for m in MODULES if "0.self_attn.o" in m or "down" in m]),
        (["lm_head"], []),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ignore(source: Path, tmp_path: Path, layout: Any, patterns: list[str], dense: list[str]) -> None:
    summary = quantize_checkpoint(source, tmp_path / "out", layout=layout, weight_only=True, ignore=patterns)
    assert sorted(summary.dense) == sorted(dense)
    assert summary.warnings == ()
    with Checkpoint(tmp_path / "out") as checkpoint:  # so the configuration says the same as the tensors
        assert checkpoint.linear_modules() == sorted(set(MODULES) - set(dense))


def test_a_split_group_is_mentioned(source: Path, tmp_path: Path) -> None:
    summary = quantize_checkpoint(source, tmp_path / "out", weight_only=True, ignore=["*.0.self_attn.v_proj"])
    (warning,) = summary.warnings
    assert warning.startswith("model.layers.0.self_attn.q_proj is quantized, but v_proj beside it not")


def damaged(source: Path, folder: Path, change: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir()
    for path in source.iterdir():
        if "safetensors" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    save_file({**tensors_in(source), **change}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_nan(source: Path) -> dict[str, torch.Tensor]:
    name = "model.layers.1.mlp.up_proj.weight"
    weight = tensors_in(source)[name].clone()
    weight[3, 4] = math.nan
    return {name: weight}


REFUSED: dict[str, tuple[dict[str, Any], type[AnyFP4Error], str]] = {
    "pattern": ({"ignore": ["nothing.*"]}, InvalidArgumentError, r"ignore: 'nothing\.\*' matches no linear layer"),
    "name": ({"ignore": ["model.layers.0"]}, InvalidArgumentError, r"'model\.layers\.0' matches no linear layer"),
    "embedding": ({"ignore": ["model.embed_tokens"]}, InvalidArgumentError, "matches no linear layer"),
    "expression": ({"ignore": ["re:("]}, InvalidArgumentError, r"ignore: 're:\(' is no regular expression"),
    "everything": ({"ignore": ["*_proj"]}, InvalidArgumentError, "nothing is left to quantize"),
    "layout": (
        {"layout": "gptq"},
        InvalidArgumentError,
        "layout must be one of compressed-tensors, modelopt, got 'gptq'",
    ),
    "shard size": ({"max_shard_bytes": 0}, InvalidArgumentError, "max_shard_bytes must be positive"),
    "calibrated weights": (
        {"weight_only": True, "calibrate": Path("text.txt")},
        InvalidArgumentError,
        "nothing to calibrate",
    ),
    "no text": ({"calibrate": Path("nowhere.txt")}, CheckpointFileError, r"nowhere\.txt: cannot be read"),
    "nan": ({"change": with_nan}, TensorError, r"model\.layers\.1\.mlp\.up_proj\.weight: holds a NaN or an infinity"),
    "dead layer": (
        {"change": lambda _: {"model.layers.1.input_layernorm.weight": torch.zeros(64).bfloat16()}},
        TensorError,
        r"model\.layers\.1\.self_attn\.[qkv]_proj: the layer's input is zero throughout",
    ),
    "overflow": (
        {"change": lambda _: {"model.norm.weight": torch.ones(64), "model.layers.0.mlp.up_proj.weight": huge()}},
        TensorError,
        r"model\.layers\.0\.mlp\.down_proj: the layer's input reaches (inf|nan)",
    ),
}


def huge() -> torch.Tensor:
    return torch.full((96, 64), 3e38).bfloat16()


@pytest.mark.parametrize("case", REFUSED, ids=lambda name: name.replace(" ", "-"))
def test_refuses_and_leaves_nothing(source: Path, tmp_path: Path, case: str) -> None:
    options, error, message = REFUSED[case]
    options = dict(options)
    change = options.pop("change", None)
    folder = source if change is None else damaged(source, tmp_path / "source", change(source))
    with pytest.raises(error, match=message):
        quantize_checkpoint(folder, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["source"])


def test_refuses_a_quantized_source(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "once", weight_only=True)
    with pytest.raises(InvalidArgumentError, match=r"quantized already \(nvfp4-pack-quantized, compressed-tensors\)"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice")


def test_refuses_itself_and_a_full_folder(source: Path, tmp_path: Path) -> None:
    for out in (source, source.parent):
        with pytest.raises(InvalidArgumentError, match="holds the source"):
            quantize_checkpoint(source, out, overwrite=True)
    (tmp_path / "note.txt").write_text("keep me")
    with pytest.raises(InvalidArgumentError, match="is not empty"):
        quantize_checkpoint(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_refuses_other_architectures_and_no_model(source: Path, tmp_path: Path) -> None:
    folder = damaged(source, tmp_path / "source", {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(UnsupportedError, match="'gpt2' is not supported"):
        quantize_checkpoint(folder, tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointFileError, match=r"holds neither config\.json nor a GGUF file"):
        quantize_checkpoint(empty, tmp_path / "out")
    (empty / "a.gguf").touch()
    (empty / "b.gguf").touch()
    with pytest.raises(InvalidArgumentError, match=r"several GGUF files, name one: a\.gguf, b\.gguf"):
        quantize_checkpoint(empty, tmp_path / "out")
    with pytest.raises(CheckpointFileError, match="no such file or folder"):
        quantize_checkpoint(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("stage", ["dequantizing GGUF", "reading weights", "calibrating", "quantizing"])
def test_an_interrupt_leaves_nothing(tmp_path: Path, stage: str) -> None:
    file = model_file(tmp_path / "m.gguf", small_model(), tokenizer=trained_tokenizer(digits_first()))

    def interrupt(name: str, done: int, _: int) -> None:
        if name == stage and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(file, tmp_path / "out", max_shard_bytes=10_000, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


MEMORY = """
import sys
from pathlib import Path
import torch
from anyfp4.tools.quantize import quantize_checkpoint
torch.set_num_threads(1)
small, large, out = (Path(name) for name in sys.argv[1:4])
options = {"weight_only": True} if sys.argv[4] == "True" else {"calibrate": small / "text.txt"}
quantize_checkpoint(small, out / "small", **options)  # what is imported and set up at the first call does not count

def status(field):
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
    return int(line.split()[1]) * 1024

Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
before = status("VmRSS")
quantize_checkpoint(large, out / "large", max_shard_bytes=64_000_000, **options)
print(status("VmHWM") - before)
"""


def many_layers(small: Path, folder: Path, shard: int, count: int) -> int:
    """A model of ``count`` middle-sized layers, all of the same random numbers; returns its bytes."""
    config = json.loads((small / "config.json").read_text())
    hidden, width = 768, 2048
    config |= {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": count}
    config |= {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 128}
    shapes = {"self_attn.q_proj": (hidden, hidden), "mlp.gate_proj": (width, hidden), "mlp.down_proj": (hidden, width)}
    random = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}
    random |= {f"self_attn.{n}_proj": random["self_attn.q_proj"] for n in "kvo"}
    random["mlp.up_proj"] = random["mlp.gate_proj"]
    random |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), torch.ones(hidden).bfloat16())
    with CheckpointWriter(folder, shard) as writer:
        writer.write_json("config.json", config)
        writer.copy_companions(small)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            writer.add(name, torch.randn(config["vocab_size"], hidden).bfloat16())
        writer.add("model.norm.weight", torch.ones(hidden).bfloat16())
        for i in range(count):
            for name, tensor in random.items():
                writer.add(f"model.layers.{i}.{name}.weight", tensor)
        writer.finish()
        return writer.total_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("weight_only", [True, False])
def test_memory_stays_under_twice_the_largest_shard(source: Path, tmp_path: Path, weight_only: bool) -> None:
    shard = 100_000_000
    small, large = damaged(source, tmp_path / "small", {}), tmp_path / "large"
    (small / "text.txt").write_text(TEXT[:400])
    total = many_layers(small, large, shard, 20)
    assert total > 2.5 * shard
    assert max(path.stat().st_size for path in large.glob("*.safetensors")) < 1.01 * shard
    command = [sys.executable, "-c", MEMORY, str(small), str(large), str(tmp_path / "out"), str(weight_only)]
    growth = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    print(f"grew by {growth / 1e6:.0f} MB; shards of {shard / 1e6:.0f} MB, model of {total / 1e6:.0f} MB")
    assert growth < 2 * shard


def keys(table: Any) -> Any:
    """The structure of a JSON value: keys, and values where they are not the producer's own business."""
    if isinstance(table, dict):
        return {k: keys(v) for k, v in sorted(table.items()) if k not in ("version", "producer")}
    return [keys(v) for v in table] if isinstance(table, list) else table


@pytest.mark.checkpoint
@pytest.mark.parametrize(
    ("variant", "layout", "weight_only"),
    [
        ("modelopt_nvfp4", "modelopt", False),
        ("modelopt_w4a16_nvfp4", "modelopt", True),
        ("ct_nvfp4", "compressed-tensors", False),
        ("ct_nvfp4a16", "compressed-tensors", True),
    ],
)
def test_has_the_form_of_a_real_export(tmp_path: Path, variant: str, layout: Any, weight_only: bool) -> None:
    real = checkpoints_root() / "variants" / variant
    real_config = json.loads((real / "config.json").read_text())
    shape = {k: v for k, v in real_config.items() if k not in ("quantization_config", "_model_name_or_path")}
    shape["vocab_size"] = 320  # the variants have 256 tokens, too few for a tokenizer of bytes
    folder = model_folder(tmp_path / "source", **{k: v for k, v in shape.items() if k != "dtype"})
    (folder / "config.json").write_text(json.dumps(shape))
    quantize_checkpoint(folder, tmp_path / "out", layout=layout, weight_only=weight_only)
    ours, theirs = tensors_in(tmp_path / "out"), tensors_in(real)
    theirs["model.embed_tokens.weight"] = torch.empty(320, shape["hidden_size"], dtype=torch.bfloat16)
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    our_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert our_config.keys() | {"_model_name_or_path"} == real_config.keys()
    assert our_config["quantization_config"].keys() == real_config["quantization_config"].keys()
    assert keys(our_config["quantization_config"]) == keys(real_config["quantization_config"])
    hf_quant_config = real / "hf_quant_config.json"
    assert hf_quant_config.exists() == (tmp_path / "out" / "hf_quant_config.json").exists()
    if hf_quant_config.exists():
        written = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
        assert keys(written) == keys(json.loads(hf_quant_config.read_text()))
        assert written.keys() == {"producer", "quantization"}


def test_summary_tells_what_it_calibrated_on(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    summaries: list[Summary] = [
        quantize_checkpoint(source, tmp_path / "a"),
        quantize_checkpoint(source, tmp_path / "b", calibrate=text),
    ]
    assert summaries[0].calibration is not None
    assert summaries[1].calibration is not None
    assert "built-in text" in summaries[0].notes[0]
    assert summaries[1].notes == ()
    assert summaries[1].calibration.text == str(text)
