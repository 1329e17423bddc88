"""A linear layer of the decoder: one projection, or several that share their input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from anyfp4.backends import registry
from anyfp4.backends.base import Backend, PreparedLinear
from anyfp4.formats.nvfp4 import NVFP4Tensor
from anyfp4.formats.weights import FP8_BLOCK_SIZE, DenseWeight, FP8Weight, LinearWeight, NVFP4Weight


class Linear:
    """y = x · [W₁; W₂; …]ᵀ: projections side by side, each with its own scales.

    Neighbours of the same kind become the shards of one matrix with one alpha per shard, block-wise FP8 ones where
    their blocks line up; a mixture of kinds (an FP8 projection beside NVFP4 ones) stays a sequence of products.
    """

    def __init__(self, weights: Iterable[LinearWeight], *, numerics: str = "native", backend: str = "auto") -> None:
        """Fuses and prepares.

        Args:
            weights: one or more, same K, in the order of the output. What an iterator gives is let go of as soon as it
                is fused, and that as soon as it is prepared.
            numerics: of W4A4 products.
            backend: ``auto`` or a backend's name.

        Raises:
            BackendError: the backend that was asked for cannot run one of them.
        """
        self.parts: list[tuple[Backend, PreparedLinear]] = []
        for weight in fuse(weights):
            chosen = registry.select(weight.weight.device, shape=weight.shape, numerics=numerics, requested=backend)
            self.parts.append((chosen, chosen.prepare(weight, numerics)))
            del weight  # or it would be held while the next one is joined
        self.out_features = sum(prepared.shape[0] for _, prepared in self.parts)
        self.nbytes = sum(prepared.nbytes for _, prepared in self.parts)

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [..., K] to [..., N₁ + N₂ + …]."""
        outputs = [backend.linear(x, prepared, out_dtype) for backend, prepared in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def fuse(weights: Iterable[LinearWeight]) -> Iterator[LinearWeight]:
    """Joins neighbours that one product can serve; nothing is lost, scales stay per shard.

    Holds no more of the weights than one group and the first of the next.
    """
    group: list[LinearWeight] = []
    for weight in weights:
        if group and not _fusible(group[-1], weight):
            yield _join(group)
        group.append(weight)
        del weight
    yield _join(group)


def _fusible(a: LinearWeight, b: LinearWeight) -> bool:
    if a.shape[1] != b.shape[1] or (a.bias is None) != (b.bias is None):
        return False
    if isinstance(a, NVFP4Weight) and isinstance(b, NVFP4Weight):
        if a.weight_only != b.weight_only or (a.pre_quant_scale is None) != (b.pre_quant_scale is None):
            return False
        return a.pre_quant_scale is None or torch.equal(a.pre_quant_scale, _not_none(b.pre_quant_scale))
    if isinstance(a, FP8Weight) and isinstance(b, FP8Weight):
        # rows of scales lie side by side only where a weight ends with a whole block
        alike = a.block_wise and b.block_wise and a.weight_only == b.weight_only
        return alike and a.shape[0] % FP8_BLOCK_SIZE == 0
    if isinstance(a, DenseWeight) and isinstance(b, DenseWeight):
        return a.weight.dtype == b.weight.dtype
    return False


def _join(group: list[LinearWeight]) -> LinearWeight:
    """One weight of all; the list is emptied, so that the caller holds none of them."""
    taken = list(group)
    group.clear()
    return taken[0] if len(taken) == 1 else _concatenate(taken)


def _concatenate(group: list[LinearWeight]) -> LinearWeight:
    biases = [w.bias for w in group if w.bias is not None]
    bias = torch.cat([b.to(torch.float32) for b in biases]) if biases else None
    dense = [w for w in group if isinstance(w, DenseWeight)]
    if dense:
        return DenseWeight(torch.cat([w.weight for w in dense]), bias)
    fp8 = [w for w in group if isinstance(w, FP8Weight)]
    if fp8:
        codes = torch.cat([w.weight.view(torch.uint8) for w in fp8]).view(torch.float8_e4m3fn)
        grid = torch.cat([w.weight_scale for w in fp8])
        return FP8Weight(codes, grid, None, bias, fp8[0].weight_only)
    nvfp4 = [w for w in group if isinstance(w, NVFP4Weight)]
    scales = [w.input_global_scale for w in nvfp4 if w.input_global_scale is not None]
    tensor = NVFP4Tensor(
        packed=torch.cat([w.weight.packed for w in nvfp4]),
        block_scale=torch.cat([w.weight.block_scale.view(torch.uint8) for w in nvfp4]).view(torch.float8_e4m3fn),
        global_scale=torch.cat([w.weight.global_scale for w in nvfp4]),
        shard_sizes=tuple(size for w in nvfp4 for size in w.weight.shard_sizes),
    )
    return NVFP4Weight(tensor, torch.cat(scales) if scales else None, nvfp4[0].pre_quant_scale, bias)


def _not_none(t: Tensor | None) -> Tensor:
    assert t is not None
    return t
