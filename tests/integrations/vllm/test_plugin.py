"""The plugin in a real vLLM: how it is found, what it changes, who decides, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

import vllm

from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.errors import EnvironmentVariableError, InvalidArgumentError, TensorError, UnsupportedError
from anyfp4.integrations import vllm as plugin
from anyfp4.integrations import vllm_policy
from anyfp4.integrations.vllm_kernel import Names, created, note
from anyfp4.layers.linear import Linear
from anyfp4.testing.bitwise import assert_same_bits
from tests.integrations.vllm.conftest import engine, layers_of


@pytest.fixture(autouse=True)
def registered(anyfp4_variables: pytest.MonkeyPatch) -> None:
    plugin.register()


def generate(llm: Any) -> list[int]:
    sampling = vllm.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    (output,) = llm.generate({"prompt_token_ids": [10, 20, 30]}, sampling, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def test_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.plugins import load_plugins_by_group

    assert "anyfp4" in [e.name for e in entry_points(group="vllm.general_plugins")]
    assert load_plugins_by_group("vllm.general_plugins")["anyfp4"] is plugin.register
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert "anyfp4" not in load_plugins_by_group("vllm.general_plugins")


def test_a_second_time_changes_nothing() -> None:
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization import modelopt

    def state() -> list[Any]:
        # two classes, of which this is one, before vLLM 0.30
        owner = getattr(modelopt, "ModelOptLinearMethod", None) or modelopt.ModelOptNvFp4LinearMethod
        lists = [list(kernels) for kernels in linear._POSSIBLE_NVFP4_KERNELS.values()]
        return [linear.init_nvfp4_linear_kernel, modelopt.init_nvfp4_linear_kernel, owner.create_weights, *lists]

    before = state()
    plugin.register()
    assert state() == before
    assert linear.init_nvfp4_linear_kernel is modelopt.init_nvfp4_linear_kernel
    for kernels in before[3:]:
        assert [k.__name__ for k in kernels].count(vllm_policy.KERNEL) == 1 and kernels[
            0
        ].__name__ == vllm_policy.KERNEL


@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("invariant", ["0", "1"])
def test_chosen_where_vllm_has_nothing(monkeypatch: pytest.MonkeyPatch, weight_only: bool, invariant: str) -> None:
    """On the CPU vLLM raises, and with VLLM_BATCH_INVARIANT=1 it emulates W4A4 and raises for weight-only layers."""
    from vllm.model_executor.kernels import linear

    monkeypatch.setenv("VLLM_BATCH_INVARIANT", invariant)
    assert type(linear.init_nvfp4_linear_kernel(use_a16=weight_only)).__name__ == vllm_policy.KERNEL
    monkeypatch.setenv("ANYFP4_VLLM", "off")
    if invariant == "1" and not weight_only:
        assert type(linear.init_nvfp4_linear_kernel()) is linear.EmulationNvFp4LinearKernel
    else:
        with pytest.raises(ValueError, match=r"not support|Failed to find"):
            linear.init_nvfp4_linear_kernel(use_a16=weight_only)


def test_a_bad_variable_stops_the_first_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.kernels import linear

    monkeypatch.setenv("ANYFP4_VLLM", "yes")
    with pytest.raises(EnvironmentVariableError, match="ANYFP4_VLLM='yes': must be one of auto, always, off"):
        linear.init_nvfp4_linear_kernel()


def test_a_kernel_that_the_user_names_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.config.kernel import KernelConfig
    from vllm.model_executor.kernels import linear

    config = VllmConfig(kernel_config=KernelConfig(linear_backend="emulation"))
    with set_current_vllm_config(config):
        assert vllm_policy.why_not_asked(False) is None  # vLLM has no emulation for CPUs
        there = [linear.EmulationNvFp4LinearKernel]
        monkeypatch.setitem(linear._POSSIBLE_NVFP4_KERNELS, vllm.platforms.PlatformEnum.CPU, there)
        assert vllm_policy.why_not_asked(False) == "vLLM was told to use the linear backend 'emulation'"
        assert type(linear.init_nvfp4_linear_kernel()) is linear.EmulationNvFp4LinearKernel
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", vllm_policy.KERNEL)
    assert type(linear.init_nvfp4_linear_kernel()) is linear.EmulationNvFp4LinearKernel


@pytest.mark.checkpoint
def test_only_some_layers_quantized(checkpoint: Callable[[str], Path]) -> None:
    """ModelOpt with globs in its excludes: attention stays vLLM's."""
    with engine(checkpoint("variants/modelopt_nvfp4_mlponly"), skip_tokenizer_init=True) as llm:
        assert sorted(layers_of(llm)) == ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_up_proj"]
        assert len(generate(llm)) == 4


