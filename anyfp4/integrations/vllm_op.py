"""The op that vLLM compiles and captures: a prepared linear layer, found by a tensor of its module.

vLLM keeps compiled code between runs, shares it between layers that look alike, and may hold two models in one
process. A layer's name in that code (``linear_op``) would make every layer's graph another one, and could find the
layer of the other model. So the op takes a tensor of one byte, the handle, that stands where the module's weight was:
to the compiler an input like any weight, at run time the address under which the layer is found.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, library

from anyfp4.errors import InvalidArgumentError
from anyfp4.formats.weights import LinearWeight
from anyfp4.layers.linear import Linear

#: address of the handle -> layer; the handle lives as long as its layer, so no address is taken twice
_LAYERS: WeakValueDictionary[int, HandledLinear] = WeakValueDictionary()


class HandledLinear:
    """A prepared layer without its bias, which vLLM hands over at each call.

    Attributes:
        handle: uint8 [1], on the layer's device.
        linear: the prepared layer.
        out_features: N.
    """

    def __init__(self, weights: Iterable[LinearWeight], device: torch.device, *, numerics: str, backend: str) -> None:
        """Prepares the weights; arguments as those of :class:`anyfp4.layers.linear.Linear`."""
        self.linear = Linear(weights, numerics=numerics, backend=backend)
        self.out_features = self.linear.out_features
        self.handle = torch.zeros(1, dtype=torch.uint8, device=device)
        _LAYERS[self.handle.data_ptr()] = self

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] to [..., N] of the dtype of ``x``: the scaled sum in float32, then the bias, rounded once."""
        if bias is None:
            return self.linear(x)
        return (self.linear(x, torch.float32) + bias.to(torch.float32)).to(x.dtype)

    def replace(self, weights: Iterable[LinearWeight], *, numerics: str, backend: str) -> None:
        """Prepares other weights of the same shape, under the same handle; the old ones are let go of first."""
        del self.linear
        self.linear = Linear(weights, numerics=numerics, backend=backend)

    def __deepcopy__(self, memo: dict[int, Any]) -> HandledLinear:
        """Itself: a copied module shares it."""
        return self


def call(x: Tensor, handle: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """The layer of ``handle``, as one op of PyTorch."""
    y: Tensor = torch.ops.anyfp4.handled_linear(x, handle, bias, out_features)
    return y


def _linear(x: Tensor, handle: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    held = _LAYERS.get(handle.data_ptr())
    if held is None or held.out_features != out_features:
        raise InvalidArgumentError(
            "compiled code was handed a tensor that is no layer of anyfp4: vLLM has moved or copied the module's "
            "weight, as CPU offloading does, which anyfp4's layers do not support"
        )
    return held(x, bias)


def _fake(x: Tensor, handle: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    del handle, bias
    return x.new_empty((*x.shape[:-1], out_features))


# PyTorch's `custom_op` does more for each call, 20 µs that a layer of a small model on a CPU does not take itself
_OPS = library.Library("anyfp4", "FRAGMENT")
_OPS.define("handled_linear(Tensor x, Tensor handle, Tensor? bias, int out_features) -> Tensor")
_OPS.impl("handled_linear", _linear, "CompositeExplicitAutograd")
library.register_fake("anyfp4::handled_linear", _fake, lib=_OPS)
