"""Quantizing on the fly, weight by weight as transformers loads them, and calibrating the input scales for W4A4.

The recipe is that of ``anyfp4 quantize``: projections that run as one GEMM elsewhere (q/k/v, gate/up) share a global
scale, the smallest power of two that is at least amax / 2688. So the first weights of such a group wait, unquantized,
for the last one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anyfp4.checkpoint import compressed_tensors
from anyfp4.checkpoint.checks import is_embedding, is_router
from anyfp4.checkpoint.layout import FLOATS, Suffixes
from anyfp4.checkpoint.scheme import DENSE
from anyfp4.errors import InvalidArgumentError, TensorError, UnsupportedError
from anyfp4.formats import nvfp4
from anyfp4.formats.nvfp4 import BLOCK_SIZE
from anyfp4.formats.weights import NVFP4Weight
from anyfp4.integrations.transformers_internals import ConversionOps
from anyfp4.integrations.transformers_linear import QuantizedLinear
from anyfp4.integrations.transformers_load import replace_layer
from anyfp4.tools.quantize import fused_with, matches, quantize_weight, weight_global_scale

_LOG = logging.getLogger(__name__)


class QuantizeOnLoad:
    """The layers of a model that are quantized while it loads.

    Attributes:
        error: the first thing that went wrong. transformers catches what is raised while it loads, and would tell of it
            in a table at the end; so it is kept, and raised then.
    """

    def __init__(self, model: Any, names: Suffixes, ignore: Sequence[str], *, numerics: str, backend: str) -> None:
        """Puts empty layers in place.

        Raises:
            InvalidArgumentError: a pattern of ``ignore`` matches nothing, or nothing is left to quantize.
            UnsupportedError: the model keeps matrices of experts in one tensor.
        """
        self.error: Exception | None = None
        chosen = _choose(model, ignore)
        self.layers: dict[str, QuantizedLinear] = {}
        for name, old in chosen.items():
            layer = QuantizedLinear(name, old.in_features, old.out_features, names, numerics=numerics, backend=backend)
            for parameter, value in old.named_parameters():
                layer.register_parameter(parameter, nn.Parameter(value.detach(), requires_grad=False))
            replace_layer(model, name, layer)
            self.layers[name] = layer
        self._waiting: dict[str, Tensor] = {}

    def needs(self, parameter: str) -> bool:
        """Whether a parameter of the model is to be quantized."""
        name, _, suffix = parameter.rpartition(".")
        return suffix == "weight" and name in self.layers

    def arrived(self, parameter: str, weight: Tensor) -> None:
        """Takes a loaded weight [N, K].

        Raises:
            TensorError: it holds a NaN or an infinity, or is not floating-point.
        """
        name = parameter.removesuffix(".weight")
        if weight.dtype not in FLOATS:
            raise TensorError(f"must be bfloat16, float16 or float32, got {weight.dtype}", tensor=parameter)
        layer = self.layers[name]
        wanted = [layer.out_features, layer.in_features]
        if list(weight.shape) != wanted:
            raise TensorError(
                f"has shape {list(weight.shape)}, but the model's configuration needs {wanted}", tensor=parameter
            )
        self._waiting[name] = weight
        group = [member for member in fused_with(name) if member in self.layers]
        if not all(member in self._waiting for member in group):
            return
        amax = max(_amax(f"{member}.weight", self._waiting[member]) for member in group)
        for member in group:
            tensor = self._waiting.pop(member)
            scale = weight_global_scale(amax).to(tensor.device)
            self.layers[member].receive(NVFP4Weight(quantize_weight(tensor, scale)))

    def check(self) -> None:
        """Raises what went wrong, if anything did.

        Raises:
            TensorError: a weight was bad, or never came.
        """
        if self.error is not None:
            raise self.error
        for name, layer in self.layers.items():
            if layer.scheme == DENSE:
                raise TensorError("is missing", tensor=f"{name}.weight")

    def operation(self) -> ConversionOps:
        """What transformers calls with each weight that :meth:`needs` names."""
        return _Quantize(self)


class _Quantize(ConversionOps):
    def __init__(self, owner: QuantizeOnLoad) -> None:
        self.owner = owner

    def __deepcopy__(self, memo: dict[int, Any]) -> _Quantize:
        return self

    def convert(
        self, input_dict: dict[str, Any], *args: Any, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Takes the weights that are to be quantized, and hands back the others."""
        rest: dict[str, Any] = {}
        for key, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if not self.owner.needs(key):
                rest[key] = tensor
                continue
            if missing_keys is not None:
                missing_keys.discard(key)
            try:
                if self.owner.error is None:
                    self.owner.arrived(key, tensor)
            except Exception as error:  # raised again once transformers has loaded the rest
                self.owner.error = error
        return rest


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]]) -> dict[str, float]:
    """Makes the weight-only NVFP4 layers of a model W4A4: runs text through it and sets each layer's input scale.

    The scale is amax / 2688, amax being the largest magnitude of the layer's input; larger inputs saturate later on.
    The model that reads the text is the weight-only one.

    Args:
        model: loaded or quantized on the fly through this integration.
        batches: what the model is called with, one after the other: token ids int64 [B, T], or keyword arguments.

    Returns:
        The amax of each layer, by name.

    Raises:
        InvalidArgumentError: there is no weight-only NVFP4 layer, or no batch.
        TensorError: a layer was never run, or its input is zero throughout or not finite.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, QuantizedLinear) and module.scheme.kind == "nvfp4" and module.scheme.weight_only
    ]
    if not layers:
        raise InvalidArgumentError("the model has no weight-only NVFP4 layer, so there is nothing to calibrate")
    amax: dict[str, Tensor] = {}

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, QuantizedLinear)
        seen = inputs[0].abs().amax().to(torch.float32)
        amax[layer.name] = torch.maximum(amax.get(layer.name, seen), seen)  # keeps a NaN

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        for batch in batches:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not amax:
        raise InvalidArgumentError("there is no batch to calibrate on")
    found = {layer.name: _checked_amax(layer.name, amax.get(layer.name)) for layer in layers}
    for layer in layers:
        scale = nvfp4.default_global_scale(torch.tensor(found[layer.name])).reshape(1)
        # a multiplier that both layouts store exactly
        layer.set_input_scale(compressed_tensors.storable_global_scale(scale))
    return found


def _checked_amax(name: str, value: Tensor | None) -> float:
    if value is None:
        raise TensorError("the layer was never run during calibration", tensor=name)
    amax = float(value)
    if amax == 0:
        raise TensorError("the layer's input is zero throughout the calibration, so it has no scale", tensor=name)
    if not math.isfinite(amax):
        raise TensorError(f"the layer's input reaches {amax} during calibration", tensor=name)
    return amax


def _amax(tensor: str, weight: Tensor) -> float:
    low, high = weight.aminmax()
    amax = max(-float(low), float(high))
    if not math.isfinite(amax):
        raise TensorError("holds a NaN or an infinity", tensor=tensor)
    return amax


def _choose(model: Any, ignore: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers to quantize: all but output embeddings, tied ones, routers, and those to be ignored."""
    head = model.get_output_embeddings()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    ignored = matches(ignore, list(linears) + _experts(model)) if linears else set()
    _refuse_experts(model, ignored)
    wide = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    chosen: dict[str, nn.Linear] = {}
    for name, module in linears.items():
        special = module is head or f"{name}.weight" in tied or is_embedding(name) or is_router(name)
        if special or name in ignored or wide & set(name.split(".")):
            continue
        if module.in_features % BLOCK_SIZE:
            _LOG.warning("%s stays dense: its %d inputs are no multiple of %d", name, module.in_features, BLOCK_SIZE)
            continue
        chosen[name] = module
    if not chosen:
        raise InvalidArgumentError(
            f"a {type(model).__name__} has no nn.Linear layer left to quantize: every one is ignored, of a wrong size, "
            "or an embedding"
        )
    return chosen


def _experts(model: nn.Module) -> list[str]:
    """The modules that hold a stack of matrices in one tensor, as mixtures of experts do."""
    return sorted(
        {
            name.rpartition(".")[0]
            for name, parameter in model.named_parameters()
            if parameter.dim() == 3 and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Conv1d)
        }
    )


def _refuse_experts(model: nn.Module, ignored: set[str]) -> None:
    for name in _experts(model):
        if name not in ignored:
            raise UnsupportedError(
                f"{name} is a {type(model.get_submodule(name)).__name__} with the matrices of several experts in one "
                "tensor; only nn.Linear layers can be quantized: name it in AnyFP4Config(ignore=[...]), and it stays "
                "dense"
            )
