"""Choosing a backend: order, explicit choice, reasons."""

from __future__ import annotations

import pytest
import torch

import anyfp4
from anyfp4.backends import registry
from anyfp4.errors import BackendError, InvalidArgumentError
from anyfp4.formats.weights import NVFP4Weight
from anyfp4.ops.linear import linear
from anyfp4.testing.bitwise import assert_same_bits

CPU = torch.device("cpu")


class Broken(registry.Backend):
    name = "broken"

    def why_not(self, device: torch.device, shape: tuple[int, int] | None = None, numerics: str = "native") -> str:
        return "it has no wheels"


def test_the_first_that_can_run_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.PREFERENCE, "cpu", (Broken(), registry.REFERENCE))
    assert registry.select(CPU) is registry.REFERENCE
    rows = {row.name: row for row in registry.table(CPU)}
    assert rows["reference"].chosen and rows["reference"].reason is None
    assert rows["broken"].reason == "it has no wheels"


def test_an_explicit_choice_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.PREFERENCE, "cpu", (Broken(), registry.REFERENCE))
    with pytest.raises(BackendError, match="'broken' cannot run here: it has no wheels"):
        registry.select(CPU, requested="broken")
    with pytest.raises(BackendError, match=r"unknown backend 'brokn'; there are: .*broken.*reference"):
        registry.select(CPU, requested="brokn")


def test_if_none_can_run_every_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.PREFERENCE, "cpu", (Broken(),))
    with pytest.raises(BackendError, match="no backend can run on cpu: broken: it has no wheels"):
        registry.select(CPU)


def test_functional_linear() -> None:
    g = torch.Generator().manual_seed(0)
    q = anyfp4.quantize(torch.randn(8, 32, generator=g))
    x, bias = torch.randn(5, 32, generator=g).bfloat16(), torch.randn(8, generator=g)
    expected = linear(x, NVFP4Weight(q, torch.tensor([0.003]), None, bias))
    assert_same_bits(anyfp4.linear(x, q, bias, input_global_scale=0.003), expected)
    assert_same_bits(anyfp4.linear(x, q, bias, input_global_scale=0.003)[2:3], expected[2:3])
    assert_same_bits(anyfp4.linear(x, q), linear(x, NVFP4Weight(q)))
    with pytest.raises(InvalidArgumentError):
        anyfp4.linear(x[:, :16], q)
