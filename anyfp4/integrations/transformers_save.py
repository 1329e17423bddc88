"""What ``save_pretrained`` writes: the tensors and the ``quantization_config`` of either layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anyfp4.checkpoint import compressed_tensors, emit, modelopt
from anyfp4.checkpoint.checks import is_embedding
from anyfp4.checkpoint.layout import Suffixes
from anyfp4.checkpoint.scheme import DENSE, Scheme
from anyfp4.integrations.transformers_internals import revert_weight_conversion
from anyfp4.integrations.transformers_linear import QuantizedLinear

NAMES = {"compressed-tensors": compressed_tensors.NAMES, "modelopt": modelopt.NAMES}


def layout_of(names: Suffixes) -> str:
    """The layout that has these tensor names."""
    return next(layout for layout, other in NAMES.items() if other == names)


def state_dict(model: nn.Module, layout: str) -> dict[str, Tensor] | None:
    """The model's tensors in a layout; None where ``model.state_dict()`` gives just these.

    Raises:
        UnsupportedError: the layout has no place for something.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if all(layer.names == NAMES[layout] for layer in layers.values()):
        return None
    state: dict[str, Tensor] = model.state_dict()
    for name, layer in layers.items():
        if layer.names == NAMES[layout]:
            continue
        for key in [key for key in state if key.rpartition(".")[0] == name]:
            del state[key]
        state.update(emit.tensors(NAMES[layout], name, layer.to_weight()))
    return state


def quantization_table(model: Any, layout: str) -> dict[str, Any]:
    """The ``quantization_config`` of config.json for a model as it is.

    Raises:
        InvalidArgumentError: no layer is quantized.
        UnsupportedError: the layout has no name for a scheme.
    """
    schemes: dict[str, Scheme] = {}
    quantized: dict[str, Scheme] = {}
    dense: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            quantized[name] = module.scheme
            continue
        dense |= {f"{name}.{suffix}".removeprefix("."): t for suffix, t in module.named_parameters(recurse=False)}
        if isinstance(module, nn.Linear):
            schemes[name] = DENSE  # by the model's name too, for readers that go by it
    for name, shape in _saved(model, dense).items():
        module_name, _, suffix = name.rpartition(".")
        if suffix == "weight" and len(shape) == 2 and (layout == "modelopt" or not is_embedding(module_name)):
            schemes[module_name] = DENSE
    for name, scheme in quantized.items():
        (key,) = _saved(model, {f"{name}.weight": torch.empty(0)})
        schemes[key.removesuffix(".weight")] = scheme
    write = compressed_tensors.quantization_config if layout == "compressed-tensors" else modelopt.quantization_config
    return write(schemes)


def _saved(model: Any, tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    """The names and shapes that tensors have in the files: saving undoes the renaming and joining of loading."""
    if not getattr(model, "_weight_conversions", None):
        return {name: tensor.shape for name, tensor in tensors.items()}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    return {str(name): tensor.shape for name, tensor in revert_weight_conversion(model, shapes).items()}
