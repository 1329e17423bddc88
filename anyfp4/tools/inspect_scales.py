"""The scales of a checkpoint: read one by one, checked, and summed up for ``inspect``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch

from anyfp4.checkpoint import checks, layout
from anyfp4.checkpoint.layout import TensorInfo
from anyfp4.checkpoint.scheme import QuantizationConfig, Scheme
from anyfp4.checkpoint.tensor_reader import TensorReader
from anyfp4.errors import AnyFP4Error, CheckpointError
from anyfp4.tools.inspect_report import BlockScales, KVScales, Spread

#: bytes read so far, bytes to read
Progress: TypeAlias = Callable[[int, int], None]
#: projections that run as one GEMM
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_WORST = 5
#: each tensor's largest block is meant to have scale 448; up to this share of such blocks nobody need look at
_NORMAL_SATURATION = 0.001


class ScaleSurvey:
    """Reads all scales, and what is to be said of them."""

    def __init__(
        self,
        quantization: QuantizationConfig | None,
        modules: Mapping[str, Mapping[str, TensorInfo]],
        schemes: Mapping[str, Scheme],
        attentions: Sequence[str],
        infos: Mapping[str, TensorInfo],
        refusals: list[AnyFP4Error],
    ) -> None:
        self._quantization = quantization
        self._modules = modules
        self._schemes = schemes
        self._attentions = attentions
        self._infos = infos
        self._refusals = refusals
        self._globals: dict[str, dict[str, float]] = {"weight": {}, "input": {}}  # of NVFP4 modules
        self._blocks: list[BlockScales] = []
        self._kv: list[tuple[float, float]] = []

    def read(self, progress: Progress | None) -> None:
        """Reads them; faults go to the list of refusals."""
        if self._quantization is None:
            return
        todo = [
            (module, suffix)
            for module in sorted(self._schemes)
            for suffix in sorted(self._modules[module])
            if suffix not in ("weight", "weight_packed", "bias")
        ]
        kv_names = [n for a in self._attentions for n in checks.kv_scale_names(self._quantization, a)]
        total = sum(self._modules[m][s].nbytes for m, s in todo) + sum(self._infos[n].nbytes for n in kv_names)
        reader = TensorReader(self._infos)
        done = 0
        for module, suffix in todo:
            try:
                self._take(module, suffix, reader)
            except CheckpointError as error:
                self._refusals.append(error)
            done += self._modules[module][suffix].nbytes
            if progress is not None:
                progress(done, total)
        kv: dict[str, float] = {}
        for name in kv_names:
            try:
                stored = reader.read(name)
                kv[name] = float(layout.positive_scales(stored, name, self._infos[name].file, is_divisor=False))
            except CheckpointError as error:
                self._refusals.append(error)
            done += self._infos[name].nbytes
            if progress is not None:
                progress(done, total)
        pairs = zip(kv_names[::2], kv_names[1::2], strict=True)
        self._kv = [(kv[k], kv[v]) for k, v in pairs if k in kv and v in kv]
        reader.close()

    def _take(self, module: str, suffix: str, reader: TensorReader) -> None:
        assert self._quantization is not None
        names = checks.names_of(self._quantization)
        scheme = self._schemes[module]
        nvfp4 = scheme.kind == "nvfp4"
        name, file = f"{module}.{suffix}", self._modules[module][suffix].file
        stored = reader.read(name)
        if nvfp4 and suffix == names.block_scale:
            layout.check_block_scale(stored, name, file)
            self._blocks.append(_count(module, stored))
        elif scheme.block_wise:
            layout.fp8_block_scales(stored, name, file)
        elif suffix == names.pre_quant_scale:
            layout.check_finite(stored, name, file)
        else:
            scale = layout.positive_scales(stored, name, file, is_divisor=nvfp4 and names.divisors)
            if nvfp4:
                which = "weight" if suffix == names.weight_global else "input"
                self._globals[which][module] = float(scale)

    def spreads(self) -> tuple[Spread, ...]:
        """One entry for each kind of group and of scale that occurs."""
        spreads = []
        for members in FUSED:
            for scale, values in self._globals.items():
                groups: dict[str, list[float]] = defaultdict(list)
                for module, value in values.items():
                    parent, _, last = module.rpartition(".")
                    if last in members:
                        groups[parent].append(value)
                ratios = {m: max(v) / min(v) for m, v in groups.items() if len(v) > 1}
                if ratios:
                    worst = max(ratios, key=lambda m: ratios[m])
                    group = "/".join(member.removesuffix("_proj") for member in members)
                    differing = sum(ratio != 1 for ratio in ratios.values())
                    spreads.append(Spread(group, scale, len(ratios), differing, ratios[worst], worst))
        return tuple(spreads)

    def total_block_scales(self) -> BlockScales | None:
        """The counts of all layers together."""
        if not self._blocks:
            return None
        sums = [sum(getattr(b, f) for b in self._blocks) for f in ("total", "zero", "subnormal", "saturated")]
        return BlockScales("", *sums)

    def worst_block_scales(self) -> tuple[BlockScales, ...]:
        """The layers with the largest share of zero, subnormal and saturated scales, a few saturated ones apart."""
        marked = [b for b in self._blocks if b.zero + b.subnormal or b.saturated > _NORMAL_SATURATION * b.total]
        marked.sort(key=lambda b: (b.zero + b.subnormal + b.saturated) / b.total, reverse=True)
        return tuple(marked[:_WORST])

    def kv_scales(self) -> KVScales | None:
        """The range of the KV cache's scales."""
        if not self._kv:
            return None
        k, v = zip(*self._kv, strict=True)
        return KVScales(len(self._kv), (min(k), max(k)), (min(v), max(v)))


def _count(module: str, block_scale: torch.Tensor) -> BlockScales:
    magnitudes = block_scale.view(torch.uint8).numpy().reshape(-1) & 0x7F
    counts = np.bincount(magnitudes, minlength=128)
    return BlockScales(
        module=module,
        total=int(counts.sum()),
        zero=int(counts[0]),
        subnormal=int(counts[1:8].sum()),
        saturated=int(counts[0x7E]),
    )
