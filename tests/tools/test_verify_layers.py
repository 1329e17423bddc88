"""verify --layers: it names the op that depends on the other rows, and no other."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anyfp4 import LLM, EngineConfig
from anyfp4.backends.base import Backend
from anyfp4.entrypoints import cli
from anyfp4.layers.linear import Linear
from anyfp4.models.decoder import Decoder
from anyfp4.tools.verify_layers import OpCheck, check_layers
from anyfp4.tools.verify_rows import BatchRows, first_difference
from tests.tools import broken_ops

OPS = [
    *("input_norm", "qkv", "rope_q", "rope_k", "write_kv", "attention", "o"),
    *("post_attention_norm", "gate_up", "silu_mul", "down"),
]
NAMES = [
    "embedding",
    *(f"layers.{i}.{op}" for i in range(2) for op in OPS),
    *("norm", "lm_head", "log_softmax", "sample", "forward"),
]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Decoder:
    return LLM(tiny_model, config=EngineConfig(max_num_seqs=1)).engine.model


def names(checks: list[OpCheck]) -> list[str]:
    return [c.name for c in checks if c.difference is not None]


def test_an_invariant_model_passes(model: Decoder) -> None:
    checks = list(check_layers(model, threads=(1, 2)))
    assert [c.name for c in checks] == NAMES
    assert names(checks) == []
    # 64 rows: alone, in chunks, reversed, and 160 rows at once
    assert {c.rows for c in checks if c.op == "silu_mul"} == {64 * 3 + 160}


class NoisyLinear:
    """A linear that adds a last bit to its first row if there are more than ``rows``."""

    def __init__(self, linear: Linear, rows: int) -> None:
        self.linear, self.rows = linear, rows
        self.parts: list[Any] = []  # no backend runs it by itself, so the model runs op by op

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        y = self.linear(x, out_dtype).clone()
        if x.shape[0] > self.rows:
            y.view({2: torch.int16, 4: torch.int32}[y.element_size()])[0, 3] ^= 1
        return y


@pytest.mark.parametrize("rows", [1, 8, 100])
@pytest.mark.parametrize(("layer", "op"), [(0, "gate_up"), (1, "down")])
def test_one_bad_linear_is_named(model: Decoder, layer: int, op: str, rows: int) -> None:
    block = model.blocks[layer]
    noisy: Any = NoisyLinear(getattr(block.mlp, op), rows)
    blocks = list(model.blocks)
    blocks[layer] = dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, **{op: noisy}))
    checks = list(check_layers(dataclasses.replace(model, blocks=blocks)))
    assert names(checks)[0] == f"layers.{layer}.{op}"
    # only the whole model may differ besides
    assert set(names(checks)[1:]) <= {"forward"}
    difference = next(c.difference for c in checks if c.difference is not None)
    assert difference.column == 3 and int(difference.batch_bits, 16) ^ int(difference.other_bits, 16) == 1


def test_attention_that_depends_on_the_batch_is_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = LLM(tiny_model, backend="reference", config=EngineConfig(max_num_seqs=1)).engine.model
    monkeypatch.setattr(Backend, "attention", broken_ops.attention_by_batch)
    monkeypatch.setattr("anyfp4.tools.verify_layers._MANY", 12)
    checks = list(check_layers(slow, lengths=(1, 6)))
    assert names(checks)[:2] == ["layers.0.attention", "layers.1.attention"]


def test_a_linear_by_rows_is_named_in_the_command(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Backend, "linear", broken_ops.linear_by_rows)
    # few rows: the reference sums exactly, and slowly
    monkeypatch.setattr("anyfp4.entrypoints.verify.check_layers", functools.partial(check_layers, lengths=(1, 4)))
    monkeypatch.setattr("anyfp4.tools.verify_layers._MANY", 12)
    words = ["verify", str(tiny_model), "--backend", "reference", "--layers", "--trials", "0"]

    def call(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["anyfp4", *words, *more])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().out

    code, out = call()
    assert code == 1 and "first culprit: layers.0.qkv, row" in out and "DIFFERS" in out
    assert "NOT batch-invariant: the op layers.0.qkv depends on the other rows of its batch" in out
    code, out = call("--json")
    found = json.loads(out)
    assert code == 1 and found["verdict"] == "not invariant"
    assert next(c["name"] for c in found["layers"] if c["difference"]) == "layers.0.qkv"


def test_a_bad_whole_step_is_named(model: Decoder) -> None:
    """All ops are right, but the model runs them by another path: only the last check can see it."""

    class Elsewhere(Decoder):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return -super().forward(*args, **kwargs)

    own = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.init}
    checks = list(check_layers(Elsewhere(**own)))
    assert names(checks) == ["forward"]
    difference = checks[-1].difference
    assert difference is not None and difference.variant == "op by op"


def test_rows_become_batches() -> None:
    rows = BatchRows([2, 3], torch.device("cpu"))
    assert rows.owner == [0, 0, 1, 1, 1] and rows.positions.tolist() == [0, 1, 0, 1, 2]
    whole = rows.batch(range(5), 2)
    assert whole.query_start.tolist() == [0, 2, 5] and whole.context_len.tolist() == [2, 3]
    assert whole.block_table.tolist() == [[2, 0], [0, 1]]
    # token 1 of sequence 0, then tokens 1 and 2 of sequence 1 as one chunk, then token 0 of sequence 1
    some = rows.batch([1, 3, 4, 2], 2)
    assert some.query_start.tolist() == [0, 1, 3, 4] and some.context_len.tolist() == [2, 3, 1]
    assert some.slots.tolist() == [5, 1, 2, 0]


def test_first_difference_sees_signs_and_nans() -> None:
    a = torch.tensor([[0.0, 1.0], [float("nan"), 2.0]])
    rows = torch.tensor([4, 9])
    assert first_difference(a, a.clone(), rows, "x") is None
    b = a.clone()
    b[1, 1] = -2.0
    found = first_difference(a, b, rows, "x")
    assert found is not None and (found.row, found.column, found.batch, found.other) == (9, 1, 2.0, -2.0)
    assert (found.batch_bits, found.other_bits) == ("0x40000000", "0xc0000000")
    b[0, 0] = -0.0
    found = first_difference(a, b, rows, "x")
    assert found is not None and (found.row, found.column) == (4, 0)
