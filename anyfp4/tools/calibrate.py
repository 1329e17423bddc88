"""Calibration: how large the input of each linear layer gets when the unquantized model reads a text.

The model runs layer by layer: all windows of text pass through one decoder layer before the next one is read, so
that one layer's weights (in float32) and the hidden states are all that is in memory. The layers themselves are
transformers'. Arithmetic is float32 whatever the checkpoint holds: a CPU without bf16 instructions is six times
slower in bf16 (15 against 100 GFLOP/s on two AVX2 cores).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.engine.tokenizer import Tokenizer
from anyfp4.errors import CheckpointConfigError, CheckpointFileError, InvalidArgumentError, TensorError
from anyfp4.models.config import DecoderConfig
from anyfp4.tools.calibration_text import DIALOGUES, PASSAGES

MAX_WINDOWS = 32
WINDOW_TOKENS = 512
#: more text than this for each token wanted is not tokenized: tokens are shorter than that
_CHARACTERS_PER_TOKEN = 16

#: called with (steps done, steps in all)
StepProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        input_amax: module -> the largest magnitude of its input.
        windows: how many windows of text were read.
        tokens: how many tokens they held.
        text: the file, or ``built-in text``.
        notes: what the user should know.
    """

    input_amax: dict[str, float]
    windows: int
    tokens: int
    text: str
    notes: tuple[str, ...] = ()


def calibrate_inputs(
    checkpoint: Checkpoint,
    modules: Collection[str],
    text_file: Path | None = None,
    *,
    max_windows: int = MAX_WINDOWS,
    window_tokens: int = WINDOW_TOKENS,
    progress: StepProgress | None = None,
) -> Calibration:
    """Runs a text through an unquantized model and records the largest input of each linear layer.

    Args:
        checkpoint: an unquantized model, with its tokenizer beside it.
        modules: full names of the linear layers to watch, such as ``model.layers.0.mlp.up_proj``.
        text_file: UTF-8 text, cut in windows from its start; the built-in text by default.
        max_windows: how many windows at most.
        window_tokens: tokens of a window; shorter where the model attends to fewer.
        progress: called after each decoder layer.

    Returns:
        The amax of each module.

    Raises:
        CheckpointError: no tokenizer, one with more tokens than the model, or a text that cannot be read.
        InvalidArgumentError: the file is not text, or is empty.
        TensorError: a layer's input is zero throughout, or not finite.
    """
    tokenizer = Tokenizer(checkpoint.folder)
    config = DecoderConfig.from_hf(checkpoint.config, str(checkpoint.folder / "config.json"))
    attended = [w for w in config.sliding_windows if w is not None]
    # a window that every layer sees in full needs no sliding-window mask
    length = min([window_tokens, config.max_position, *attended])
    notes: tuple[str, ...] = ()
    if text_file is None:
        windows, notes = _builtin_windows(tokenizer, length)
    else:
        windows = _file_windows(text_file, tokenizer, length, max_windows)
    largest = max(max(window) for window in windows)
    if largest >= config.vocab_size:
        raise CheckpointConfigError(
            f"the tokenizer here gives token {largest}, but the model has {config.vocab_size} only",
            file=checkpoint.folder,
        )
    amax = _input_amax(checkpoint, windows, set(modules), progress)
    for name in modules:
        value = amax[name]
        if value == 0:
            raise TensorError(
                "the layer's input is zero throughout the calibration text, so it has no scale: ignore the layer, "
                "or quantize weights only",
                tensor=name,
            )
        if not math.isfinite(value):
            raise TensorError(f"the layer's input reaches {value} on the calibration text", tensor=name)
    return Calibration(
        input_amax={name: amax[name] for name in modules},
        windows=len(windows),
        tokens=sum(len(w) for w in windows),
        text="built-in text" if text_file is None else str(text_file),
        notes=notes,
    )


def _builtin_windows(tokenizer: Tokenizer, length: int) -> tuple[list[list[int]], tuple[str, ...]]:
    windows = [tokenizer.encode(passage) for passage in PASSAGES]
    notes: tuple[str, ...] = ()
    chat = tokenizer.has_chat_template
    for question, answer in DIALOGUES:
        if chat:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            try:
                windows.append(tokenizer.encode_chat(messages))
                continue
            except InvalidArgumentError as error:
                notes = (f"the built-in dialogues were read as plain text: {error}",)
                chat = False
        windows.append(tokenizer.encode(f"{question}\n\n{answer}"))
    return [window[:length] for window in windows], notes


def _file_windows(file: Path, tokenizer: Tokenizer, length: int, count: int) -> list[list[int]]:
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(length * count * _CHARACTERS_PER_TOKEN)
    except OSError as error:
        raise CheckpointFileError(f"cannot be read: {error.strerror}", file=file) from error
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{file} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise InvalidArgumentError(f"{file} holds no text to calibrate on")
    start = tokenizer.encode("")[:1]
    tokens = tokenizer.encode(text)
    if start and tokens[:1] == start:  # a token that begins every text: let it begin every window
        tokens = tokens[1:]
    else:
        start = []
    step = length - len(start)
    windows = [start + tokens[i : i + step] for i in range(0, len(tokens), step)][:count]
    # a short rest says little; one window there must be
    return [w for w in windows if len(w) > length // 4] or windows[:1]


@torch.inference_mode()
def _input_amax(
    checkpoint: Checkpoint, windows: Sequence[list[int]], modules: set[str], progress: StepProgress | None
) -> dict[str, float]:
    layer, rotary, count = _layer_parts(checkpoint)
    embedding = checkpoint.tensor("model.embed_tokens.weight")
    hidden = [embedding[torch.tensor(window)].float().unsqueeze(0) for window in windows]  # each [1, T, H]
    del embedding
    amax: dict[str, Tensor] = {}
    for i in range(count):
        prefix = f"model.layers.{i}."
        for name, parameter in layer.named_parameters():
            parameter.copy_(checkpoint.tensor(prefix + name, tuple(parameter.shape)))
        handles = [
            child.register_forward_pre_hook(_recorder(amax, prefix + name))
            for name, child in layer.named_modules()
            if prefix + name in modules
        ]
        for j, states in enumerate(hidden):
            positions = torch.arange(states.shape[1]).unsqueeze(0)
            hidden[j] = layer(
                states,
                attention_mask=None,  # which means causal
                position_ids=positions,
                position_embeddings=rotary(states, position_ids=positions),
            )
        for handle in handles:
            handle.remove()
        if progress is not None:
            progress(i + 1, count)
    return {name: float(value) for name, value in amax.items()}


def _layer_parts(checkpoint: Checkpoint) -> tuple[nn.Module, nn.Module, int]:
    """One decoder layer in float32 whose parameters hold no data yet, the rotary embedding, the number of layers.

    All layers are alike (where some attend to a window of tokens, no calibration window is longer), so that one,
    filled again and again, stands for each.
    """
    from transformers import AutoConfig, AutoModel  # noqa: PLC0415  (takes seconds to import)

    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    count = int(config.num_hidden_layers)
    with torch.device("meta"):
        model: Any = AutoModel.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
    layer: nn.Module = model.layers[0].eval().to_empty(device="cpu")
    return layer, type(model.rotary_emb)(config=config), count


def _recorder(amax: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that keeps the largest magnitude of a module's inputs in ``amax[name]``."""

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        low, high = inputs[0].aminmax()
        seen = torch.maximum(-low, high)
        # torch's maximum, unlike Python's, keeps a NaN
        amax[name] = torch.maximum(amax.get(name, seen), seen)

    return record
