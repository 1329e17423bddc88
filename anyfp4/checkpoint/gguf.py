"""A GGUF model as a source of bf16 tensors with Hugging Face names.

Architectures ``llama`` (which is what Mistral files call themselves, too), ``qwen2`` and ``qwen3``; every tensor
type that the ``gguf`` package can dequantize. One tensor is read at a time, and no page of the file is kept.

Two things in these files differ from a Hugging Face folder. llama.cpp's converter reorders the rows of the query
and key projections of the ``llama`` architecture (and of no other one here), because its rotary embedding turns
neighbouring pairs where transformers turns the two halves of a head; :meth:`GGUFModel.tensor` undoes that. And
Llama 3's rope scaling is there not as parameters but as a tensor of divisors, from which
:func:`.gguf_config.llama3_scaling` finds them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from anyfp4.checkpoint.gguf_config import hf_config
from anyfp4.checkpoint.gguf_file import GGUFTensor, read_gguf_file
from anyfp4.checkpoint.gguf_tokenizer import write_tokenizer
from anyfp4.checkpoint.writer import DEFAULT_SHARD_BYTES, CheckpointWriter
from anyfp4.errors import InvalidArgumentError, TensorError, UnsupportedError

#: elements dequantized at a time: 64 MB of float32
CHUNK_ELEMENTS: Final = 1 << 24

_GLOBAL_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: read for the configuration, and no tensor of the model
_ROPE_FREQS: Final = "rope_freqs.weight"


class GGUFModel:
    """An open GGUF model.

    Attributes:
        path: the file.
        config: what the model's ``config.json`` would hold.
        names: Hugging Face names of its tensors, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        """Parses the head of the file and checks the names and shapes of all tensors.

        Raises:
            CheckpointFileError: no such file, not GGUF, or truncated.
            CheckpointConfigError: a metadata key is missing or contradicts another.
            TensorError: a tensor is missing or has a wrong shape.
            UnsupportedError: an architecture, feature, tensor or tensor type that is not supported.
        """
        self.path = path
        head = read_gguf_file(path)
        self.metadata = head.metadata
        frequencies = head.tensors.get(_ROPE_FREQS)
        divisors = None if frequencies is None else self._read(frequencies, torch.float32)
        self.config: dict[str, Any] = hf_config(
            path, head.metadata, {name: t.shape for name, t in head.tensors.items()}, divisors
        )
        self._tensors = {_hf_name(path, t.name): t for t in head.tensors.values() if t.name != _ROPE_FREQS}
        self._check_tensors()

    @property
    def names(self) -> list[str]:
        """Hugging Face names of the tensors, in the order of the file."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._tensors[name].shape

    def tensor(self, name: str) -> Tensor:
        """One tensor, dequantized, in the row order of transformers.

        Args:
            name: a Hugging Face name, one of :attr:`names`.

        Returns:
            bfloat16, the tensor's own memory.

        Raises:
            InvalidArgumentError: no such tensor.
            UnsupportedError: a tensor type that the ``gguf`` package cannot dequantize.
        """
        if name not in self._tensors:
            raise InvalidArgumentError(f"{self.path} has no tensor {name!r}")
        tensor = self._read(self._tensors[name], torch.bfloat16)
        heads = self._permuted_heads(name)
        return tensor if heads is None else _unpermute(tensor, heads)

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Writes the tokenizer, chat template and generation config; see :func:`.gguf_tokenizer.write_tokenizer`."""
        return write_tokenizer(self.path, self.metadata, folder)

    def _permuted_heads(self, name: str) -> int | None:
        """The number of heads whose rows the file has in the other order; None if it has them as they should be."""
        if self.config["model_type"] != "llama":
            return None
        if ".self_attn.q_proj." in name:
            return int(self.config["num_attention_heads"])
        if ".self_attn.k_proj." in name:
            return int(self.config["num_key_value_heads"])
        return None

    def _read(self, tensor: GGUFTensor, dtype: torch.dtype) -> Tensor:
        """Dequantizes a tensor some rows at a time, so that little more than the result is in memory."""
        columns = tensor.shape[-1]
        rows = math.prod(tensor.shape[:-1])
        row_bytes = tensor.nbytes // rows
        step = max(1, CHUNK_ELEMENTS // columns)
        out = torch.empty((rows, columns), dtype=dtype)
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            for first in range(0, rows, step):
                count = min(step, rows - first)
                raw = np.fromfile(file, dtype=np.uint8, count=count * row_bytes).reshape(count, row_bytes)
                values = self._dequantize(raw, tensor)
                out[first : first + count] = torch.from_numpy(values)
        return out.reshape(tensor.shape)

    def _dequantize(self, raw: np.ndarray[Any, Any], tensor: GGUFTensor) -> np.ndarray[Any, Any]:
        from gguf.constants import GGMLQuantizationType  # noqa: PLC0415  (needed for GGUF sources only)
        from gguf.quants import dequantize  # noqa: PLC0415

        try:
            return np.asarray(dequantize(raw, GGMLQuantizationType[tensor.type]), dtype=np.float32)
        except NotImplementedError as error:
            raise UnsupportedError(
                f"{self.path}: {tensor.name}: tensors of type {tensor.type} cannot be dequantized"
            ) from error

    def _check_tensors(self) -> None:
        expected = _expected_shapes(self.config)
        for name, shape in expected.items():
            if name not in self._tensors:
                raise TensorError("missing", file=self.path, tensor=name)
            if self._tensors[name].shape != shape:
                found = list(self._tensors[name].shape)
                raise TensorError(f"has shape {found}, must be {list(shape)}", file=self.path, tensor=name)
        for name, tensor in self._tensors.items():
            if name not in expected:
                raise UnsupportedError(f"{self.path}: {tensor.name}: no tensor of a {self.config['model_type']} model")


def gguf_to_folder(
    path: Path,
    out: Path,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes a GGUF model as a Hugging Face folder of bf16 tensors, one tensor at a time.

    Args:
        path: the GGUF file.
        out: the folder to write; must not exist, or be empty.
        max_shard_bytes: bytes of tensors in one file.
        progress: called with (tensors done, tensors in all).

    Returns:
        ``out``.
    """
    model = GGUFModel(path)
    with CheckpointWriter(out, max_shard_bytes) as writer:
        writer.write_json("config.json", model.config)
        model.write_tokenizer(writer.folder)
        for i, name in enumerate(model.names):
            writer.add(name, model.tensor(name))
            if progress is not None:
                progress(i + 1, len(model.names))
        return writer.finish()


def _hf_name(path: Path, name: str) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise UnsupportedError(f"{path}: {name}: a tensor that no supported architecture has")


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this configuration has."""
    hidden, width, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    biased = ["q_proj", "k_proj", "v_proj"] if config["model_type"] == "qwen2" else []
    if config.get("attention_bias"):
        biased = ["q_proj", "k_proj", "v_proj", "o_proj"]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
        for name, shape in attention.items():
            shapes[f"{layer}.self_attn.{name}.weight"] = shape
            if name in biased:
                shapes[f"{layer}.self_attn.{name}.bias"] = (shape[0],)
        if config["model_type"] == "qwen3":
            shapes[f"{layer}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (width, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (width, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, width)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def _unpermute(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from (pair, half) to (half, pair): [heads·D, ...] to the same shape."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
