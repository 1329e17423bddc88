"""The CPU backend's front door: what it refuses, and how it is set up."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from anyfp4.backends.base import Backend
from anyfp4.backends.cpu import CpuBackend
from anyfp4.errors import AnyFP4Error, InvalidArgumentError
from anyfp4.formats.nvfp4 import quantize
from anyfp4.formats.weights import DenseWeight, NVFP4Weight
from anyfp4.ops.attention import AttentionBatch

CPU = CpuBackend()
REASON = CPU.why_not(torch.device("cpu"))
needs_extension = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def weight(n: int = 32, k: int = 64) -> NVFP4Weight:
    g = torch.Generator().manual_seed(0)
    return NVFP4Weight(quantize(torch.randn(n, k, generator=g)), torch.tensor([0.01]))


def test_only_cpu_devices():
    assert "cuda" in str(CPU.why_not(torch.device("cuda")))


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "anyfp4.kernels.cpu._native", None)
    fresh = CpuBackend()
    assert "C++ compiler" in str(fresh.why_not(torch.device("cpu")))
    with pytest.raises(AnyFP4Error, match="C\\+\\+ compiler"):
        fresh.prepare(weight())


@needs_extension
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 48),
        torch.zeros(64, 3),
        torch.zeros(()),
        torch.zeros(3, 64, dtype=torch.float64),
        torch.zeros(3, 64, dtype=torch.int8),
        torch.zeros(3, 64, device="meta"),
    ],
    ids=str,
)
def test_linear_refuses(x: torch.Tensor):
    for w in (weight(), DenseWeight(torch.zeros(32, 64))):
        with pytest.raises(InvalidArgumentError, match="x must be"):
            CPU.linear(x, CPU.prepare(w))


@needs_extension
def test_linear_refuses_other_outputs():
    with pytest.raises(InvalidArgumentError, match="out_dtype"):
        CPU.linear(torch.zeros(1, 64), CPU.prepare(weight()), torch.float64)
    with pytest.raises(InvalidArgumentError, match="numerics"):
        CPU.prepare(weight(), "exact")


@needs_extension
def test_row_ops_refuse():
    x = torch.zeros(2, 8)
    for bad in (torch.zeros(7), torch.zeros(8, dtype=torch.float64), torch.zeros(16)[::2], torch.zeros(1, 8)):
        with pytest.raises(InvalidArgumentError):
            CPU.rms_norm(x, bad, 1e-5)
    with pytest.raises(InvalidArgumentError, match="alike"):
        CPU.add_rms_norm(x, x.half(), torch.zeros(8), 1e-5)
    with pytest.raises(InvalidArgumentError, match="even"):
        CPU.silu_mul(torch.zeros(2, 7))
    with pytest.raises(InvalidArgumentError, match="logits"):
        CPU.log_softmax(x.half())


@needs_extension
def test_rope_refuses():
    x, table = torch.zeros(2, 1, 8), torch.zeros(10, 2, 4)
    for positions in (torch.tensor([0, 10]), torch.tensor([-1, 0])):
        with pytest.raises(InvalidArgumentError, match="0…9"):
            CPU.apply_rope(x, positions, table)
    for bad in (torch.tensor([0]), torch.tensor([0, 1], dtype=torch.int32)):
        with pytest.raises(InvalidArgumentError):
            CPU.apply_rope(x, bad, table)
    with pytest.raises(InvalidArgumentError):
        CPU.apply_rope(x, torch.tensor([0, 1]), torch.zeros(10, 2, 3))


@needs_extension
def test_cache_refuses():
    new, cache = torch.zeros(2, 1, 8), torch.zeros(3, 4, 1, 8)
    for slots in (torch.tensor([0, 12]), torch.tensor([-1, 0])):
        with pytest.raises(InvalidArgumentError, match="0…11"):
            CPU.write_kv(new, new, cache, cache, slots)
    for bad in (torch.tensor([0]), torch.tensor([0, 1], dtype=torch.int32)):
        with pytest.raises(InvalidArgumentError):
            CPU.write_kv(new, new, cache, cache, bad)
    with pytest.raises(InvalidArgumentError):
        CPU.write_kv(new, new, cache.transpose(1, 2), cache, torch.tensor([0, 1]))


def batch(**changes: torch.Tensor) -> AttentionBatch:
    fields = {
        "query_start": torch.tensor([0, 1, 3], dtype=torch.int32),
        "context_len": torch.tensor([5, 2], dtype=torch.int32),
        "block_table": torch.tensor([[0, 1], [2, 0]], dtype=torch.int32),
        "slots": torch.tensor([4, 8, 9]),
    }
    return AttentionBatch(**{**fields, **changes})


@needs_extension
@pytest.mark.parametrize(
    "changes",
    [
        {"query_start": torch.tensor([0, 1, 4], dtype=torch.int32)},
        {"query_start": torch.tensor([0, 4, 3], dtype=torch.int32)},
        {"query_start": torch.tensor([0, 1, 3])},
        {"query_start": torch.tensor([0, 3], dtype=torch.int32)},
        {"context_len": torch.tensor([9, 2], dtype=torch.int32)},
        {"context_len": torch.tensor([5, 1], dtype=torch.int32)},
        {"block_table": torch.tensor([[0, 3], [2, 0]], dtype=torch.int32)},
        {"block_table": torch.tensor([[0, -1], [2, 0]], dtype=torch.int32)},
        {"block_table": torch.tensor([[0, 1]], dtype=torch.int32)},
    ],
    ids=str,
)
def test_attention_refuses(changes: dict[str, torch.Tensor]):
    q, cache = torch.ones(3, 2, 8), torch.ones(3, 4, 1, 8)
    assert CPU.attention(q, cache, cache, batch(), scale=1.0).shape == (3, 2, 8)
    with pytest.raises(InvalidArgumentError):
        CPU.attention(q, cache, cache, batch(**changes), scale=1.0)


@needs_extension
@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        (torch.ones(3, 2, 7), torch.ones(3, 4, 1, 8), torch.ones(3, 4, 1, 8)),
        (torch.ones(3, 3, 8), torch.ones(3, 4, 2, 8), torch.ones(3, 4, 2, 8)),
        (torch.ones(3, 2, 8), torch.ones(3, 4, 1, 8), torch.ones(2, 4, 1, 8)),
        (torch.ones(3, 2, 8), torch.ones(3, 4, 1, 8), torch.ones(3, 4, 1, 8).half()),
        (torch.ones(3, 2, 8).double(), torch.ones(3, 4, 1, 8), torch.ones(3, 4, 1, 8)),
    ],
)
def test_attention_refuses_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    with pytest.raises(InvalidArgumentError, match="does not fit"):
        CPU.attention(q, k, v, batch(), scale=1.0)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


SHOW = "from anyfp4.backends.cpu import CpuBackend; n = CpuBackend().native; print(n.isa(), n.threads())"


@needs_extension
def test_environment_chooses_instructions_and_threads():
    done = run(SHOW, ANYFP4_CPU_ISA="portable", ANYFP4_NUM_THREADS="3")
    assert done.stdout.split() == ["portable", "3"], done.stderr


@pytest.mark.parametrize(
    "variables",
    [
        {"ANYFP4_CPU_ISA": "sse9"},
        {"ANYFP4_NUM_THREADS": "0"},
        {"ANYFP4_NUM_THREADS": "two"},
        {"ANYFP4_NUM_THREADS": ""},
    ],
    ids=str,
)
@needs_extension
def test_environment_is_strict(variables: dict[str, str]):
    done = run(SHOW, **variables)
    assert done.returncode != 0
    assert "EnvironmentVariableError" in done.stderr


FORK = """
import os, torch
from anyfp4.backends.cpu import CpuBackend
from anyfp4.formats.weights import DenseWeight
cpu = CpuBackend()
cpu.native.set_threads(2)
p = cpu.prepare(DenseWeight(torch.ones(4096, 256)))
x = torch.ones(1, 256)
expected = cpu.linear(x, p)
pid = os.fork()
same = torch.equal(cpu.linear(x, p), expected)
if pid == 0:
    os._exit(0 if same else 1)
assert same and os.waitpid(pid, 0)[1] == 0
"""


@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_threads_after_a_fork():
    done = run(FORK)
    assert done.returncode == 0, done.stderr


@needs_extension
def test_it_is_preferred_on_a_cpu():
    from anyfp4.backends import registry

    assert registry.select(torch.device("cpu")).name == "cpu"
    assert isinstance(registry.REFERENCE, Backend)
