"""What a model will take is known before it is loaded; one that does not fit is refused then, with the figures."""

from __future__ import annotations

import itertools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from anyfp4 import LLM, EngineConfig
from anyfp4 import device as devices
from anyfp4.backends import registry
from anyfp4.backends.base import Backend
from anyfp4.backends.cpu import CpuBackend
from anyfp4.backends.triton import TritonBackend
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.checkpoint.tensor_reader import TensorReader
from anyfp4.engine import kv_cache
from anyfp4.errors import InsufficientMemoryError
from anyfp4.formats import NVFP4Tensor
from anyfp4.formats.weights import DenseWeight, FP8Weight, LinearWeight, NVFP4Weight, fp8_grid
from anyfp4.models import footprint
from anyfp4.models.config import DecoderConfig
from anyfp4.models.loader import load_decoder
from tests.checkpoint.small import ct_config
from tests.conftest import write_dense_model

CPU = torch.device("cpu")
GIB = 1 << 30
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


class OnCpu(TritonBackend):
    """The Triton backend's preparation, which is plain torch code, without a GPU."""

    def why_not(self, *_: Any, **__: Any) -> None:
        return None


BACKENDS = [Backend(), CpuBackend(), pytest.param(OnCpu(), marks=needs_triton)]
KINDS = ["w4a4", "w4a4 bias", "w4a4 awq", "weight-only", "fp8", "fp8 rows", "fp8 dynamic", "fp8 blocks", "dense"]