@pytest.mark.checkpoint
def test_random_weights(checkpoint: Callable[[str], Path]) -> None:
    """What vLLM's benchmarks load."""
    with engine(checkpoint("variants/modelopt_nvfp4"), load_format="dummy", skip_tokenizer_init=True) as llm:
        assert len(layers_of(llm)) == 4 and len(generate(llm)) == 4


@pytest.mark.checkpoint
def test_compiled_layer(checkpoint: Callable[[str], Path]) -> None:
    """One op in the graph, for any number of rows; the bits of the eager call, bias included."""
    with engine(checkpoint("variants/ct_nvfp4"), skip_tokenizer_init=True) as llm:
        layer = layers_of(llm)["model.layers.0.mlp.gate_up_proj"]
        bias = torch.randn(2 * 1536, dtype=torch.bfloat16)
        graphs = []

        def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
            graphs.append([n.target for n in graph.graph.nodes if "anyfp4" in str(n.target)])
            return graph.forward

        compiled = torch.compile(
            lambda x, b: layer.quant_method.apply(layer, x, b), backend=backend, fullgraph=True, dynamic=True
        )
        for rows in (2, 5):
            x = torch.randn(rows, 576, dtype=torch.bfloat16)
            assert_same_bits(compiled(x, bias), layer.quant_method.apply(layer, x, bias))
        assert [len(ops) for ops in graphs] == [1]
        with pytest.raises(InvalidArgumentError, match="vLLM has moved or copied the module's weight"):
            torch.ops.anyfp4.handled_linear(x, layer.weight.clone(), bias, 2 * 1536)


@pytest.mark.checkpoint
def test_output_layer_and_its_padding(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A quantized lm_head of 250 rows, which vLLM pads to 256."""
    folder = tmp_path / "quantized_head"
    folder.mkdir()
    source = checkpoint("variants/modelopt_nvfp4")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["model.embed_tokens"]
    config |= {"tie_word_embeddings": False, "vocab_size": 250}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        tensor = tensors[f"model.layers.0.mlp.gate_proj.{suffix}"]
        tensors[f"lm_head.{suffix}"] = (tensor[:250] if tensor.dim() == 2 else tensor).clone()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:250].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with engine(folder, skip_tokenizer_init=True) as llm, Checkpoint(folder) as own:
        head = layers_of(llm)["lm_head"]
        x = torch.randn(3, 576, dtype=torch.bfloat16)
        y = head.quant_method.apply(head, x, None)
        assert y.shape == (3, 256) and not y[:, 250:].any()
        assert_same_bits(y[:, :250].contiguous(), Linear([own.linear("lm_head")])(x))
        assert max(generate(llm)) < 250


def test_a_scale_that_is_missing() -> None:
    layer = torch.nn.Module()
    layer.input_size_per_partition, layer.prefix = 64, "model.layers.0.mlp.gate_up_proj"
    layer.weight_scale_2, layer.input_scale = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    names = Names("weight_scale_2", "input_scale", False)
    created(layer, names, False)
    layer.weight_scale_2.data.copy_(torch.tensor([0.5, 0.25]))
    layer.input_scale.data[0] = 0.5
    with pytest.raises(TensorError, match=r"gate_up_proj\.input_scale: a shard's global scale was not in"):
        note(layer, names, False)
    layer.input_scale.data.fill_(0.0)
    with pytest.raises(TensorError, match=r"gate_up_proj\.input_scale: a shard's global scale is not positive"):
        note(layer, names, False)


def test_a_part_of_k_that_is_no_block() -> None:
    layer = torch.nn.Module()
    layer.input_size_per_partition = 72
    layer.prefix = "model.layers.0.self_attn.o_proj"
    with pytest.raises(UnsupportedError, match=r"o_proj: a tensor-parallel part of 72 columns is not a multiple of 16"):
        created(layer, Names("weight_scale_2", "input_scale", False), False)


def test_weights_loaded_anew(checkpoint: Callable[[str], Path]) -> None:
    """vLLM's reload keeps a module's tensors and copies new values in: the same handle then finds the new weights."""
    with engine(checkpoint("variants/ct_nvfp4"), skip_tokenizer_init=True) as llm:
        before = generate(llm)
        layer = layers_of(llm)["model.layers.0.mlp.gate_up_proj"]
        x, handle = torch.randn(3, 576), layer.weight.data_ptr()
        y = layer.quant_method.apply(layer, x, None)
        llm.collective_rpc("reload_weights")
        assert layer.weight.data_ptr() == handle
        assert_same_bits(layer.quant_method.apply(layer, x, None), y)
        assert_same_bits(torch.ops.anyfp4.handled_linear(x, layer.weight, None, y.shape[1]), y)
        assert generate(llm) == before
