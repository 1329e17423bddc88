"""The vLLM plugin without vLLM: what it says and leaves alone where vLLM is missing or another one, and who decides."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from anyfp4.backends import registry
from anyfp4.backends.triton import TritonBackend
from anyfp4.errors import EnvironmentVariableError
from anyfp4.integrations import vllm as plugin
from anyfp4.integrations import vllm_kernel, vllm_threads
from anyfp4.integrations.vllm_policy import KERNEL
from tests.integrations.fake_vllm import (
    COMPRESSED_TENSORS,
    LINEAR,
    QUANTIZATION,
    OwnKernel,
    Platform,
    PlatformEnum,
    install,
    method,
)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("ANYFP4_")]:
        monkeypatch.delenv(name)
    plugin._say_left.cache_clear()
    vllm_kernel.announce.cache_clear()


def snapshot(modules: dict[str, Any]) -> dict[str, Any]:
    """Everything that the plugin could change."""
    found: dict[str, Any] = {}
    for name, module in modules.items():
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = dict(value) if isinstance(value, dict) and key.startswith("_POSS") else value
            if isinstance(value, type):
                found |= {f"{name}.{key}.{k}": v for k, v in vars(value).items() if callable(v)}
    return found


def test_entry_point_is_declared() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"anyfp4": "anyfp4.integrations.vllm:register"}
    assert callable(plugin.register)


def test_without_vllm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    plugin.register()
    (record,) = caplog.records
    assert "which stays as it is: vllm.model_executor.kernels.linear cannot be imported" in record.getMessage()


@pytest.mark.parametrize(
    ("module", "name", "match"),
    [
        (LINEAR, "init_nvfp4_linear_kernel", f"{LINEAR} has no init_nvfp4_linear_kernel"),
        (LINEAR, "NvFp4LinearKernel", f"{LINEAR} has no NvFp4LinearKernel"),
        (LINEAR, "_LINEAR_BACKEND_KERNEL_MAP", f"{LINEAR} has no _LINEAR_BACKEND_KERNEL_MAP"),
        (COMPRESSED_TENSORS, "CompressedTensorsW4A4Fp4", f"{COMPRESSED_TENSORS} has no CompressedTensorsW4A4Fp4"),
        (
            f"{QUANTIZATION}.modelopt",
            "ModelOptLinearMethod",
            "has no ModelOptLinearMethod or ModelOptNvFp4LinearMethod",
        ),
        ("vllm.envs", "VLLM_DISABLED_KERNELS", "vllm.envs has no VLLM_DISABLED_KERNELS"),
    ],
)
def test_another_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, module: str, name: str, match: str
) -> None:
    """One line with what is missing; all or nothing."""
    modules = install(monkeypatch, Platform("cpu"))
    delattr(modules[module], name)
    before = snapshot(modules)
    plugin.register()
    (record,) = caplog.records
    assert match in record.getMessage() and "\n" not in record.getMessage()
    assert snapshot(modules) == before


def test_what_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = install(monkeypatch, Platform("cpu"))
    before = snapshot(modules)
    plugin.register()
    after = snapshot(modules)
    assert sorted(name.rsplit(".", 1)[1] for name in after if after[name] != before[name]) == sorted(
        [*["init_nvfp4_linear_kernel"] * 3, "_POSSIBLE_NVFP4_KERNELS"]
        + ["create_weights", "process_weights_after_loading"] * 2
    )
    plugin.register()
    assert snapshot(modules) == after


def test_classes_of_vllm_0_26(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    old = {"ModelOptNvFp4LinearMethod": method(), "ModelOptNvFp4W4A16LinearMethod": method()}
    before = {name: owner.create_weights for name, owner in old.items()}
    install(monkeypatch, Platform("cpu"), **old)
    plugin.register()
    assert not caplog.records
    assert all(owner.create_weights is not before[name] for name, owner in old.items())


def test_kernel_that_vllm_0_26_does_not_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelOpt's weight-only layers make Marlin themselves; where the user wants vLLM's kernels, they still do."""

    class Marlin:
        def __init__(self, config: Any) -> None: ...

    old = {"ModelOptNvFp4LinearMethod": method(), "ModelOptNvFp4W4A16LinearMethod": method()}
    modules = install(monkeypatch, Platform("cuda", 90), **old, MarlinNvFp4LinearKernel=Marlin)
    monkeypatch.setattr(registry, "select", lambda *_, **__: TritonBackend())
    plugin.register()
    make = modules[f"{QUANTIZATION}.modelopt"].MarlinNvFp4LinearKernel
    ours = make(object())
    assert type(ours).__name__ == KERNEL and ours.weight_only
    config = modules["vllm.config"].get_current_vllm_config_or_none().kernel_config
    config.linear_backend = "own"
    assert type(make(object())) is Marlin
    config.linear_backend = "auto"
    monkeypatch.setenv("ANYFP4_VLLM", "off")
    assert type(make(object())) is Marlin


