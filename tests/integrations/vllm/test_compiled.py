"""vLLM as it starts by default: compiled by Inductor, then in processes of its own with what the first run has kept.

The model's layers are weight-only, where float32 rounded in another order stays small; what W4A4 makes of it is in
test_models.py, and that an op has the same bits in compiled code in test_plugin.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from vllm import SamplingParams

from tests.integrations.vllm.conftest import engine

pytestmark = pytest.mark.checkpoint

PROMPT = [10, 20, 30, 40, 50, 60, 7]
OPTIONS = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 200}
CHILD = """
import json, sys
from vllm import LLM
from tests.integrations.vllm.test_compiled import OPTIONS, generate

if __name__ == "__main__":
    print(json.dumps(generate(LLM(sys.argv[1], **OPTIONS))), flush=True)
"""


def generate(llm: Any) -> dict[str, Any]:
    """Eight tokens, and the log-probabilities of the prompt's and of these."""
    sampling = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0, logprobs=0)
    (out,) = llm.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)
    chosen = [*out.prompt_logprobs[1:], *out.outputs[0].logprobs]
    logprobs = [next(iter(position.values())).logprob for position in chosen]
    return {"tokens": list(out.outputs[0].token_ids), "logprobs": logprobs}


def run(model: Path, cache: Path, **variables: str) -> dict[str, Any]:
    """A process that starts vLLM as it does by default, but for ``variables``."""
    environ = {k: v for k, v in os.environ.items() if k != "VLLM_CPU_OMP_THREADS_BIND"}
    environ |= {"VLLM_CACHE_ROOT": str(cache), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **variables}
    script = cache / "child.py"
    script.write_text(CHILD)
    done = subprocess.run(
        [sys.executable, str(script), str(model)], capture_output=True, text=True, env=environ, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (done.stdout + done.stderr).count("serves NVFP4 linear layers: backend ") == 1
    return dict(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))


@pytest.mark.slow
def test_compiled_twice(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = checkpoint("variants/ct_nvfp4a16")
    compiled = run(model, tmp_path)
    assert list((tmp_path / "torch_compile_cache").iterdir()), "nothing was kept"
    assert run(model, tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="1") == compiled
    with engine(model, **OPTIONS) as llm:
        eager = generate(llm)
    assert eager["tokens"] == compiled["tokens"]
    # another order of float32 sums in attention and norms: 1e-5 of logits around 30
    assert max(abs(a - b) for a, b in zip(eager["logprobs"], compiled["logprobs"], strict=True)) < 1e-3
