"""Builds a decoder from a checkpoint, layer by layer, so that at most one layer is held twice.

A tensor goes from the file to its device at once, is brought into the backend's layout there, and what the file held is
dropped before the next layer is read.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from anyfp4.backends import registry
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.errors import InvalidArgumentError, TensorError
from anyfp4.formats.weights import DenseWeight, LinearWeight
from anyfp4.layers.attention import Attention
from anyfp4.layers.linear import Linear
from anyfp4.layers.mlp import MLP
from anyfp4.layers.rotary import cos_sin_table
from anyfp4.models import footprint
from anyfp4.models.config import DecoderConfig
from anyfp4.models.decoder import Block, Decoder

_LOG = logging.getLogger(__name__)
#: called with (bytes loaded, bytes in all)
Progress = Callable[[int, int], None]
#: (the model's shape, dtype of its KV cache) -> what is needed beside the weights, bytes by what they are for
Beside = Callable[[DecoderConfig, torch.dtype], Mapping[str, int]]
#: tensors that some exporters write and no decoder reads
_IGNORABLE = ("*.rotary_emb.inv_freq", "*.self_attn.rotary_emb.*", "lm_head.weight")


def load_decoder(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    numerics: str = "native",
    backend: str = "auto",
    max_positions: int | None = None,
    progress: Progress | None = None,
    beside: Beside | None = None,
    memory_fraction: float | None = None,
) -> Decoder:
    """Loads a model, if it fits.

    Args:
        checkpoint: opened and checked.
        device: where the weights go.
        dtype: of activations, embeddings, norms and dense layers; the config's by default.
        numerics: of W4A4 products.
        backend: ``auto`` or a backend's name.
        max_positions: rows of the rotary table; the config's maximum by default.
        progress: called after each tensor group.
        beside: what else must fit; the weights alone by default.
        memory_fraction: of the device's memory that may be in use; see :func:`anyfp4.device.budget`.

    Raises:
        InsufficientMemoryError: the model does not fit; told before anything is read.
        CheckpointError: a tensor is missing, left over, or wrong.
        UnsupportedError: the architecture or an option is not supported.
        BackendError: the backend that was asked for cannot run here.
        InvalidArgumentError: more positions than the model has.
    """
    config = DecoderConfig.from_hf(checkpoint.config, str(checkpoint.folder / "config.json"))
    if dtype is not None:
        config = replace(config, dtype=dtype)
    loader = _Loader(checkpoint, config, device, numerics, backend, max_positions, progress)
    with loader.ops.quiet():
        loader.require_memory(beside, memory_fraction)
        decoder = loader.load()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the files' layers lay in is of other sizes than what comes now
    return decoder


class _Loader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        device: torch.device,
        numerics: str,
        backend: str,
        max_positions: int | None,
        progress: Progress | None,
    ) -> None:
        self.checkpoint, self.config, self.device = checkpoint, config, device
        self.numerics, self.backend = numerics, backend
        if max_positions is not None and max_positions > config.max_position:
            raise InvalidArgumentError(
                f"max_model_len = {max_positions}: the model's limit is {config.max_position} (max_position_embeddings)"
            )
        self.max_positions = max_positions or config.max_position
        self.progress = progress
        self.ops = registry.select(device, numerics=numerics, requested=backend)
        if backend == "auto" and self.ops is registry.REFERENCE:
            rows = registry.table(device, numerics=numerics)
            candidates = {b.name for b in registry.PREFERENCE[device.type]}
            reasons = "; ".join(f"{r.name}: {r.reason}" for r in rows if r.name in candidates and not r.chosen)
            _LOG.warning("running on the reference backend, which is slow (%s)", reasons)
        self.kv_dtype = torch.float8_e4m3fn if checkpoint.quantization.kv_cache == "fp8" else config.dtype
        self.workspace = 0
        self.done = 0

    def require_memory(self, beside: Beside | None, fraction: float | None) -> None:
        """Refuses a model that does not fit.

        Raises:
            InsufficientMemoryError: with all figures.
        """
        found = footprint.measure(
            self.checkpoint, self.config, self.ops, self.device, self.numerics, self.backend, self.max_positions
        )
        self.workspace = found.workspace
        parts = dict(found.weights)
        if found.workspace:
            parts["workspace of a product"] = found.workspace
        if beside is not None:
            parts |= beside(self.config, self.kv_dtype)
        footprint.require(parts, self.device, fraction, self.checkpoint.folder)

    def load(self) -> Decoder:
        c = self.config
        embedding = self._tensor("model.embed_tokens.weight", (c.vocab_size, c.hidden_size))
        blocks = [self._block(i) for i in range(c.num_layers)]
        norm = self._tensor("model.norm.weight", (c.hidden_size,))
        if c.tie_word_embeddings:
            lm_head = Linear([DenseWeight(embedding)], numerics=self.numerics, backend=self.backend)
        else:
            lm_head = self._linear([("lm_head", c.vocab_size)], c.hidden_size, None)
        self._refuse_unread()
        rope = c.rope
        table = cos_sin_table(c.head_dim, self.max_positions, rope.kind, rope.theta, dict(rope.parameters))
        linears = [x for b in blocks for x in (b.attention.qkv, b.attention.o, b.mlp.gate_up, b.mlp.down)]
        nbytes = sum(x.nbytes for x in linears) + embedding.numel() * embedding.element_size()
        nbytes += 0 if c.tie_word_embeddings else lm_head.nbytes
        return Decoder(
            config=c,
            ops=self.ops,
            embedding=embedding,
            blocks=blocks,
            norm=norm,
            lm_head=lm_head,
            cos_sin=table.to(self.device),
            kv_dtype=self.kv_dtype,
            nbytes=nbytes,
            workspace=self.workspace,
        )

    def _block(self, index: int) -> Block:
        c = self.config
        layer = f"model.layers.{index}"
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        k_scale, v_scale = self.checkpoint.kv_scales(attn)
        attention = Attention(
            ops=self.ops,
            qkv=self._linear(
                [(f"{attn}.q_proj", q_size), (f"{attn}.k_proj", kv_size), (f"{attn}.v_proj", kv_size)],
                c.hidden_size,
                c.qkv_bias,
            ),
            o=self._linear([(f"{attn}.o_proj", c.hidden_size)], q_size, c.o_bias),
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            q_norm=self._tensor(f"{attn}.q_norm.weight", (c.head_dim,)) if c.qk_norm else None,
            k_norm=self._tensor(f"{attn}.k_norm.weight", (c.head_dim,)) if c.qk_norm else None,
            eps=c.rms_norm_eps,
            k_scale=1.0 if k_scale is None else k_scale,
            v_scale=1.0 if v_scale is None else v_scale,
            sliding_window=c.sliding_windows[index],
        )
        return Block(
            input_norm=self._tensor(f"{layer}.input_layernorm.weight", (c.hidden_size,)),
            attention=attention,
            post_attention_norm=self._tensor(f"{layer}.post_attention_layernorm.weight", (c.hidden_size,)),
            mlp=MLP(
                ops=self.ops,
                gate_up=self._linear(
                    [(f"{mlp}.gate_proj", c.intermediate_size), (f"{mlp}.up_proj", c.intermediate_size)],
                    c.hidden_size,
                    c.mlp_bias,
                ),
                down=self._linear([(f"{mlp}.down_proj", c.hidden_size)], c.intermediate_size, c.mlp_bias),
            ),
        )

    def _linear(self, modules: Sequence[tuple[str, int]], in_features: int, bias: bool | None) -> Linear:
        # read as they are asked for, and held by nobody else
        weights = (self._weight(name, out, in_features, bias) for name, out in modules)
        return Linear(weights, numerics=self.numerics, backend=self.backend)

    def _weight(self, module: str, n: int, k: int, bias: bool | None) -> LinearWeight:
        weight = self.checkpoint.linear(module, (n, k), bias, self.device)
        self._advance(weight.nbytes)
        if isinstance(weight, DenseWeight):
            return DenseWeight(weight.weight.to(self.config.dtype), weight.bias)
        return weight

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.checkpoint.tensor(name, shape, self.device)
        self._advance(tensor.numel() * tensor.element_size())
        return tensor.to(self.config.dtype)

    def _advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(min(self.done, self.checkpoint.total_bytes), self.checkpoint.total_bytes)

    def _refuse_unread(self) -> None:
        left = [
            name
            for name in self.checkpoint.unread()
            if not any(fnmatch.fnmatch(name, pattern) for pattern in _IGNORABLE)
        ]
        if left:
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise TensorError(
                f"no part of a {self.config.model_type} model with {self.config.num_layers} layers reads this tensor"
                + more,
                file=self.checkpoint.file_of(left[0]),
                tensor=left[0],
            )
