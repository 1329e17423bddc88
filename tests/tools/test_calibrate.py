from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.errors import CheckpointConfigError, CheckpointFileError, InvalidArgumentError
from anyfp4.tools.calibrate import Calibration, calibrate_inputs
from anyfp4.tools.calibration_text import DIALOGUES, PASSAGES
from tests.checkpoint.gguf_files import TEXT
from tests.tools.test_quantize import MODULES, model_folder

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


def run(folder: Path, text: Path | None = None, **options: Any) -> Calibration:
    with Checkpoint(folder) as checkpoint:
        return calibrate_inputs(checkpoint, MODULES, text, **options)


def whole_model_amax(folder: Path, windows: list[list[int]]) -> dict[str, float]:
    """The same with the whole model at once, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    amax: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            amax[name] = max(amax.get(name, 0.0), float(inputs[0].abs().max()))

        return hook

    for name in MODULES:
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    with torch.inference_mode():
        for window in windows:
            model(torch.tensor([window]))
    return amax


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_agrees_with_the_whole_model(tmp_path: Path, architecture: str) -> None:
    folder = model_folder(tmp_path / "m", architecture)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    found = run(folder, text, window_tokens=100, max_windows=3)
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    windows = [tokens[i : i + 100] for i in (0, 100, 200)]
    assert (found.windows, found.tokens, found.text) == (3, 300, str(text))
    assert found.notes == ()
    # the same operations of the same library, in the same order
    assert found.input_amax == whole_model_amax(folder, windows)
    assert set(found.input_amax) == set(MODULES)


def test_only_the_modules_asked_for(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    with Checkpoint(folder) as checkpoint:
        found = calibrate_inputs(checkpoint, MODULES[3:5])
    assert list(found.input_amax) == MODULES[3:5]


def test_builtin_text_plain_and_as_chat(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", max_position_embeddings=4096)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = [*PASSAGES, *(f"{q}\n\n{a}" for q, a in DIALOGUES)]
    found = run(folder, window_tokens=4096)
    assert (found.windows, found.tokens) == (len(plain), sum(len(tokenizer(t)["input_ids"]) for t in plain))
    assert (found.text, found.notes) == ("built-in text", ())

    (folder / "chat_template.jinja").write_text(TEMPLATE)
    chat = [f"<s>user: {q}</s><s>assistant: {a}</s><s>" for q, a in DIALOGUES]
    windows = [tokenizer(t)["input_ids"] for t in (*PASSAGES, *chat)]
    found = run(folder, window_tokens=4096)
    assert (found.windows, found.tokens) == (len(windows), sum(len(w) for w in windows))
    assert found.input_amax == whole_model_amax(folder, windows)

    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    rejected = run(folder, window_tokens=4096)
    assert rejected.windows == len(plain)
    assert "dialogues were read as plain text" in rejected.notes[0]


def test_bos_begins_every_window(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    assert tokens[0] == 1
    windows = [[1, *tokens[1 + i : 50 + i]] for i in (0, 49, 98)]
    found = run(folder, text, window_tokens=50, max_windows=3)
    assert found.tokens == 150
    assert found.input_amax == whole_model_amax(folder, windows)


def test_short_texts_and_short_rests(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", max_position_embeddings=1024)
    text = tmp_path / "text.txt"
    text.write_text("abc")
    assert run(folder, text).windows == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = len(tokenizer(TEXT)["input_ids"])
    text.write_text(TEXT)
    assert run(folder, text, window_tokens=count - 1).tokens == count - 1  # one token alone says nothing
    assert run(folder, text, window_tokens=count // 2 + 1).windows == 2


def test_windows_fit_into_the_models_attention(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "qwen2", max_position_embeddings=64)
    assert run(folder).tokens <= 64 * len(PASSAGES + DIALOGUES)
    config = json.loads((folder / "config.json").read_text())
    window = {
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention"] * 2,
    }
    (folder / "config.json").write_text(json.dumps({**config, **window}))
    found = run(folder)
    assert found.tokens <= 40 * found.windows


def test_refuses(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    text = tmp_path / "text.txt"
    with pytest.raises(CheckpointFileError, match=r"text\.txt: cannot be read: No such file"):
        run(folder, text)
    text.write_text(" \n ")
    with pytest.raises(InvalidArgumentError, match="holds no text"):
        run(folder, text)
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidArgumentError, match="is not UTF-8 text"):
        run(folder, text)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointFileError, match="no tokenizer here"):
        run(folder)


def test_refuses_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", vocab_size=300)
    with pytest.raises(CheckpointConfigError, match=r"gives token 3\d\d, but the model has 300 only"):
        run(folder)
