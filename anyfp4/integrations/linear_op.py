"""A linear layer as one op of PyTorch, for models that other libraries trace, compile and capture.

A backend's prepared weight is no tensor, so the op ``anyfp4::linear`` takes the layer's name and looks it up. To
``torch.compile`` and CUDA graphs it is one opaque call with a known output shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, library

from anyfp4.errors import InvalidArgumentError
from anyfp4.formats.weights import LinearWeight
from anyfp4.layers.linear import Linear

#: what the op can see; a layer that its model has dropped leaves by itself
_LAYERS: WeakValueDictionary[str, TracedLinear] = WeakValueDictionary()


class TracedLinear:
    """Projections side by side (``anyfp4.layers.linear``), called through ``torch.ops.anyfp4.linear``.

    Attributes:
        name: what the op looks up.
        linear: the prepared layer.
        in_features, out_features: K and N of all projections.
    """

    def __init__(self, name: str, weights: Iterable[LinearWeight], *, numerics: str, backend: str) -> None:
        """Prepares the weights and makes them known.

        Args:
            name: such as the module's full name. Where it is taken by a layer still in use, a number is added; in the
                same order of construction a process gives the same names, so compiled code can be kept between runs.
            weights: one or more, same K, in the order of the output.
            numerics: of W4A4 products.
            backend: ``auto`` or a backend's name.

        Raises:
            BackendError: the backend that was asked for cannot run one of them.
        """
        self.linear = Linear(weights, numerics=numerics, backend=backend)
        self.in_features = self.linear.parts[0][1].shape[1]
        self.out_features = self.linear.out_features
        names = itertools.chain([name], (f"{name}#{i}" for i in itertools.count(2)))
        self.name = next(free for free in names if free not in _LAYERS)
        _LAYERS[self.name] = self

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N] of the dtype of ``x``."""
        y: Tensor = torch.ops.anyfp4.linear(x, self.name, self.out_features)
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedLinear:
        """Itself: nothing in it ever changes."""
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise InvalidArgumentError(
            f"layer {self.name} cannot be pickled: its weight lies in a backend's private layout; "
            "save the model as a checkpoint instead"
        )


@library.custom_op("anyfp4::linear", mutates_args=())
def _linear(x: Tensor, layer: str, out_features: int) -> Tensor:
    held = _LAYERS.get(layer)
    if held is None:
        raise InvalidArgumentError(f"there is no layer {layer!r} (any more): the model that it belonged to was dropped")
    if out_features != held.out_features:
        raise InvalidArgumentError(f"layer {layer!r} has {held.out_features} outputs, not {out_features}")
    return held.linear(x)


@_linear.register_fake
def _(x: Tensor, layer: str, out_features: int) -> Tensor:
    del layer
    return x.new_empty((*x.shape[:-1], out_features))
