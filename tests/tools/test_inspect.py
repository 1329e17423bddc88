"""The report against counts made here, and that nothing in a damaged checkpoint makes it crash."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from anyfp4.errors import CheckpointFileError
from anyfp4.tools.inspect import Report, inspect, render
from tests.checkpoint.damage import CASES, Case
from tests.checkpoint.small import (
    ATTENTION,
    HIDDEN,
    INTER,
    LAYER,
    LINEARS,
    UP,
    Q,
    Small,
    ct_config,
    ct_fp8_block_group,
    ct_fp8_group,
    ct_group,
    dense_tensors,
    fp8_tensors,
    modelopt_configs,
    put,
    small,
    with_kv_scales,
)
from tests.checkpoints import FULL, REFUSED_VARIANT, VARIANTS, real_checkpoint

GATE = f"{LAYER}.mlp.gate_proj"


def text(report: Report) -> str:
    console = Console(width=200, record=True, file=None, quiet=False, no_color=True)
    with console.capture() as captured:
        console.print(render(report))
    return captured.get()


def check_consistent(report: Report, made: Small) -> None:
    """What must hold for any report: bytes and layers add up, JSON and tables can be made."""
    total = sum(t.numel() * t.element_size() for t in made.tensors.values())
    assert report.total_bytes == total == sum(kind.nbytes for kind in report.kinds)
    assert sum(kind.weights for kind in report.kinds) == report.parameters
    assert json.loads(json.dumps(report.to_dict()))["total_bytes"] == total
    assert "kinds of layers" in text(report)


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("weight_only", [False, True])
def test_report(layout: str, weight_only: bool, tmp_path: Path) -> None:
    made = small(layout, weight_only)
    calls: list[tuple[int, int]] = []
    report = inspect(made.write(tmp_path), lambda done, total: calls.append((done, total)))
    check_consistent(report, made)
    assert (report.layout, report.refusals) == (layout, ())
    assert (report.architecture, report.model_type) == ("LlamaForCausalLM", "llama")
    assert report.producer == ("modelopt 0.47.0" if layout == "modelopt" else "compressed-tensors 0.19.0")
    weights = sum(n * k for n, k in LINEARS.values())
    kinds = {kind.name: kind for kind in report.kinds}
    nvfp4 = kinds.pop("NVFP4 weight-only" if weight_only else "NVFP4 W4A4")
    assert (nvfp4.layers, nvfp4.weights) == (7, weights)
    assert nvfp4.dtypes == ("float32", "float8_e4m3fn", "uint8")
    # 4 bits a code, 8 bits a block of 16, one or two fp32 numbers a layer
    assert nvfp4.nbytes == weights // 2 + weights // 16 + 7 * 4 * (1 if weight_only else 2)
    assert nvfp4.bits_per_weight == 8 * nvfp4.nbytes / weights
    assert {name: kind.layers for name, kind in kinds.items()} == {
        "embedding bfloat16": 1,
        "norms and other vectors": 3,
    }
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] == weights // 16 + 7 * 4 * (1 if weight_only else 2)


def test_spread(tmp_path: Path) -> None:
    made = small("modelopt")
    for module in LINEARS:
        made.tensors[f"{module}.weight_scale_2"] = torch.tensor(0.5)
        made.tensors[f"{module}.input_scale"] = torch.tensor(0.125)
    made.tensors[f"{ATTENTION}.k_proj.weight_scale_2"] = torch.tensor(1.5)
    made.tensors[f"{GATE}.input_scale"] = torch.tensor(0.25)
    report = inspect(made.write(tmp_path))
    spreads = {(s.group, s.scale): (s.groups, s.differing, s.worst_ratio, s.worst) for s in report.spreads}
    assert spreads == {
        ("q/k/v", "weight"): (1, 1, 3.0, ATTENTION),
        ("q/k/v", "input"): (1, 0, 1.0, ATTENTION),
        ("gate/up", "weight"): (1, 0, 1.0, f"{LAYER}.mlp"),
        ("gate/up", "input"): (1, 1, 2.0, f"{LAYER}.mlp"),
    }
    assert re.search(r"q/k/v +│ weight +│ 1 of 1 +│ 3.000 +│ model.layers.0.self_attn", text(report))


def test_block_scales(tmp_path: Path) -> None:
    made = small()
    for module in LINEARS:
        made.tensors[f"{module}.weight_scale"].view(torch.uint8).fill_(0x38)  # 1.0
    bits = made.tensors[f"{UP}.weight_scale"].view(torch.uint8).view(-1)
    bits[:9] = torch.tensor([0x00, 0x80, 0x01, 0x07, 0x08, 0x7E, 0x7E, 0x7D, 0x04], dtype=torch.uint8)
    made.tensors[f"{Q}.weight_scale"].view(torch.uint8)[0, 0] = 0x03
    report = inspect(made.write(tmp_path))
    total = sum(n * k // 16 for n, k in LINEARS.values())
    found = report.block_scales
    assert found is not None
    assert (found.total, found.zero, found.subnormal, found.saturated) == (total, 2, 4, 2)
    worst = [(b.module, b.total, b.zero, b.subnormal, b.saturated) for b in report.worst_block_scales]
    assert worst == [(UP, INTER * HIDDEN // 16, 2, 3, 2), (Q, HIDDEN * HIDDEN // 16, 0, 1, 0)]


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_kv_cache(layout: str, tmp_path: Path) -> None:
    made = with_kv_scales(small(layout))
    report = inspect(made.write(tmp_path))
    assert report.kv_cache == "fp8"
    assert report.kv_scales is not None
    assert (report.kv_scales.layers, report.kv_scales.k, report.kv_scales.v) == (1, (0.5, 0.5), (0.25, 0.25))
    assert report.refusals == ()
    assert "fp8 (1 layers: k 0.5, v 0.25)" in text(report)


def test_mixed_kinds(tmp_path: Path) -> None:
    made = small()
    made.quantization_config = ct_config(ct_group(), ct_fp8_group(targets=["re:.*up_proj"])) | {"ignore": [Q]}
    put(made, UP, fp8_tensors(INTER, HIDDEN, 0, torch.ones(1), torch.ones(1)))
    put(made, Q, {"weight": torch.zeros(HIDDEN, HIDDEN)})
    report = inspect(made.write(tmp_path))
    check_consistent(report, made)
    kinds = {kind.name: (kind.layers, kind.weights) for kind in report.kinds}
    assert kinds["FP8 static"] == (1, INTER * HIDDEN)
    assert kinds["dense float32"] == (1, HIDDEN * HIDDEN)
    assert kinds["NVFP4 W4A4"][0] == 5
    assert report.refusals == ()


def test_block_wise_fp8(tmp_path: Path) -> None:
    """Its scales are read and checked like those of a loader."""
    made = small()
    made.quantization_config = ct_config(ct_group(), ct_fp8_block_group(targets=["re:.*up_proj"]))
    put(made, UP, fp8_tensors(INTER, HIDDEN, 0, torch.full((1, 1), 2.6e-41), None))
    report = inspect(made.write(tmp_path / "good"))
    check_consistent(report, made)
    kinds = {kind.name: (kind.layers, kind.weights) for kind in report.kinds}
    assert kinds["FP8 block-wise dynamic"] == (1, INTER * HIDDEN)
    assert report.refusals == ()
    made.tensors[f"{UP}.weight_scale"][0, 0] = -1
    report = inspect(made.write(tmp_path / "bad"))
    assert [r.error for r in report.refusals] == ["TensorError"]
    assert f"{UP}.weight_scale: the scale of block [0, 0] is -1.0" in report.refusals[0].message


def test_awq(tmp_path: Path) -> None:
    made = small("modelopt")
    made.quantization_config, made.hf_quant_config = modelopt_configs("NVFP4_AWQ")
    made.tensors[f"{Q}.pre_quant_scale"] = torch.ones(HIDDEN)
    report = inspect(made.write(tmp_path))
    assert report.pre_quant_scales == (Q,)
    assert report.refusals == ()


def test_unquantized(tmp_path: Path) -> None:
    made = Small(dense_tensors() | {f"{m}.weight": torch.zeros(shape) for m, shape in LINEARS.items()})
    report = inspect(made.write(tmp_path))
    check_consistent(report, made)
    assert (report.layout, report.block_scales, report.spreads, report.refusals) == ("none", None, (), ())
    assert {kind.name: kind.layers for kind in report.kinds}["dense float32"] == 7


def test_all_refusals_are_reported(tmp_path: Path) -> None:
    """Loading stops at the first; the report has every one, and still counts what is sound."""
    made = small()
    del made.tensors[f"{Q}.weight_scale"]
    made.tensors[f"{UP}.weight_scale"].view(torch.uint8)[0, 0] = 0x7F
    made.tensors[f"{GATE}.weight_global_scale"].zero_()
    made.tensors[f"{ATTENTION}.k_scale"] = torch.ones(1)
    report = inspect(made.write(tmp_path))
    check_consistent(report, made)
    for pattern in (
        rf"{Q}.weight_scale: is missing",
        rf"{UP}.weight_scale: block scale \[0, 0\] is nan",
        rf"{GATE}.weight_global_scale: .*is (0.0|inf)",
        r"k_scale: is not expected",
    ):
        assert sum(bool(re.search(pattern, refusal.message)) for refusal in report.refusals) == 1, pattern
    assert len(report.refusals) == 4
    assert {kind.name: kind.layers for kind in report.kinds}["refused"] == 1
    assert "refused (4)" in text(report)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.layout}: {case.name}")
def test_damage_is_reported(case: Case, tmp_path: Path) -> None:
    report = inspect(case.write(tmp_path / "model"))
    found = [refusal.message for refusal in report.refusals if refusal.error == case.error.__name__]
    assert any(re.search(case.match, message) for message in found), report.refusals
    json.dumps(report.to_dict(), allow_nan=False)
    assert "refused" in text(report)


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFileError, match="is not a folder"):
        inspect(tmp_path / "nowhere")


@pytest.mark.checkpoint
@pytest.mark.parametrize("name", [*FULL, *VARIANTS])
def test_real(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = real_checkpoint(name, tmp_path_factory)
    raw = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    report = inspect(folder)
    check_consistent(report, Small(raw))
    assert report.refusals == ()
    assert report.architecture == "LlamaForCausalLM"
    scales = [t.view(torch.uint8) & 0x7F for n, t in raw.items() if n.endswith(".weight_scale")]

    def count(test: Callable[[torch.Tensor], torch.Tensor]) -> int:
        return sum(int(test(bits).sum()) for bits in scales)

    assert report.block_scales is not None
    assert report.block_scales.total == sum(bits.numel() for bits in scales)
    assert report.block_scales.zero == count(lambda bits: bits == 0)
    assert report.block_scales.subnormal == count(lambda bits: (bits > 0) & (bits < 8))
    assert report.block_scales.saturated == count(lambda bits: bits == 0x7E)
    nvfp4 = next(kind for kind in report.kinds if kind.name.startswith("NVFP4"))
    assert nvfp4.layers == len(scales)
    assert 4.5 <= nvfp4.bits_per_weight < 4.51
    # both producers gave the projections of a group one scale
    assert all(spread.differing == 0 for spread in report.spreads)
    assert bool(report.pre_quant_scales) == ("awq" in name)
    assert (report.kv_scales is not None) == ("fp8kv" in name)


@pytest.mark.checkpoint
def test_real_refused_variant(tmp_path_factory: pytest.TempPathFactory) -> None:
    report = inspect(real_checkpoint(REFUSED_VARIANT, tmp_path_factory))
    assert [refusal.error for refusal in report.refusals] == ["UnsupportedError"]
    assert "W4A8_NVFP4_FP8" in report.refusals[0].message
    assert report.algorithm == "modelopt W4A8_NVFP4_FP8"
    assert next(kind for kind in report.kinds if kind.name == "refused").layers == 7