def chosen(modules: dict[str, Any], weight_only: bool = False) -> str:
    """The same by every name under which vLLM's modules hold the choice."""
    names = {type(m.init_nvfp4_linear_kernel(use_a16=weight_only)).__name__ for n, m in modules.items() if "exec" in n}
    assert len(names) == 1
    return names.pop()


@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize(
    ("platform", "variable", "ours"),
    [
        (Platform("cpu"), "auto", True),
        (Platform("cpu"), "off", False),
        (Platform("cuda", 80), "auto", True),
        (Platform("cuda", 90), "auto", True),
        (Platform("cuda", 90), "off", False),
        (Platform("cuda", 100), "auto", False),
        (Platform("cuda", 120), "auto", False),
        (Platform("cuda", 120), "always", True),
        (Platform("rocm", 94), "auto", True),
        (Platform("xpu"), "always", False),
    ],
    ids=lambda v: f"{v.kind}{v.capability or ''}" if isinstance(v, Platform) else str(v),
)
def test_who_decides(
    monkeypatch: pytest.MonkeyPatch, platform: Platform, variable: str, ours: bool, weight_only: bool
) -> None:
    monkeypatch.setattr(registry, "select", lambda *_, **__: TritonBackend())
    modules = install(monkeypatch, platform)
    plugin.register()
    monkeypatch.setenv("ANYFP4_VLLM", variable)
    assert chosen(modules, weight_only) == (KERNEL if ours else OwnKernel.__name__)


