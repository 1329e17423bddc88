"""What a linear layer's weight accepts, and what it refuses by name."""

from __future__ import annotations

import pytest
import torch

from anyfp4.errors import InvalidArgumentError
from anyfp4.formats import nvfp4
from anyfp4.formats.weights import DenseWeight, FP8Weight, NVFP4Weight, fp8_grid

N, K = 6, 32
F8 = torch.float8_e4m3fn


def two_shards() -> nvfp4.NVFP4Tensor:
    one = nvfp4.quantize(torch.ones(N, K))
    return nvfp4.NVFP4Tensor(one.packed, one.block_scale, torch.tensor([1.0, 2.0]), (2, 4))


def test_nvfp4_weight() -> None:
    w = NVFP4Weight(two_shards(), torch.ones(2), torch.ones(K), torch.zeros(N))
    assert w.shape == (N, K) and not w.weight_only and w.nbytes == w.weight.nbytes == N * K // 2 + N * K // 16 + 8
    assert NVFP4Weight(two_shards()).weight_only
    scalar = NVFP4Weight(nvfp4.quantize(torch.ones(N, K)), torch.tensor(0.5))
    assert scalar.input_global_scale is not None and scalar.input_global_scale.tolist() == [0.5]


def test_nvfp4_weight_refuses() -> None:
    for bad in (torch.ones(1), torch.ones(3), torch.ones(2, dtype=torch.float64), torch.tensor(1.0)):
        with pytest.raises(InvalidArgumentError, match=r"^input_global_scale must be float32 \[2\]"):
            NVFP4Weight(two_shards(), bad)
    with pytest.raises(InvalidArgumentError, match=r"^bias must have shape \[6\], got \[32\]"):
        NVFP4Weight(two_shards(), bias=torch.zeros(K))
    with pytest.raises(InvalidArgumentError, match=r"^pre_quant_scale must have shape \[32\], got \[6\]"):
        NVFP4Weight(two_shards(), pre_quant_scale=torch.zeros(N))


def test_fp8_weight() -> None:
    weight = torch.ones(N, K).to(F8)
    per_row = FP8Weight(weight, torch.ones(N), bias=torch.zeros(N))
    assert per_row.shape == (N, K) and per_row.nbytes == N * K + 4 * N and per_row.input_scale is None
    assert FP8Weight(weight, torch.ones(1), torch.ones(1)).nbytes == N * K + 4


def test_block_wise_fp8_weight() -> None:
    weight = torch.ones(130, 257).to(F8)
    w = FP8Weight(weight, torch.ones(2, 3), weight_only=True)
    assert w.block_wise and w.weight_only and w.nbytes == 130 * 257 + 4 * 6
    assert fp8_grid(128, 128) == (1, 1) and fp8_grid(129, 1) == (2, 1)
    assert not FP8Weight(weight, torch.ones(130)).block_wise
    for bad in (torch.ones(3, 2), torch.ones(2, 1, 3, 1), torch.ones(6), torch.ones(2, 3).double()):
        with pytest.raises(InvalidArgumentError, match=r"^weight_scale must be float32 \[1\] or \[130\] or \[2, 3\]"):
            FP8Weight(weight, bad)
    with pytest.raises(InvalidArgumentError, match=r"^input_scale must be None: a block-wise FP8 layer has no static"):
        FP8Weight(weight, torch.ones(2, 3), torch.ones(1))
    with pytest.raises(InvalidArgumentError, match=r"^input_scale must be None: a weight-only FP8 layer"):
        FP8Weight(weight, torch.ones(1), torch.ones(1), weight_only=True)


def test_fp8_weight_refuses() -> None:
    weight, one = torch.ones(N, K).to(F8), torch.ones(1)
    for bad in (torch.ones(N, K), torch.ones(N, K).to(torch.float8_e5m2), weight.flatten()):
        with pytest.raises(InvalidArgumentError, match=r"^FP8 weight must be float8_e4m3fn \[N, K\]"):
            FP8Weight(bad, one)
    for bad in (torch.ones(2), torch.ones(N, 1), one.double(), torch.tensor(1.0)):
        with pytest.raises(InvalidArgumentError, match=r"^weight_scale must be float32 \[1\] or \[6\]"):
            FP8Weight(weight, bad)
    for bad in (torch.ones(N), one.double()):
        with pytest.raises(InvalidArgumentError, match=r"^input_scale must be float32 \[1\]"):
            FP8Weight(weight, one, bad)
    with pytest.raises(InvalidArgumentError, match=r"^bias must have shape \[6\]"):
        FP8Weight(weight, one, bias=torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dense_weight(dtype: torch.dtype) -> None:
    w = DenseWeight(torch.ones(N, K, dtype=dtype), torch.zeros(N))
    assert w.shape == (N, K) and w.nbytes == N * K * dtype.itemsize


def test_dense_weight_refuses() -> None:
    for bad in (torch.ones(N, K, dtype=torch.float64), torch.ones(N, K).to(F8), torch.ones(K)):
        with pytest.raises(InvalidArgumentError, match=r"^dense weight must be bfloat16, float16 or float32"):
            DenseWeight(bad)
    with pytest.raises(InvalidArgumentError, match=r"^bias must have shape \[6\], got \[6, 1\]"):
        DenseWeight(torch.ones(N, K), torch.zeros(N, 1))
