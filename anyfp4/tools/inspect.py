"""What a checkpoint is made of: layout, kinds of layers, scales, and whatever would be refused.

Loading stops at the first fault; this goes on and reports all of them. Only scales are read, tensor by tensor, so a
large model takes little memory and about a ninth of the reading.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from anyfp4.checkpoint import checks
from anyfp4.checkpoint.config import read_config, read_quantization
from anyfp4.checkpoint.files import read_header
from anyfp4.checkpoint.layout import QUANTIZATION_SUFFIXES, TensorInfo
from anyfp4.checkpoint.reader import scan_folder
from anyfp4.checkpoint.scheme import QuantizationConfig, Scheme
from anyfp4.errors import AnyFP4Error, CheckpointError, CheckpointFileError
from anyfp4.tools.inspect_report import Kind, Refusal, Report, render
from anyfp4.tools.inspect_scales import Progress, ScaleSurvey

__all__ = ["Report", "inspect", "render"]


def inspect(folder: Path | str, progress: Progress | None = None) -> Report:
    """Looks through a checkpoint.

    Args:
        folder: a model folder, in any state.
        progress: called after each tensor with the bytes read so far and in all.

    Returns:
        The report; what a loader would refuse is part of it.

    Raises:
        CheckpointFileError: ``folder`` is no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointFileError("is not a folder; a model folder is expected", file=folder)
    refusals: list[AnyFP4Error] = []
    config, quantization = _read_configuration(folder, refusals)
    infos = _read_headers(folder, refusals)
    modules = checks.by_module(quantization or QuantizationConfig("none"), infos)
    schemes: dict[str, Scheme] = {}
    attentions: list[str] = []
    if quantization is not None:
        schemes = _check_modules(quantization, modules, refusals)
        try:
            attentions = checks.check_kv_scales(quantization, infos)
        except CheckpointError as error:
            refusals.append(error)
    scales = ScaleSurvey(quantization, modules, schemes, attentions, infos, refusals)
    scales.read(progress)
    apart = [i for n, i in infos.items() if n.rpartition(".")[2] not in modules.get(n.rpartition(".")[0], ())]
    kinds, parameters = _kinds(modules, schemes, apart)
    total_bytes = sum(info.nbytes for info in infos.values())
    architectures = config.get("architectures")
    return Report(
        folder=str(folder),
        layout=quantization.layout if quantization else None,
        producer=quantization.producer if quantization else "",
        algorithm=quantization.algorithm if quantization else _stated_algorithm(config),
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        model_type=str(config["model_type"]) if "model_type" in config else None,
        total_bytes=total_bytes,
        parameters=parameters,
        bits_per_weight=8 * total_bytes / parameters if parameters else 0.0,
        kinds=kinds,
        spreads=scales.spreads(),
        block_scales=scales.total_block_scales(),
        worst_block_scales=scales.worst_block_scales(),
        kv_cache=quantization.kv_cache if quantization else "none",
        kv_scales=scales.kv_scales(),
        pre_quant_scales=tuple(sorted(m for m, s in modules.items() if "pre_quant_scale" in s)),
        refusals=tuple(Refusal(type(e).__name__, str(e)) for e in refusals),
    )


def _read_configuration(folder: Path, refusals: list[AnyFP4Error]) -> tuple[dict[str, Any], QuantizationConfig | None]:
    try:
        config = read_config(folder)
    except CheckpointError as error:
        refusals.append(error)
        return {}, None
    try:
        return config, read_quantization(folder, config)
    except AnyFP4Error as error:
        refusals.append(error)
        return config, None


def _stated_algorithm(config: Mapping[str, Any]) -> str:
    """What a refused configuration calls itself, as far as it can be told."""
    table = config.get("quantization_config")
    stated = [table.get(key) for key in ("quant_method", "quant_algo", "format")] if isinstance(table, dict) else []
    return " ".join(value for value in stated if isinstance(value, str))


def _read_headers(folder: Path, refusals: list[AnyFP4Error]) -> dict[str, TensorInfo]:
    try:
        return scan_folder(folder)
    except CheckpointError as error:
        refusals.append(error)
    infos: dict[str, TensorInfo] = {}
    for file in sorted(folder.glob("*.safetensors")):  # whatever can be read
        try:
            infos |= read_header(file)
        except CheckpointError as error:
            if str(error) != str(refusals[-1]):
                refusals.append(error)
    return infos


def _check_modules(
    quantization: QuantizationConfig,
    modules: Mapping[str, Mapping[str, TensorInfo]],
    refusals: list[AnyFP4Error],
) -> dict[str, Scheme]:
    """The schemes of the quantized modules that pass."""
    schemes = {}
    for module, tensors in modules.items():
        try:
            checks.check_module(quantization, module, tensors)
        except CheckpointError as error:
            refusals.append(error)
            continue
        scheme = quantization.scheme_of(module)
        if scheme.kind != "dense" and QUANTIZATION_SUFFIXES & tensors.keys():
            schemes[module] = scheme
    return schemes


def _kinds(
    modules: Mapping[str, Mapping[str, TensorInfo]],
    schemes: Mapping[str, Scheme],
    apart: Sequence[TensorInfo],
) -> tuple[tuple[Kind, ...], int]:
    """The table of kinds, largest first, and the number of weights."""
    layers: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    dtypes: dict[str, list[TensorInfo]] = defaultdict(list)
    for module, tensors in modules.items():
        name = _kind_name(module, tensors, schemes)
        layers[name] += 1
        for suffix, info in tensors.items():
            nbytes[name] += info.nbytes
            dtypes[name].append(info)
            if suffix not in QUANTIZATION_SUFFIXES or suffix == "weight_packed":
                packed = info.dtype == torch.uint8 and suffix in ("weight", "weight_packed")
                weights[name] += math.prod(info.shape) * (2 if packed else 1)
    kinds = [
        Kind(
            name,
            layers[name],
            _dtypes(dtypes[name]),
            weights[name],
            nbytes[name],
            8 * nbytes[name] / weights[name] if weights[name] else 0.0,
        )
        for name in layers
    ]
    if apart:  # KV scales belong to no module
        kinds.append(Kind("KV cache scales", len(apart), _dtypes(apart), 0, sum(i.nbytes for i in apart), 0.0))
    return tuple(sorted(kinds, key=lambda kind: -kind.nbytes)), sum(weights.values())


def _dtypes(infos: Iterable[TensorInfo]) -> tuple[str, ...]:
    return tuple(sorted({str(info.dtype).removeprefix("torch.") for info in infos}))


def _kind_name(
    module: str,
    tensors: Mapping[str, TensorInfo],
    schemes: Mapping[str, Scheme],
) -> str:
    if module in schemes:
        return schemes[module].label
    if QUANTIZATION_SUFFIXES & tensors.keys():
        return "refused"
    weight = tensors.get("weight")
    if weight is None or len(weight.shape) < 2:
        return "norms and other vectors"
    dtype = str(weight.dtype).removeprefix("torch.")
    if checks.is_embedding(module):
        return f"embedding {dtype}"
    return f"dense {dtype}"