def test_vllms_own_choice_wins(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm.anyfp4")
    monkeypatch.setattr(registry, "select", lambda *_, **__: TritonBackend())
    monkeypatch.setenv("ANYFP4_VLLM", "always")
    modules = install(monkeypatch, Platform("cuda", 90))
    plugin.register()
    config = modules["vllm.config"].get_current_vllm_config_or_none().kernel_config
    config.linear_backend = "of another kind of layer"
    assert chosen(modules) == KERNEL
    config.linear_backend = "own"
    assert chosen(modules) == OwnKernel.__name__
    config.linear_backend, config.linear_backend_per_quant = "auto", {"nvfp4_w4a16": "own"}
    assert (chosen(modules), chosen(modules, True)) == (KERNEL, OwnKernel.__name__)
    config.linear_backend_per_quant = None
    modules["vllm.envs"].VLLM_DISABLED_KERNELS = [KERNEL]  # type: ignore[attr-defined]
    assert chosen(modules) == OwnKernel.__name__
    assert [r.getMessage().split(": ", 1)[1] for r in caplog.records if "leaves" in r.getMessage()] == [
        "vLLM was told to use the linear backend 'own'",
        f"VLLM_DISABLED_KERNELS names {KERNEL}",
    ]


def test_no_fast_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where anyfp4 has only its reference, a GPU is left to vLLM, unless the user says otherwise; a CPU is not."""
    monkeypatch.setattr(registry, "select", lambda *_, **__: registry.REFERENCE)
    modules = install(monkeypatch, Platform("cuda", 90))
    plugin.register()
    assert chosen(modules) == OwnKernel.__name__
    monkeypatch.setenv("ANYFP4_BACKEND", "reference")
    assert chosen(modules) == KERNEL
    modules = install(monkeypatch, Platform("cpu"))
    plugin.register()
    assert chosen(modules) == KERNEL


def test_bad_variable(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Does not stop vLLM from starting; an NVFP4 layer is where it must be right."""
    modules = install(monkeypatch, Platform("cpu"))
    monkeypatch.setenv("ANYFP4_NUMERICS", "exact")
    plugin.register()
    assert not caplog.records
    with pytest.raises(EnvironmentVariableError, match="ANYFP4_NUMERICS='exact'"):
        modules[LINEAR].init_nvfp4_linear_kernel()


def test_first_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = install(monkeypatch, Platform("cpu"))
    plugin.register()
    kernels = modules[LINEAR]._POSSIBLE_NVFP4_KERNELS
    assert {p: [k.__name__ for k in ks] for p, ks in kernels.items()} == {
        PlatformEnum.CPU: [KERNEL],
        PlatformEnum.CUDA: [KERNEL, "OwnKernel"],
        PlatformEnum.ROCM: [KERNEL, "OwnKernel"],
    }
    assert kernels[PlatformEnum.CPU][0].is_supported() == (True, None)
    monkeypatch.setenv("ANYFP4_VLLM", "off")
    assert kernels[PlatformEnum.CPU][0].is_supported() == (False, "ANYFP4_VLLM=off")


def test_a_method_that_the_plugin_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel gets what every kernel of vLLM gets: merged scales."""
    install(monkeypatch, Platform("cpu"))
    layer = torch.nn.Module()
    layer.logical_widths = [2, 3]
    layer.weight_global_scale = torch.nn.Parameter(torch.tensor(0.5))
    scales = vllm_kernel._merged(layer, None)
    assert scales.weight.tolist() == [0.5, 0.5] and scales.input is None
    layer.input_global_scale = torch.nn.Parameter(torch.tensor(0.25))
    assert vllm_kernel._merged(layer, None).input.tolist() == [0.25, 0.25]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("environ", "cpus"),
    [
        ({}, None),
        ({"OMP_PLACES": "cores"}, None),
        ({"OMP_PLACES": "{0,2}", "OMP_PROC_BIND": "true"}, {0, 2}),
        ({"GOMP_CPU_AFFINITY": "1 3"}, {1, 3}),
        ({"KMP_AFFINITY": "granularity=fine,explicit,proclist=[4,5,6]"}, {4, 5, 6}),
        ({"KMP_AFFINITY": "compact"}, None),
    ],
)
def test_processors_that_vllm_gives(environ: dict[str, str], cpus: set[int] | None) -> None:
    assert vllm_threads.bound_processors(environ) == cpus


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no processor affinity on this system")
@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [0])(0)) < 2, reason="one processor")
def test_threads_use_all_of_them() -> None:
    """A main thread that is pinned to one processor starts threads that may run on all of them, and stays pinned."""
    code = """
import os, torch
from anyfp4 import envs
from anyfp4.backends.cpu import CpuBackend
from anyfp4.integrations import vllm_threads
cpus = os.sched_getaffinity(0)
os.environ["OMP_PLACES"] = "{" + ",".join(map(str, sorted(cpus))) + "}"
backend = CpuBackend()
if backend.why_not(torch.device("cpu")) is None:
    os.sched_setaffinity(0, {min(cpus)})
    before = set(os.listdir("/proc/self/task"))
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does
    vllm_threads.ready(backend, envs.read())
    started = set(os.listdir("/proc/self/task")) - before
    assert os.sched_getaffinity(0) == {min(cpus)}
    assert len(started) >= len(cpus) - 1, started  # torch may start one of its own
    assert all(os.sched_getaffinity(int(t)) == cpus for t in started)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done", done.stderr
