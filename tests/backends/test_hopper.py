"""The Hopper backend without the hardware: when it runs, and what it makes of a weight."""

from __future__ import annotations

import pytest
import torch

from anyfp4.backends import base, hopper, registry, triton
from anyfp4.backends.hopper import HopperBackend, HopperBlackwell, HopperNVFP4
from anyfp4.errors import InvalidArgumentError
from anyfp4.formats import quantize
from anyfp4.formats.weights import DenseWeight, NVFP4Weight
from anyfp4.kernels import room
from anyfp4.kernels.hopper import compiler, gemm, plans, runtime
from anyfp4.kernels.hopper.runs import runs_of

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pretends that there is an H200, with all that the backend needs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "find_spec", lambda _: object())
    for module in (base, triton, hopper):
        monkeypatch.setattr(module, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(compiler, "find_nvrtc", lambda: "libnvrtc.so")
    monkeypatch.setattr(runtime, "why_no_driver", lambda: None)
    return monkeypatch


def test_it_is_the_first_choice_on_a_hopper(gpu: pytest.MonkeyPatch) -> None:
    assert registry.select(GPU).name == "hopper"
    assert registry.select(GPU, requested="triton").name == "triton"


def test_what_is_missing_is_named_and_triton_chosen(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(hopper, "architecture", lambda _: "sm_80")
    assert HopperBackend().why_not(GPU) == "needs sm_90 (H100, H200), this is sm_80"
    gpu.setattr(hopper, "architecture", lambda _: "sm_90")
    gpu.setattr(runtime, "why_no_driver", lambda: "no driver")
    assert HopperBackend().why_not(GPU) == "no driver"
    gpu.setattr(compiler, "find_nvrtc", lambda: None)
    assert "libnvrtc was not found" in str(HopperBackend().why_not(GPU))
    assert registry.select(GPU).name == "triton"


def test_one_copy_of_a_weight_with_each_run_of_rows_padded() -> None:
    g = torch.Generator().manual_seed(0)
    tensors = [quantize(torch.randn(n, 144, generator=g)) for n in (70, 10)]
    joined = type(tensors[0])(
        torch.cat([t.packed for t in tensors]), torch.cat([t.block_scale for t in tensors]),
        torch.cat([t.global_scale for t in tensors]), (70, 10),
    )  # fmt: skip
    one = HopperBackend().prepare(NVFP4Weight(joined, torch.tensor([0.5, 0.5])))
    two = HopperBackend().prepare(NVFP4Weight(joined, torch.tensor([0.5, 0.25])))
    assert isinstance(one.data, HopperNVFP4) and one.data.values_dtype == torch.bfloat16
    assert one.data.packed.records.shape == (2, 3, 2304) and one.data.packed.runs == ((80, 0),)
    assert two.data.packed.records.shape == (3, 3, 2304) and two.data.packed.runs == ((70, 0), (10, 1))
    assert one.nbytes == 2 * 3 * 2304 + 80 * 4 + 4 + 16  # records, alpha, input scale, the table of its run


@pytest.mark.parametrize(("m", "there"), [(1, 1), (32, 32), (33, 128), (128, 128), (129, 256), (256, 256), (257, 257)])
def test_room_for_a_whole_tile_behind_an_activation(m: int, there: int) -> None:
    x = room.empty(2, m, 48, torch.bfloat16, torch.device("cpu"))
    assert x.shape == (2, m, 48) and x.is_contiguous()
    x[0], x[1] = 1, 2
    found = room.rows(x, 128)
    # one that has no room is not read past its end
    assert found.shape == ((m + there if there % 128 == 0 else 2 * m), 48)
    assert found.data_ptr() == x.data_ptr() and torch.equal(found[: 2 * m], x.flatten(0, 1))
    assert room.rows(x[:, : m - 1].contiguous(), 128).shape[0] == 2 * (m - 1)
    assert room.rows(x[1:], 128).shape[0] == there


def test_the_kernel_for_medium_numbers_of_tokens() -> None:
    """By the measured times: many rows of a weight go to the kernel of large tiles earlier."""
    cpu = torch.device("cpu")

    def large(n: int, k: int, m: int) -> bool:
        return gemm.packed_time(m, runs_of([(n, 0)], cpu), k, 132) < plans.time(
            plans.choose(n, k, m, 132), n, k, m, 132
        )

    assert [large(24576, 4096, m) for m in (65, 128, 192, 256)] == [True, False, True, True]
    assert [large(8192, 8192, m) for m in (65, 128, 144, 256)] == [False, False, True, False]
    assert not any(large(4096, 12288, m) for m in (65, 128, 192, 256))


def test_runs_of_rows_in_groups_of_tiles() -> None:
    g = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(330, 64, generator=g))
    shards = type(weight)(weight.packed, weight.block_scale, weight.global_scale.expand(2).contiguous(), (200, 130))
    records = HopperBackend().prepare(NVFP4Weight(shards, torch.tensor([1.0, 2.0]))).data.packed
    groups, rows = records.tables(3)
    assert groups.tolist() == [[0, 3, 0], [3, 1, 0], [4, 3, 1]]
    assert rows.tolist() == [[0, 64], [64, 64], [128, 64], [192, 8], [200, 64], [264, 64], [328, 2]]


def test_which_layers_are_its_own() -> None:
    pytest.importorskip("triton")
    g = torch.Generator().manual_seed(0)
    weight = NVFP4Weight(quantize(torch.randn(8, 64, generator=g)), torch.tensor([0.5]))
    backend = HopperBackend()
    assert isinstance(backend.prepare(weight, "blackwell").data, HopperBlackwell)
    assert isinstance(backend.prepare(NVFP4Weight(weight.weight), "blackwell").data, HopperNVFP4)  # weight-only
    dense = backend.prepare(DenseWeight(torch.randn(8, 64, generator=g).bfloat16()))
    assert dense.backend == "hopper" and not isinstance(dense.data, HopperNVFP4)
    with pytest.raises(InvalidArgumentError):
        backend.prepare(weight, "exact")
