"""``QuantizedLinear``: what stands in a transformers model in place of a quantized ``nn.Linear``.

Before the files are read it declares the tensors that the checkpoint holds, as buffers without data, so that
transformers loads them as it loads any other. Then :meth:`QuantizedLinear.finish` checks them, brings the weight into a
backend's layout, and drops them. From then on the module has no parameters and no buffers: nothing that a change of
the model's dtype could round. What ``state_dict`` gives is made on request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from anyfp4.checkpoint import emit, layout
from anyfp4.checkpoint.layout import Suffixes, TensorInfo
from anyfp4.checkpoint.scheme import DENSE, Scheme
from anyfp4.errors import InvalidArgumentError, TensorError, UnsupportedError
from anyfp4.formats.weights import FP8Weight, LinearWeight, NVFP4Weight
from anyfp4.integrations.linear_op import TracedLinear

_Apply: TypeAlias = Callable[[Tensor], Tensor]
#: for messages about tensors that come from no file
MEMORY = Path("the tensors given")


class QuantizedLinear(nn.Module):
    """A linear layer that runs through the op ``anyfp4::linear``; inference only.

    Attributes:
        name: the module's full name.
        in_features, out_features: K and N.
        scheme: how the weight is stored and the activation quantized.
        names: the layout whose tensors ``state_dict`` gives.
        device: where the weight lies.
    """

    def __init__(
        self, name: str, in_features: int, out_features: int, names: Suffixes, *, numerics: str, backend: str
    ) -> None:
        """An empty layer: :meth:`declare` or :meth:`receive` comes next."""
        super().__init__()
        self.name = name
        self.in_features, self.out_features = in_features, out_features
        self.names = names
        self.numerics, self.backend = numerics, backend
        self.scheme = DENSE
        self.device = torch.device("meta")
        self._infos: dict[str, TensorInfo] = {}  # of what was declared, by suffix
        self._small: dict[str, Tensor] = {}  # all but the matrices, on the CPU, as the checkpoint stores them
        self._held: TracedLinear | None = None
        self._is_hf_initialized = True  # there is nothing here that transformers could initialize

    @property
    def nbytes(self) -> int:
        """Bytes held: the prepared weight and its scales."""
        return 0 if self._held is None else self._held.linear.nbytes + sum(t.nbytes for t in self._small.values())

    def declare(self, scheme: Scheme, infos: Mapping[str, TensorInfo]) -> None:
        """Makes place for the tensors of a checkpoint, by suffix."""
        self.scheme, self._infos = scheme, dict(infos)
        for suffix, info in infos.items():
            self.register_buffer(suffix, torch.empty(info.shape, dtype=info.dtype, device="meta"))

    def receive(self, weight: NVFP4Weight) -> None:
        """Takes a weight that was quantized just now, in place of the ``weight`` that transformers loaded."""
        self._parameters.pop("weight", None)
        stored = {n.rpartition(".")[2]: t for n, t in emit.tensors(self.names, self.name, weight).items()}
        self.scheme = emit.scheme_of_weight(weight)
        for suffix, tensor in stored.items():
            self.register_buffer(suffix, tensor)

    def finish(self, *, weight_only: bool = False) -> None:
        """Prepares what was loaded, and lets go of it.

        Args:
            weight_only: drop the input's scale, if there is one.

        Raises:
            TensorError: a tensor was not loaded, or has a bad value.
            BackendError: the backend that was asked for cannot run it.
        """
        raw = {s: t.detach() for s, t in (*self._buffers.items(), *self._parameters.items()) if t is not None}
        self._buffers.clear()
        self._parameters.clear()
        for suffix, tensor in raw.items():
            info = self._infos.get(suffix)
            if tensor.is_meta:
                file = None if info is None else info.file
                raise TensorError("was not loaded", file=file, tensor=f"{self.name}.{suffix}")
            if info is not None and tensor.dtype != info.dtype:  # modules kept in float32 widen everything they hold
                raw[suffix] = tensor.to(info.dtype)
        self._take(raw, weight_only)

    def to_weight(self) -> LinearWeight:
        """The weight in the plain layout, made anew from what the backend holds, on the layer's device."""
        raw = self.stored()
        return self._weight(raw, self._describe(raw))

    def stored(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint stores, by suffix, on the layer's device."""
        (backend, prepared), *_ = self._prepared().linear.parts
        matrices = backend.matrices(prepared)
        main = (self.names.packed, self.names.block_scale) if self.scheme.kind == "nvfp4" else ("weight",)
        stored = dict(zip(main, matrices, strict=True))
        return stored | {suffix: tensor.to(self.device) for suffix, tensor in self._small.items()}

    def set_input_scale(self, scale: Tensor) -> None:
        """Makes a weight-only NVFP4 layer W4A4.

        Args:
            scale: float32 [1], a multiplier.
        """
        weight = self.to_weight()
        assert isinstance(weight, NVFP4Weight), "only NVFP4 layers are calibrated"
        weight = replace(weight, input_global_scale=scale.to(self.device))
        stored = {n.rpartition(".")[2]: t for n, t in emit.tensors(self.names, self.name, weight).items()}
        self.scheme = replace(self.scheme, weight_only=False)
        self._take(stored, False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N] of the dtype of ``x``."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise UnsupportedError(
                f"{self.name}: anyfp4's layers are for inference and have no gradient; run the model under "
                "torch.no_grad(), or train the unquantized one"
            )
        return self._prepared()(x)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        if self._held is None:
            return f"{shape}, not loaded"
        (backend, _), *_ = self._held.linear.parts
        bias = "bias" in self._small
        return f"{shape}, bias={bias}, {self.scheme.label}, backend={backend.name}, numerics={self.numerics}"

    def _prepared(self) -> TracedLinear:
        if self._held is None:
            raise UnsupportedError(f"{self.name} has no weight yet: load the model with from_pretrained")
        return self._held

    def _take(self, raw: Mapping[str, Tensor], weight_only: bool) -> None:
        """Checks the tensors of a checkpoint, by suffix, and holds what they stand for."""
        infos = self._describe(raw)
        layout.check_module(self.names, self.scheme, self.name, infos)
        weight = self._weight(raw, infos)
        if weight.shape != (self.out_features, self.in_features):
            raise TensorError(
                f"is {list(weight.shape)}, but the model's configuration needs {[self.out_features, self.in_features]}",
                tensor=f"{self.name}.weight",
            )
        matrices = {self.names.packed, self.names.block_scale} if self.scheme.kind == "nvfp4" else {"weight"}
        # clones: what was loaded may be a view of something larger
        small = {s: t.cpu().clone() for s, t in raw.items() if s not in matrices}
        if weight_only and not self.scheme.weight_only:
            weight = _weight_only(weight)
            small.pop(self.names.input_global if self.scheme.kind == "nvfp4" else "input_scale", None)
            self.scheme = replace(self.scheme, weight_only=True, input_dynamic=False)
        self._held = TracedLinear(self.name, [weight], numerics=self.numerics, backend=self.backend)
        self._small = small
        self.device = weight.weight.device
        self._infos = {}

    def _weight(self, raw: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]) -> LinearWeight:
        main = self.names.packed if self.scheme.kind == "nvfp4" else "weight"
        # scales are checked on the CPU, and follow the matrix to where it lies
        placed = {suffix: tensor if suffix == main else tensor.cpu() for suffix, tensor in raw.items()}
        return layout.linear(self.names, self.scheme, self.name, placed, infos)

    def _describe(self, raw: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
        return {
            s: self._infos.get(s) or TensorInfo(t.dtype, tuple(t.shape), t.nbytes, MEMORY, 0) for s, t in raw.items()
        }

    def _apply(self, fn: _Apply, recurse: bool = True) -> QuantizedLinear:
        """What ``.to()`` and ``.cuda()`` call: moves the weight where ``fn`` moves tensors; changes no dtype."""
        if self._held is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        device = fn(torch.empty(0, device=self.device)).device
        if device.type == "meta":
            raise UnsupportedError(f"{self.name} cannot be moved to the meta device: its weight would be lost")
        if device != self.device:
            self._take({s: t.to(device) for s, t in self.stored().items()}, False)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._held is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for suffix, tensor in self.stored().items():
            destination[prefix + suffix] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self._held is None:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        raw = {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)}
        if not raw:
            missing_keys.append(prefix + self.names.packed)
            return
        self._take({suffix: tensor.to(self.device) for suffix, tensor in raw.items()}, False)


def _weight_only(weight: LinearWeight) -> LinearWeight:
    if isinstance(weight, NVFP4Weight):
        return replace(weight, input_global_scale=None)
    if isinstance(weight, FP8Weight):
        return replace(weight, input_scale=None, weight_only=True)
    raise InvalidArgumentError("a dense layer has no activation scales")
