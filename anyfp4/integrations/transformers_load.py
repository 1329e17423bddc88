"""Which linear layer of a transformers model is which module of a checkpoint; everything that headers tell is checked.

transformers renames some tensors on loading, so a layer's name in the model may differ from the checkpoint's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from anyfp4.checkpoint.checks import check_tensors, names_of
from anyfp4.checkpoint.config import HF_QUANT_CONFIG_FILE, read_json
from anyfp4.checkpoint.files import INDEX_FILE, merge, scan
from anyfp4.checkpoint.layout import QUANTIZATION_SUFFIXES, TensorInfo
from anyfp4.checkpoint.scheme import QuantizationConfig, Scheme
from anyfp4.errors import CheckpointFileError, TensorError, UnsupportedError
from anyfp4.integrations.transformers_internals import (
    WeightConverter,
    WeightRenaming,
    cached_file,
    get_model_conversion_mapping,
    rename_source_key,
)
from anyfp4.integrations.transformers_linear import QuantizedLinear


def declare_layers(
    model: Any, quantization: QuantizationConfig, files: Sequence[Path], *, numerics: str, backend: str
) -> list[QuantizedLinear]:
    """Puts a :class:`QuantizedLinear` in place of every linear layer that the checkpoint holds quantized.

    Args:
        model: on the meta device.
        quantization: what the configuration says.
        files: the checkpoint's safetensors files.
        numerics: of W4A4 products.
        backend: ``auto`` or a backend's name.

    Raises:
        CheckpointError: the tensors are not those that the configuration promises, or do not fit the model.
        UnsupportedError: a quantized layer is no ``nn.Linear`` of the model.
    """
    modules = check_tensors(quantization, _headers(files))
    rename = _Renaming(model)
    layers, present = [], set()
    for module, infos in modules.items():
        name, converted = rename(module)
        present.add(name)
        scheme = quantization.scheme_of(module)
        if scheme.kind == "dense" or not QUANTIZATION_SUFFIXES & infos.keys():
            continue
        if converted:
            raise UnsupportedError(
                f"{module} is quantized, but transformers joins or reshapes its tensors on loading (into {name}), as "
                "it does with the experts of a mixture; only linear layers can be loaded"
            )
        old = _linear_layer(model, module, name, scheme, infos)
        if old is None:
            continue
        _check_fits(quantization, old, module, scheme, infos)
        layer = QuantizedLinear(
            name, old.in_features, old.out_features, names_of(quantization), numerics=numerics, backend=backend
        )
        layer.declare(scheme, infos)
        replace_layer(model, name, layer)
        layers.append(layer)
    _refuse_missing(model, quantization, present, files)
    return layers


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts ``layer`` where the model has a module of that name."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = layer


def quant_config_folder(model: Any, files: Sequence[Path]) -> Path | None:
    """The folder of hf_quant_config.json, for a checkpoint whose config.json says nothing; None if there is none."""
    if not files:
        return None
    folder = files[0].parent
    if (folder / HF_QUANT_CONFIG_FILE).exists():
        return folder
    name = str(getattr(model.config, "name_or_path", ""))
    if not name or Path(name).is_dir() or folder.parent.name != "snapshots":
        return None
    found = cached_file(
        name,
        HF_QUANT_CONFIG_FILE,
        revision=folder.name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found).parent


class _Renaming:
    """A checkpoint's module to (the model's name for it, whether its tensors are more than renamed)."""

    def __init__(self, model: Any) -> None:
        mapping = get_model_conversion_mapping(model, None, None)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()

    def __call__(self, module: str) -> tuple[str, bool]:
        key, pattern = rename_source_key(
            f"{module}.weight", self._renamings, self._converters, self._prefix, self._state
        )
        return key.removesuffix(".weight"), pattern is not None


def require_unquantized(files: Sequence[Path]) -> None:
    """Refuses safetensors files that hold a quantized model.

    Raises:
        CheckpointConfigError: they do, although no configuration says so.
    """
    if all(file.suffix == ".safetensors" for file in files):
        check_tensors(QuantizationConfig(layout="none"), _headers(files))


def _headers(files: Sequence[Path]) -> dict[str, TensorInfo]:
    """The headers of all tensors; index and files must agree where an index names the files."""
    for file in files:
        if file.suffix != ".safetensors":
            raise CheckpointFileError("is no safetensors file: a quantized checkpoint is one", file=file)
    index = files[0].with_name(INDEX_FILE)
    content = read_json(index) if index.exists() else {}
    if files[0].name in dict(content.get("weight_map") or {}).values():
        return scan(files[0].parent, content)
    return merge(files)


def _linear_layer(
    model: Any, module: str, name: str, scheme: Scheme, infos: Mapping[str, TensorInfo]
) -> nn.Linear | None:
    """The layer of the model that a quantized module is; None where the model leaves such tensors out on purpose."""
    try:
        old = model.get_submodule(name)
    except AttributeError:
        left_out = model._keys_to_ignore_on_load_unexpected or ()
        if any(re.search(pattern, f"{module}.weight") for pattern in left_out):
            return None
        file = next(iter(infos.values())).file
        raise TensorError(
            f"is {scheme.label}, but a {type(model).__name__} has no linear layer of that name",
            file=file,
            tensor=module,
        ) from None
    if type(old) is not nn.Linear:
        raise UnsupportedError(
            f"{module} is {scheme.label}, but in a {type(model).__name__} it is a {type(old).__name__}; only nn.Linear "
            "layers can be quantized"
        )
    return old


def _check_fits(
    quantization: QuantizationConfig, old: nn.Linear, module: str, scheme: Scheme, infos: Mapping[str, TensorInfo]
) -> None:
    main = names_of(quantization).packed if scheme.kind == "nvfp4" else "weight"
    n, columns = infos[main].shape
    stored = [n, 2 * columns if scheme.kind == "nvfp4" else columns]
    wanted = [old.out_features, old.in_features]
    if stored != wanted:
        raise TensorError(
            f"has shape {stored}, but the model's configuration needs {wanted}",
            file=infos[main].file,
            tensor=f"{module}.{main}",
        )
    if ("bias" in infos) != (old.bias is not None):
        missing = "is missing"
        extra = "is not expected: the model's configuration has no bias here"
        raise TensorError(extra if "bias" in infos else missing, file=infos[main].file, tensor=f"{module}.bias")


def _refuse_missing(model: Any, quantization: QuantizationConfig, present: set[str], files: Sequence[Path]) -> None:
    """Refuses linear layers that should be quantized and have no tensors; transformers would fill them at random."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or name in present or f"{name}.weight" in tied:
            continue
        scheme = quantization.scheme_of(name)
        if scheme.kind != "dense":
            raise TensorError(
                f"is missing ({scheme.label}, {module.out_features} × {module.in_features})",
                file=files[0].parent,
                tensor=f"{name}.weight",
            )
