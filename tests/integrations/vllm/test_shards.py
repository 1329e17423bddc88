"""A checkpoint whose gate and up have global scales two times apart: nothing is lost with anyfp4, much without."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from anyfp4.testing.bitwise import assert_same_bits
from tests.checkpoints import checkpoints_root
from tests.integrations.vllm.conftest import engine, layers_of
from tests.integrations.vllm.test_models import prompt_losses

pytestmark = pytest.mark.checkpoint
CONTEXT = 128


def write_rescaled(source: Path, out: Path) -> Path:
    """The same model: in every layer the block scales of up_proj are halved, exactly, and so is its global divisor."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name in list(tensors):
            if name.endswith("up_proj.weight_scale"):
                halved = (tensors[name].float() / 2).to(torch.float8_e4m3fn)
                assert torch.equal(halved.float() * 2, tensors[name].float())
                tensors[name] = halved
            elif name.endswith("up_proj.weight_global_scale"):
                tensors[name] = tensors[name] / 2
        save_file(tensors, out / file.name, metadata={"format": "pt"})
    return out


@pytest.fixture
def own_kernels(anyfp4_variables: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """vLLM without anyfp4: its emulation of NVFP4, which it offers for GPUs only, allowed on the CPU."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    anyfp4_variables.setenv("ANYFP4_VLLM", "off")
    anyfp4_variables.setitem(linear._POSSIBLE_NVFP4_KERNELS, PlatformEnum.CPU, [linear.EmulationNvFp4LinearKernel])
    return anyfp4_variables


def losses(model: Path, tokens: list[int], plugged: bool) -> np.ndarray[Any, Any]:
    with engine(model, dtype="float32") as llm:
        assert bool(layers_of(llm)) == plugged
        return np.array([loss for loss, _ in prompt_losses(llm, tokens)])


@pytest.fixture
def models(checkpoint: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path, list[int]]:
    """The checkpoint, the rescaled one, and a text."""
    from tokenizers import Tokenizer

    folder = checkpoint("ct_nvfp4")
    text = (checkpoints_root() / "eval.txt").read_text()[: 20 * CONTEXT]
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:CONTEXT]
    return folder, write_rescaled(folder, tmp_path / "rescaled"), tokens


def test_shards_keep_their_scales(
    models: tuple[Path, Path, list[int]], capsys: pytest.CaptureFixture[str], anyfp4_variables: pytest.MonkeyPatch
) -> None:
    folder, rescaled, tokens = models
    before, after = losses(folder, tokens, True), losses(rescaled, tokens, True)
    assert_same_bits(torch.from_numpy(after), torch.from_numpy(before))
    with capsys.disabled():
        print(f"\nwith anyfp4: perplexity {np.exp(before.mean()):.4f}, rescaled {np.exp(after.mean()):.4f}")


def test_what_vllm_does_alone(
    models: tuple[Path, Path, list[int]], capsys: pytest.CaptureFixture[str], own_kernels: pytest.MonkeyPatch
) -> None:
    folder, rescaled, tokens = models
    before, after = losses(folder, tokens, False), losses(rescaled, tokens, False)
    with capsys.disabled():
        print(f"\nwithout anyfp4: perplexity {np.exp(before.mean()):.4f}, rescaled {np.exp(after.mean()):.4f}")
    assert after.mean() > 1.1 * before.mean()
