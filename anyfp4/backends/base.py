"""What a backend is: an implementation of the linear op, and optionally of the decoder's other ops.

``Backend`` itself is the readable reference for all of them, so a backend overrides what it does faster and inherits
the rest. Every override gives the same bits as the reference for its numerics, or raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from anyfp4.device import architecture
from anyfp4.errors import InvalidArgumentError
from anyfp4.formats.weights import LinearWeight, NVFP4Weight
from anyfp4.ops import activation, attention, linear, norm, rope, sampling
from anyfp4.ops.attention import AttentionBatch
from anyfp4.ops.chosen import Chosen, Known


@dataclass(frozen=True, eq=False)
class PreparedLinear:
    """A linear layer's weight as one backend wants it; the layout of ``data`` is the backend's own affair.

    Attributes:
        backend: name of the backend that made it.
        shape: (N, K).
        numerics: of the W4A4 product.
        nbytes: of memory held; it may grow with N in steps of 256 rows or of a divisor of that, alike for each step, so
            that a few rows tell what many will take.
        data: the backend's private form.
    """

    backend: str
    shape: tuple[int, int]
    numerics: str
    nbytes: int
    data: Any


class CachePair(Protocol):
    """Keys and values of one layer: [blocks, block_size, Hkv, D] each."""

    @property
    def k(self) -> Tensor:
        """The keys."""
        ...

    @property
    def v(self) -> Tensor:
        """The values."""
        ...


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One decoder layer for :meth:`Backend.fuse`; the names are those of ``layers/`` and ``models/decoder.py``.

    Attributes:
        qkv, o, gate_up, down: the parts of each linear layer, all prepared by the backend that is asked.
    """

    input_norm: Tensor
    qkv: Sequence[PreparedLinear]
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Sequence[PreparedLinear]
    post_attention_norm: Tensor
    gate_up: Sequence[PreparedLinear]
    down: Sequence[PreparedLinear]
    k_scale: float
    v_scale: float
    sliding_window: int | None


@dataclass(frozen=True, eq=False)
class DecoderPlan:
    """All layers of a decoder and the norm after them.

    Attributes:
        norm: [hidden].
        cos_sin: float32 [positions, 2, D/2].
    """

    layers: Sequence[LayerPlan]
    norm: Tensor
    cos_sin: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float


class FusedDecoder(Protocol):
    """A decoder's layers as one call, with the bits of the op-by-op loop in ``models/decoder.py``."""

    def __call__(
        self, residual: Tensor, positions: Tensor, caches: Sequence[CachePair], batch: AttentionBatch
    ) -> Tensor:
        """Embedded tokens [T, hidden] to normalised hidden states [T, hidden]; writes the caches."""


class Backend:
    """The reference backend: torch, any device, both numerics; the oracle of all others."""

    name = "reference"
    #: one line for ``anyfp4 backends``
    description = "readable torch code; runs anywhere, slowly"
    #: why it is never chosen unless it is asked for by name; None where it may be
    by_name_only: str | None = None

    def why_not(
        self, device: torch.device, shape: tuple[int, int] | None = None, numerics: str = "native"
    ) -> str | None:
        """Why this backend cannot run a linear of (N, K) ``shape`` on ``device``; None if it can."""
        if numerics == "native" and architecture(device) not in ("cpu", "sm_90"):
            return f"no bit model of {architecture(device)}'s matrix units; numerics='blackwell' runs"
        return None

    def prepare(self, weight: LinearWeight, numerics: str = "native") -> PreparedLinear:
        """Brings a weight into the form that :meth:`linear` reads. May keep or copy; the caller drops its own."""
        return PreparedLinear(self.name, weight.shape, numerics, weight.nbytes, weight)

    def matrices(self, prepared: PreparedLinear) -> tuple[Tensor, ...]:
        """A weight's matrices in the plain layout that :meth:`prepare` read, for saving a model that was loaded.

        Args:
            prepared: from this backend.

        Returns:
            (packed uint8 [N, K/2], block_scale float8_e4m3fn [N, K/16]) of an NVFP4 weight, (weight [N, K],) of an FP8
            or dense one. They have the bits that were prepared, except where these change no product: the sign of a
            block scale may have moved into its codes, and the codes of a block whose scale is zero may be zero.

        Raises:
            UnsupportedError: a scale of the weight is NaN, and the layout no longer tells which.
        """
        weight: LinearWeight = prepared.data
        if isinstance(weight, NVFP4Weight):
            return weight.weight.packed, weight.weight.block_scale
        return (weight.weight,)

    def workspace_nbytes(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes, beside input and output, that a product with a packed weight of (N, K) takes for a moment, at most.

        Args:
            shape: (N, K) of the layer.
            dtype: of the activation.
        """
        del shape, dtype
        return 0

    def linear(self, x: Tensor, prepared: PreparedLinear, out_dtype: torch.dtype | None = None) -> Tensor:
        """See :func:`anyfp4.ops.linear.linear`."""
        return linear.linear(x, prepared.data, numerics=prepared.numerics, out_dtype=out_dtype)

    def fuse(self, plan: DecoderPlan) -> FusedDecoder | None:
        """A decoder's layers as one call, or None: then they run op by op."""
        del plan
        return None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See :func:`anyfp4.ops.norm.rms_norm`."""
        return norm.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See :func:`anyfp4.ops.norm.add_rms_norm`."""
        return norm.add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See :func:`anyfp4.ops.activation.silu_mul`."""
        return activation.silu_mul(gate_up)

    def apply_rope(self, x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
        """See :func:`anyfp4.ops.rope.apply_rope`."""
        return rope.apply_rope(x, positions, cos_sin)

    def write_kv(
        self,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        """See :func:`anyfp4.ops.attention.write_kv`."""
        attention.write_kv(k, v, k_cache, v_cache, slots, k_scale, v_scale)

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        sliding_window: int | None = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> Tensor:
        """See :func:`anyfp4.ops.attention.attention`."""
        return attention.attention(
            q,
            k_cache,
            v_cache,
            batch,
            scale=scale,
            sliding_window=sliding_window,
            k_scale=k_scale,
            v_scale=v_scale,
        )

    def set_threads(self, count: int) -> None:
        """How many threads of the CPU the ops use, from 1 on; no bit depends on it."""
        torch.set_num_threads(count)

    def quiet(self) -> AbstractContextManager[None]:
        """Held during a step of the engine: keeps other thread pools from getting in the way of the backend's own."""
        return nullcontext()

    def log_softmax(self, logits: Tensor) -> Tensor:
        """See :func:`anyfp4.ops.sampling.log_softmax`."""
        return sampling.log_softmax(logits)

    def greedy(self, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """The largest logit of each row of float32 [M, V]: (ids int64 [M], values [M]), for :meth:`sample`.

        None where that is no work of its own. Captured in CUDA graphs, so nothing waits for the device.
        """
        del logits
        return None

    def sample(
        self, logits: Tensor, choices: Sequence[sampling.Choice], best: tuple[Tensor, Tensor] | None = None
    ) -> list[int]:
        """See :func:`anyfp4.ops.sampling.sample`; ``best`` is what :meth:`greedy` gave for these logits, if known."""
        del best
        return sampling.sample(logits, choices)

    def choose(
        self, logits: Tensor, choices: Sequence[sampling.Choice], best: tuple[Tensor, Tensor] | None = None
    ) -> Chosen:
        """What :meth:`sample` gives, to be read later; a GPU's host does not wait. Arguments as there."""
        try:
            return Known(self.sample(logits, choices, best), logits.device)
        except InvalidArgumentError as error:
            return Known([0] * len(choices), logits.device, error)
