"""The size of the KV cache: what is asked for, what is left, what can be used."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anyfp4 import device as devices
from anyfp4.engine import kv_cache
from anyfp4.engine.config import EngineConfig
from anyfp4.errors import InsufficientMemoryError, InvalidArgumentError
from anyfp4.models.config import DecoderConfig, RopeConfig
from anyfp4.models.decoder import Decoder
from tests.conftest import write_dense_model

GIB = 1 << 30
GPU = torch.device("cuda", 0)
GPU = torch.device("cuda", 0)
SHAPE = DecoderConfig(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=12288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_position=40960,
    rms_norm_eps=1e-6,
    rope=RopeConfig(),
    dtype=torch.bfloat16,
)
#: keys and values of 16 tokens in bfloat16
BLOCK = 2 * 36 * 16 * 8 * 128 * 2


@dataclass
class Model:
    """What the size of a cache depends on."""

    device: torch.device = GPU
    config: DecoderConfig = SHAPE
    kv_dtype: torch.dtype = torch.bfloat16
    workspace: int = 512 << 20


def blocks(model: Any, max_model_len: int, **options: Any) -> int:
    return kv_cache.num_blocks(model, EngineConfig(**options), max_model_len)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 GiB, of which the weights have taken 6 and somebody else 10."""
    monkeypatch.setattr(devices, "memory", lambda _: devices.Memory(80 * GIB, 64 * GIB))


@pytest.mark.usefixtures("memory")
def test_a_gpu_gives_what_is_left() -> None:
    step = kv_cache.activation_bytes(EngineConfig(), SHAPE)
    assert blocks(Model(), 40960) == pytest.approx((56 * GIB - step - (512 << 20)) // BLOCK, abs=1)
    assert blocks(Model(), 40960, memory_fraction=0.5) == (24 * GIB - step - (512 << 20)) // BLOCK
    assert blocks(Model(kv_dtype=torch.float8_e4m3fn), 40960, memory_fraction=0.5) == (
        (24 * GIB - step - (512 << 20)) // (BLOCK // 2)
    )
    longer_step = kv_cache.activation_bytes(EngineConfig(max_step_tokens=8192), SHAPE)
    assert blocks(Model(workspace=0), 40960, memory_fraction=0.5, max_step_tokens=8192) == (
        (24 * GIB - longer_step) // BLOCK
    )


@pytest.mark.usefixtures("memory")
def test_no_more_than_can_be_used() -> None:
    assert blocks(Model(), 1000) == 64 * 63
    assert blocks(Model(), 1000, max_num_seqs=3, block_size=32) == 3 * 32


@pytest.mark.usefixtures("memory")
def test_a_cpu_gives_a_quarter_unless_told_otherwise() -> None:
    model = Model(device=torch.device("cpu"), workspace=0)
    assert blocks(model, 40960) == 20 * GIB // BLOCK
    step = kv_cache.activation_bytes(EngineConfig(), SHAPE)
    assert blocks(model, 40960, memory_fraction=1.0) == (64 * GIB - step) // BLOCK


@pytest.mark.usefixtures("memory")
def test_what_is_asked_for_is_given() -> None:
    assert blocks(Model(), 100, kv_cache_bytes=7 * BLOCK + 5) == 7
    with pytest.raises(InvalidArgumentError, match=f"kv_cache_bytes = 5: one block needs {BLOCK} bytes"):
        blocks(Model(), 100, kv_cache_bytes=5)


def test_nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "memory", lambda _: devices.Memory(80 * GIB, 8 * GIB))
    with pytest.raises(InsufficientMemoryError, match="finds 0 bytes left on cuda:0, and one block of 16"):
        blocks(Model(), 100)


def test_needed_beside_the_weights() -> None:
    names, sizes = zip(*kv_cache.needed(EngineConfig(), SHAPE, torch.bfloat16).items(), strict=True)
    assert names == (
        "activations of 2048 tokens (max_step_tokens)",
        "KV cache, at least one block of 16 tokens",
    )
    # 2048 tokens × (4 hidden + 4 intermediate) in bfloat16, and three times 64 rows of logits
    assert sizes == (2048 * (4 * 4096 + 4 * 12288) * 2 + 3 * 64 * 151936 * 4, BLOCK)
    given = kv_cache.needed(EngineConfig(kv_cache_bytes=GIB), SHAPE, torch.bfloat16)
    assert given["KV cache (kv_cache_bytes)"] == GIB and len(given) == 2


def test_the_engine_has_as_many_blocks(decoder: Decoder) -> None:
    from anyfp4.engine.engine import Engine

    engine = Engine(decoder, EngineConfig(max_num_seqs=2, memory_fraction=1.0))
    assert engine.stats().kv_blocks_total == 2 * 256 // 16
    assert kv_cache.block_bytes(decoder, 16) == kv_cache._block_bytes(decoder.config, decoder.kv_dtype, 16)
    assert kv_cache.block_bytes(replace(decoder, kv_dtype=torch.float8_e4m3fn), 16) * 2 == kv_cache.block_bytes(
        decoder, 16
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_step_on_a_gpu_takes_no_more_than_was_estimated(tmp_path: Path) -> None:
    from anyfp4 import LLM, SamplingParams
    from anyfp4.tools.quantize import quantize_checkpoint

    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
    write_dense_model(tmp_path / "dense", **sizes, max_position_embeddings=1024)
    folder = quantize_checkpoint(tmp_path / "dense", tmp_path / "nvfp4").out
    config = EngineConfig(max_num_seqs=4, max_step_tokens=2048, kv_cache_bytes=64 << 20)
    engine = LLM(folder, device=GPU, config=config).engine
    for round in range(2):  # the first compiles kernels
        for i in range(4):
            prompt = [round, i, *range(510)]
            engine.add(f"{round} {i}", [t % 250 for t in prompt], SamplingParams(max_tokens=1, logprobs=5))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine.step()
        assert not engine.has_work
    taken = torch.cuda.max_memory_allocated() - before
    estimate = kv_cache.activation_bytes(config, engine.model.config)
    dequantized = 2 * 2 * 2048 * 512  # gate and up
    print(f"a step of 2048 tokens took {taken:,} bytes; estimated {estimate:,} + {dequantized:,}")
    assert taken <= estimate + dequantized <= estimate + engine.model.workspace
