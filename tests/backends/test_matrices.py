"""What a backend gives back of a weight that it prepared: the bits that came in, whatever its layout."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from anyfp4.backends.base import Backend
from anyfp4.backends.cpu import CpuBackend
from anyfp4.backends.cublas import CublasBackend
from anyfp4.backends.hopper import HopperBackend
from anyfp4.backends.triton import TritonBackend
from anyfp4.errors import UnsupportedError
from anyfp4.formats.nvfp4 import NVFP4Tensor
from anyfp4.formats.weights import DenseWeight, NVFP4Weight
from anyfp4.testing.bitwise import assert_same_bits
from tests.kernels import cases

BACKENDS = (Backend(), CpuBackend(), TritonBackend(), HopperBackend(), CublasBackend())
SHAPES = ((1, 16), (48, 64), (77, 144), (200, 576), (130, 1040))


@pytest.fixture(params=BACKENDS, ids=lambda b: b.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    if isinstance(chosen, CpuBackend):
        reason = chosen.why_not(torch.device("cpu"))
        if reason is not None:
            pytest.skip(reason)
    elif isinstance(chosen, TritonBackend) and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    return chosen


def expected(weight: NVFP4Weight, backend: Backend) -> tuple[Tensor, Tensor]:
    packed, scale = weight.weight.packed, weight.weight.block_scale
    if isinstance(backend, HopperBackend):  # drops what a zero scale hides
        zero = (scale.view(torch.uint8) == 0).repeat_interleave(8, dim=1)
        packed = packed.masked_fill(zero, 0)
    return packed, scale


def check(backend: Backend, weight: NVFP4Weight, numerics: str) -> None:
    found = backend.matrices(backend.prepare(weight, numerics))
    for got, want, what in zip(found, expected(weight, backend), ("packed", "block_scale"), strict=True):
        assert got.dtype == want.dtype
        assert_same_bits(got, want, what)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", cases.SPREADS)
def test_w4a4(backend: Backend, shape: tuple[int, int], spread: str) -> None:
    check(backend, cases.nvfp4_weight(*shape, spread, 3, shards=3, bias=True), "native")


@pytest.mark.parametrize("spread", ["tame", "wide"])
def test_blackwell_numerics(backend: Backend, spread: str) -> None:
    if isinstance(backend, CublasBackend):
        pytest.skip("backend cublas has no blackwell numerics")
    check(backend, cases.nvfp4_weight(77, 144, spread, 4, shards=2), "blackwell")


def test_weight_only(backend: Backend) -> None:
    weight = cases.nvfp4_weight(77, 144, "wide", 5, shards=2, weight_only=True, pre=torch.bfloat16)
    check(backend, weight, "native")


@pytest.mark.parametrize("inputs", ["static", "dynamic", "weight-only"])
def test_fp8(backend: Backend, inputs: str) -> None:
    weight = cases.fp8_weight(77, 144, 6, inputs=inputs, per_row=False, bias=True)
    (found,) = backend.matrices(backend.prepare(weight))
    assert_same_bits(found, weight.weight)


def test_fp8_in_blocks(backend: Backend) -> None:
    weight = cases.fp8_block_weight(200, 272, "wide", 7, weight_only=False, bias=False)
    (found,) = backend.matrices(backend.prepare(weight))
    assert_same_bits(found, weight.weight)


def test_dense(backend: Backend) -> None:
    weight = DenseWeight(torch.randn(33, 48, generator=cases.generator(8)).to(torch.bfloat16))
    (found,) = backend.matrices(backend.prepare(weight))
    assert_same_bits(found, weight.weight)


def test_a_nan_is_kept_or_refused(backend: Backend) -> None:
    weight = cases.nvfp4_weight(20, 64, "tame", 9)
    scale = weight.weight.block_scale.view(torch.uint8).clone()
    scale[3, 1] = 0x7F
    tensor = NVFP4Tensor(weight.weight.packed, scale.view(torch.float8_e4m3fn), weight.weight.global_scale)
    prepared = backend.prepare(NVFP4Weight(tensor, weight.input_global_scale))
    if type(backend) in (Backend, CublasBackend):
        assert_same_bits(backend.matrices(prepared)[1].view(torch.uint8), scale)
    else:
        with pytest.raises(UnsupportedError, match="NaN"):
            backend.matrices(prepared)