def zeros(kind: str, n: int, k: int) -> LinearWeight:
    one, bias = torch.ones(1), torch.zeros(n) if "bias" in kind else None
    if kind == "dense":
        return DenseWeight(torch.zeros(n, k, dtype=torch.bfloat16))
    if "fp8" in kind:
        scale = torch.ones(fp8_grid(n, k)) if "blocks" in kind else torch.ones(n) if "rows" in kind else one
        return FP8Weight(torch.zeros(n, k).to(torch.float8_e4m3fn), scale, one if kind == "fp8" else None)
    block_scale = torch.zeros(n, k // 16).to(torch.float8_e4m3fn)
    tensor = NVFP4Tensor(torch.zeros(n, k // 2, dtype=torch.uint8), block_scale, one)
    return NVFP4Weight(tensor, None if "only" in kind else one, torch.ones(k) if "awq" in kind else None, bias)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("numerics", ["native", "blackwell"])
def test_bytes_of_prepared_layers_follow_from_a_few_rows(
    backend: Backend, numerics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.PREFERENCE, "cpu", (backend,))
    told = footprint._Prepared(CPU, torch.bfloat16, numerics, "auto")
    for kind, n, k in itertools.product(KINDS, (1, 127, 256, 300, 1000, 1280), (64, 576)):
        weight = zeros(kind, n, k)
        assert told.nbytes(weight) == backend.prepare(weight, numerics).nbytes, (kind, n, k)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_model_takes_what_was_told(tiny_model: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.PREFERENCE, "cpu", (backend,))
    with Checkpoint(tiny_model) as checkpoint:
        config = DecoderConfig.from_hf(checkpoint.config)
        told = footprint.measure(checkpoint, config, backend, CPU, "native", "auto", 100)
        decoder = load_decoder(checkpoint, device=CPU, max_positions=100)
    layers, others, head = told.weights.values()
    assert head == decoder.lm_head.nbytes
    norms = [decoder.norm, *(t for b in decoder.blocks for t in (b.input_norm, b.post_attention_norm))]
    assert others == sum(t.nbytes for t in (decoder.embedding, decoder.cos_sin, *norms))
    linears = [x for b in decoder.blocks for x in (b.attention.qkv, b.attention.o, b.mlp.gate_up, b.mlp.down)]
    kept = sum(linear.nbytes for linear in linears)
    # what joined projections hold but once: each 1 / scale, and a tile's entry where a tile spans two projections
    assert kept <= layers <= kept + len(linears) * 64
    assert decoder.workspace == told.workspace == backend.workspace_nbytes((192, 64), config.dtype)


def huge(folder: Path) -> Path:
    """The headers of a model with huge layers, in a file of 11 GB without a byte of data on the disk."""
    hidden, inter, vocab, layers = 12288, 49152, 128000, 4
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
        "quantization_config": ct_config(),
    }
    header: dict[str, Any] = {}
    end = 0

    def add(name: str, dtype: str, shape: list[int]) -> None:
        nonlocal end
        nbytes = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
        for size in shape:
            nbytes *= size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes

    for i in range(layers):
        attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        shapes = {f"{attn}.{p}_proj": (hidden if p in "qo" else 1024, hidden) for p in "qkvo"}
        shapes |= {f"{mlp}.{p}_proj": (inter, hidden) for p in ("gate", "up")} | {f"{mlp}.down_proj": (hidden, inter)}
        for name, (n, k) in shapes.items():
            add(f"{name}.weight_packed", "U8", [n, k // 2])
            add(f"{name}.weight_scale", "F8_E4M3", [n, k // 16])
            add(f"{name}.weight_global_scale", "F32", [1])
            add(f"{name}.input_global_scale", "F32", [1])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"model.layers.{i}.{norm}.weight", "BF16", [hidden])
    add("model.norm.weight", "BF16", [hidden])
    for name in ("model.embed_tokens", "lm_head"):
        add(f"{name}.weight", "BF16", [vocab, hidden])
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = huge(tmp_path)
    monkeypatch.setattr(TensorReader, "read", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr(devices, "memory", lambda _: devices.Memory(24 * GIB, 16 * GIB))
    config = EngineConfig(kv_cache_bytes=3 * GIB, max_step_tokens=1000)
    with Checkpoint(folder) as checkpoint, pytest.raises(InsufficientMemoryError) as caught:
        load_decoder(
            checkpoint,
            device=CPU,
            backend="cpu",
            beside=lambda shape, dtype: kv_cache.needed(config, shape, dtype),
            memory_fraction=0.75,
        )
    error = caught.value
    layers, others, head, activations, cache = error.parts.values()
    codes_and_scales = 4 * (2 * 12288 * 12288 + 2 * 1024 * 12288 + 3 * 12288 * 49152) * 9 // 16
    assert codes_and_scales < layers < codes_and_scales * 1.01
    assert 0 <= head - 128000 * 12288 * 2 <= 128000 * 8  # factors and biases of rows
    assert others == 128000 * 12288 * 2 + 9 * 12288 * 2 + 8192 * 128 * 4
    shape = DecoderConfig.from_hf(json.loads((folder / "config.json").read_text()))
    assert cache == 3 * GIB and activations == kv_cache.activation_bytes(config, shape)
    assert error.needed == sum(error.parts.values()) and error.available == 10 * GIB
    text = str(error)
    assert text.startswith(f"{folder} does not fit cpu: it needs {devices.size(error.needed)}, and 10.00 GiB can be")
    assert "(16.00 GiB of 24.00 GiB are free, of which memory_fraction leaves 6.00 GiB alone)" in text
    for what, nbytes in error.parts.items():
        assert f"{what} {devices.size(nbytes)}" in text
    assert "linear layers as backend cpu holds them" in text and "\n" not in text
    assert text.endswith(
        "What helps: a larger memory_fraction, ending other programs that use cpu, "
        "a smaller max_step_tokens, max_model_len or kv_cache_bytes, a device with more memory"
    )


@pytest.mark.parametrize(
    ("free", "fraction", "helps"),
    [
        (1000, None, "ending other programs that use cpu, a smaller"),
        (16 * GIB, 1e-6, "a larger memory_fraction, a smaller"),
        (15 * GIB, 0.01, "a larger memory_fraction, ending other programs that use cpu, a smaller"),
    ],
)
def test_what_helps(
    free: int, fraction: float | None, helps: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "memory", lambda _: devices.Memory(16 * GIB, free))
    with pytest.raises(InsufficientMemoryError, match=f"What helps: {helps}"):
        LLM(tiny_model, config=EngineConfig(memory_fraction=fraction))


def test_it_fits_to_the_byte(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(kv_cache_bytes=1 << 20)
    with pytest.raises(InsufficientMemoryError) as caught:
        monkeypatch.setattr(devices, "memory", lambda _: devices.Memory(16 * GIB, 1000))
        LLM(tiny_model, config=config)
    needed = caught.value.needed
    monkeypatch.setattr(devices, "memory", lambda _: devices.Memory(16 * GIB, needed - 1))
    with pytest.raises(InsufficientMemoryError):
        LLM(tiny_model, config=config)
    monkeypatch.setattr(devices, "memory", lambda _: devices.Memory(16 * GIB, needed))
    assert LLM(tiny_model, config=config).engine.stats().kv_blocks_total > 0


def test_a_device_without_room_for_the_question(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CpuBackend, "prepare", full)
    monkeypatch.setattr(devices, "memory", lambda _: devices.Memory(16 * GIB, 1000))
    with pytest.raises(InsufficientMemoryError, match="1000 bytes can be taken"):
        LLM(tiny_model, backend="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("numerics", ["native", "blackwell"])
def test_on_a_gpu(tmp_path: Path, numerics: str) -> None:
    from anyfp4.tools.quantize import quantize_checkpoint

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    write_dense_model(tmp_path / "dense", **sizes)
    folder, gpu = quantize_checkpoint(tmp_path / "dense", tmp_path / "nvfp4").out, torch.device("cuda", 0)
    before = torch.cuda.memory_allocated()
    with pytest.raises(InsufficientMemoryError, match="a larger memory_fraction") as caught:
        LLM(folder, device=gpu, numerics=numerics, config=EngineConfig(memory_fraction=1e-6))
    assert torch.cuda.memory_allocated() == before
    with Checkpoint(folder) as checkpoint:
        model = load_decoder(checkpoint, device=gpu, numerics=numerics)
    told = sum(list(caught.value.parts.values())[:3])
    norms = (2 * model.config.num_layers + 1) * model.config.hidden_size * 2
    kept = model.nbytes + model.cos_sin.nbytes + norms
    print(f"told {told:,}, kept {kept:,} bytes")
    assert kept <= told <= kept * 1.01
