"""The op that other libraries trace: PyTorch's own checks of an op, names, compiled code, copies."""

from __future__ import annotations

import copy
import functools
import gc
import pickle

import pytest
import torch
from torch import library

from anyfp4.errors import InvalidArgumentError
from anyfp4.formats.nvfp4 import quantize
from anyfp4.formats.weights import DenseWeight, NVFP4Weight
from anyfp4.integrations import vllm_op
from anyfp4.integrations.linear_op import TracedLinear
from anyfp4.integrations.vllm_op import HandledLinear
from anyfp4.layers.linear import Linear
from anyfp4.testing.bitwise import assert_same_bits


def weights(n: int = 48, k: int = 64, seed: int = 0, device: str = "cpu") -> list[NVFP4Weight]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.01], device=device)
    return [NVFP4Weight(quantize(torch.randn(n, k, generator=generator).to(device)), scale) for _ in range(2)]


def layer(name: str = "model.mlp", seed: int = 0) -> TracedLinear:
    return TracedLinear(name, weights(seed=seed), numerics="native", backend="auto")


def test_gives_the_layer() -> None:
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    assert_same_bits(layer()(x), Linear(weights())(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_as_pytorch_wants_its_ops(dtype: torch.dtype) -> None:
    """Schema, fake tensors, dispatch, dynamic shapes: PyTorch's own checker."""
    held = layer()
    library.opcheck(torch.ops.anyfp4.linear.default, (torch.randn(5, 64, dtype=dtype), held.name, 96))


def test_compiles_whole_and_for_any_number_of_rows() -> None:
    held = layer()
    compiled = torch.compile(lambda x: held(x).relu() + 1, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (1, 2, 7):
        x = torch.randn(rows, 64, dtype=torch.bfloat16)
        assert_same_bits(compiled(x), held(x).relu() + 1)


@pytest.mark.parametrize("numerics", ["native", "blackwell"])
@pytest.mark.parametrize("handled", [False, True], ids=["by name", "by handle"])
def test_rows_do_not_depend_on_each_other(handled: bool, numerics: str) -> None:
    options = {"numerics": numerics, "backend": "auto"}
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    if handled:
        layer = HandledLinear(weights(), torch.device("cpu"), **options)
        bias = torch.randn(96, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
        call = functools.partial(vllm_op.call, handle=layer.handle, bias=bias, out_features=96)
        # the definition: the scaled sum in float32, then the bias, rounded once
        expected = (Linear(weights(), numerics=numerics)(x, torch.float32) + bias.float()).to(x.dtype)
    else:
        call = TracedLinear("rows", weights(), **options)
        expected = Linear(weights(), numerics=numerics)(x)
    y = call(x)
    assert_same_bits(y, expected)
    for i in range(len(x)):
        assert_same_bits(call(x[i : i + 1]), y[i : i + 1])


def test_two_models_in_one_process() -> None:
    x = torch.randn(4, 64)
    first, second = layer("model.layers.0.mlp", 1), layer("model.layers.0.mlp", 2)
    assert (first.name, second.name) == ("model.layers.0.mlp", "model.layers.0.mlp#2")
    assert_same_bits(first(x), Linear(weights(seed=1))(x))
    assert_same_bits(second(x), Linear(weights(seed=2))(x))
    name = first.name
    del first
    gc.collect()
    assert layer("model.layers.0.mlp", 3).name == name


def test_a_layer_that_is_gone() -> None:
    held = layer("short-lived")
    name = held.name
    del held
    gc.collect()
    with pytest.raises(InvalidArgumentError, match=r"short-lived.*was dropped"):
        torch.ops.anyfp4.linear(torch.randn(1, 64), name, 96)


def test_what_does_not_fit() -> None:
    held = layer()
    with pytest.raises(InvalidArgumentError, match="has 96 outputs, not 95"):
        torch.ops.anyfp4.linear(torch.randn(1, 64), held.name, 95)
    with pytest.raises(InvalidArgumentError, match="64"):
        held(torch.randn(1, 63))


def test_copies_share_and_pickles_are_refused() -> None:
    held = layer()
    assert copy.deepcopy(held) is held
    with pytest.raises(InvalidArgumentError, match="save the model as a checkpoint"):
        pickle.dumps(held)


def test_no_gradient_flows_unnoticed() -> None:
    x = torch.randn(2, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="anyfp4"):
        layer()(x).sum().backward()


def test_kinds_side_by_side() -> None:
    mixed = [*weights(), DenseWeight(torch.randn(16, 64))]
    held = TracedLinear("mixed", mixed, numerics="blackwell", backend="reference")
    x = torch.randn(3, 64)
    assert held.out_features == 112
    assert_same_bits(held(x), Linear(mixed, numerics="blackwell", backend="reference")(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("rows", [1, 16, 300])
@pytest.mark.parametrize("handled", [False, True], ids=["by name", "by handle"])
def test_in_a_cuda_graph(rows: int, handled: bool) -> None:
    own = weights(n=256, k=1088, device="cuda")
    options = {"numerics": "native", "backend": "auto"}
    if handled:
        by_handle = HandledLinear(own, torch.device("cuda"), **options)
        call = functools.partial(vllm_op.call, handle=by_handle.handle, bias=None, out_features=512)
    else:
        call = TracedLinear("captured", own, **options)
    first, second = torch.randn(2, rows, 1088, device="cuda").to(torch.bfloat16)
    call(first)  # kernels compile before the capture
    torch.cuda.synchronize()
    held = first.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(held)
    for x in (first, second):
        held.copy_(x)
        graph.replay()
        assert_same_bits(y.cpu(), Linear(own)(x).cpu())
