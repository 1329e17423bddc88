"""All layers in one call against the op-by-op loop on the reference backend: whole models, by bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anyfp4.backends.base import Backend
from anyfp4.backends.cpu import CpuBackend
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.engine import kv_cache
from anyfp4.errors import InvalidArgumentError
from anyfp4.layers.attention import LayerCache
from anyfp4.layers.linear import Linear
from anyfp4.models.decoder import Decoder
from anyfp4.models.loader import load_decoder
from anyfp4.ops.attention import AttentionBatch
from anyfp4.testing.bitwise import assert_same_bits
from anyfp4.testing.models import all_logits
from tests.models.test_against_transformers import make


def load(folder: Path, backend: str, dtype: torch.dtype) -> Decoder:
    with Checkpoint(folder) as checkpoint:
        return load_decoder(checkpoint, device=torch.device("cpu"), dtype=dtype, backend=backend)


WHOLE = [
    *((case, torch.bfloat16) for case in ("llama", "llama biases", "llama multi-head", "mistral window", "qwen3 bias")),
    ("llama", torch.float16),
    ("qwen3", torch.float32),
]


@pytest.mark.parametrize(("case", "dtype"), WHOLE, ids=str)
def test_whole_models(backend: CpuBackend, case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _, tokens = make(case, tmp_path)
    tokens = tokens[:40]
    fused, reference = load(tmp_path, "cpu", dtype), load(tmp_path, "reference", dtype)
    assert fused.fused is not None and reference.fused is None
    expected = all_logits(reference, tokens)
    assert_same_bits(all_logits(fused, tokens), expected, "one step")
    assert_same_bits(all_logits(fused, tokens, chunks=[17, 1, 1, 21], block_size=4), expected, "four steps")


def test_quantized_with_an_fp8_cache(backend: CpuBackend, tiny_model: Path) -> None:
    tokens = list(range(3, 60))
    results = []
    for name in ("cpu", "reference"):
        decoder = load(tiny_model, name, torch.bfloat16)
        blocks = [replace(b, attention=replace(b.attention, k_scale=0.37, v_scale=0.61)) for b in decoder.blocks]
        results.append(all_logits(replace(decoder, blocks=blocks, kv_dtype=torch.float8_e4m3fn), tokens))
    assert_same_bits(results[0], results[1], "FP8 cache")


def test_projections_in_several_parts(backend: CpuBackend, tmp_path: Path) -> None:
    _, tokens = make("llama", tmp_path)
    decoder = load(tmp_path, "cpu", torch.bfloat16)
    expected = all_logits(decoder, tokens)
    with Checkpoint(tmp_path) as checkpoint:
        for index, block in enumerate(decoder.blocks):
            names = [f"model.layers.{index}.self_attn.{p}_proj" for p in "qkv"]
            block.attention.qkv.parts = [
                part for n in names for part in Linear([_bf16(checkpoint, n)], backend="cpu").parts
            ]
    again = replace(decoder)
    assert again.fused is not None
    assert_same_bits(all_logits(again, tokens), expected, "three parts")


def _bf16(checkpoint: Checkpoint, name: str):
    weight = checkpoint.linear(name)
    return replace(weight, weight=weight.weight.to(torch.bfloat16))


def test_several_sequences(backend: CpuBackend, tmp_path: Path) -> None:
    """Three sequences in one step, one of them a prompt, the others single tokens after a prefix."""
    _, tokens = make("qwen3", tmp_path)
    outputs = []
    for name in ("cpu", "reference"):
        decoder = load(tmp_path, name, torch.bfloat16)
        caches = kv_cache.allocate(decoder, 9, 8)
        step(decoder, caches, [(0, tokens[:10]), (0, tokens[20:33])], [[0, 1], [4, 5]])
        outputs.append(
            step(
                decoder,
                caches,
                [(10, tokens[10:11]), (0, tokens[40:57]), (13, tokens[33:34])],
                [[0, 1], [7, 8, 2], [4, 5]],
            )
        )
    assert_same_bits(outputs[0], outputs[1], "hidden states")


def step(decoder: Decoder, caches: list[LayerCache], pieces: list[tuple[int, list[int]]], tables: list[list[int]]):
    starts, positions, slots, ids = [0], [], [], []
    for (first, tokens), table in zip(pieces, tables, strict=True):
        span = range(first, first + len(tokens))
        positions += span
        slots += [table[p // 8] * 8 + p % 8 for p in span]
        ids += tokens
        starts.append(len(ids))
    width = max(map(len, tables))
    batch = AttentionBatch(
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_len=torch.tensor([f + len(t) for f, t in pieces], dtype=torch.int32),
        block_table=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32),
        slots=torch.tensor(slots),
    )
    return decoder.forward(torch.tensor(ids), torch.tensor(positions), caches, batch)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("small")
    make("llama", folder)
    return load(folder, "cpu", torch.bfloat16)


def batch_of_one(**changes: torch.Tensor) -> AttentionBatch:
    parts = {
        "query_start": torch.tensor([0, 2], dtype=torch.int32),
        "context_len": torch.tensor([2], dtype=torch.int32),
        "block_table": torch.tensor([[0]], dtype=torch.int32),
        "slots": torch.tensor([0, 1]),
    }
    return AttentionBatch(**{**parts, **changes})


@pytest.mark.parametrize(
    ("positions", "changes", "words"),
    [
        ([0, 256], {}, "positions"),
        ([-1, 0], {}, "positions"),
        ([0, 1], {"slots": torch.tensor([0, 16])}, "slots"),
        ([0, 1], {"slots": torch.tensor([0])}, "slots"),
        ([0, 1], {"slots": torch.tensor([0, 1], dtype=torch.int32)}, "slots"),
        ([0, 1], {"block_table": torch.tensor([[1]], dtype=torch.int32)}, "block_table"),
        ([0, 1], {"query_start": torch.tensor([0, 3], dtype=torch.int32)}, "query_start"),
        ([0, 1], {"context_len": torch.tensor([1], dtype=torch.int32)}, "context_len"),
        ([0, 1, 2], {}, "positions"),
    ],
)
def test_refuses(small: Decoder, positions: list[int], changes: dict[str, torch.Tensor], words: str) -> None:
    caches = kv_cache.allocate(small, 1, 16)
    for cache in caches:
        cache.k.zero_()
    with pytest.raises(InvalidArgumentError, match=words):
        small.forward(torch.tensor([5, 6]), torch.tensor(positions), caches, batch_of_one(**changes))
    assert all(not cache.k.any() for cache in caches), "a refused step wrote to the cache"


def test_refuses_caches(small: Decoder) -> None:
    caches = kv_cache.allocate(small, 1, 16)
    odd = LayerCache(caches[0].k, torch.zeros(1, 16, 2, 9, dtype=torch.bfloat16))
    for wrong in (caches[:-1], [*caches[:-1], odd], []):
        with pytest.raises(InvalidArgumentError, match="cache"):
            small.forward(torch.tensor([5, 6]), torch.tensor([0, 1]), wrong, batch_of_one())


def test_a_changed_op_is_not_bypassed(small: Decoder) -> None:
    class Changed(CpuBackend):
        pass

    assert small.fused is not None
    assert replace(small, ops=Changed()).fused is None  # the linear layers are another backend's
    assert Changed().fuse(None) is None  # type: ignore[arg-type]
    assert Backend().fuse(None) is None  # type: ignore[arg-type]
