"""What a model folder's configuration files say of its quantization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anyfp4.checkpoint import compressed_tensors, modelopt
from anyfp4.checkpoint.files import check_not_placeholder
from anyfp4.checkpoint.scheme import QuantizationConfig, Scheme, expect_dict, unsupported
from anyfp4.errors import CheckpointConfigError, CheckpointFileError

__all__ = ["QuantizationConfig", "Scheme", "read_config", "read_json", "read_quantization"]

CONFIG_FILE = "config.json"
HF_QUANT_CONFIG_FILE = "hf_quant_config.json"
#: spellings of ModelOpt's name in the wild
_MODELOPT = ("modelopt", "modelopt_fp4", "modelopt_mixed")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
        CheckpointFileError: there is none, or it is a placeholder for the real file.
        CheckpointConfigError: it is not a JSON object.
    """
    return read_json(folder / CONFIG_FILE)


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file that holds one object.

    Raises:
        CheckpointFileError: it does not exist, cannot be read, or is a placeholder for the real file.
        CheckpointConfigError: it is not a JSON object.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointFileError("does not exist", file=file) from error
    except OSError as error:
        raise CheckpointFileError(f"cannot be read: {error.strerror}", file=file) from error
    try:
        return expect_dict(json.loads(content), file, "its content")
    except ValueError as error:
        check_not_placeholder(file)
        raise CheckpointConfigError(f"is not valid JSON: {error}", file=file) from error


def read_quantization(folder: Path, config: dict[str, Any]) -> QuantizationConfig:
    """What the configuration says of the quantization.

    Args:
        folder: the model folder; its ``hf_quant_config.json`` is read if there is one.
        config: the content of its ``config.json``.

    Returns:
        The configuration; layout ``none`` and every module dense where nothing is said.

    Raises:
        CheckpointConfigError: it is malformed, or the two files contradict each other.
        UnsupportedError: it asks for something that is not implemented; the message names it.
    """
    file, separate = folder / CONFIG_FILE, folder / HF_QUANT_CONFIG_FILE
    table = config.get("quantization_config")
    if table is None and isinstance(config.get("text_config"), dict):
        table = config["text_config"].get("quantization_config")
    has_separate = separate.exists()
    if table in (None, {}):
        if has_separate:
            return modelopt.parse_hf_quant_config(read_json(separate), separate)
        return QuantizationConfig(layout="none")
    table = expect_dict(table, file, "quantization_config")
    method = _method(table, file)
    if method in _MODELOPT:
        quantization = modelopt.parse(table, file)
        if has_separate:
            other = modelopt.parse_hf_quant_config(read_json(separate), separate)
            _check_agreement(quantization, other, file, separate)
        return quantization
    if has_separate:
        raise CheckpointConfigError(
            f"quant_method is {method!r}, but {HF_QUANT_CONFIG_FILE}, which is ModelOpt's, stands beside it", file=file
        )
    if method == "compressed-tensors":
        return compressed_tensors.parse(table, file)
    raise unsupported(file, "quant_method", method, "compressed-tensors, modelopt")


def _method(table: dict[str, Any], file: Path) -> str:
    method = table.get("quant_method")
    if method is None:
        producer = table.get("producer")
        if isinstance(producer, dict) and producer.get("name") == "modelopt":
            return "modelopt"
        raise CheckpointConfigError(
            "quantization_config has no quant_method; supported: compressed-tensors, modelopt", file=file
        )
    if not isinstance(method, str):
        raise CheckpointConfigError(f"quant_method must be a string, not {method!r}", file=file)
    return method


def _check_agreement(ours: QuantizationConfig, theirs: QuantizationConfig, file: Path, other: Path) -> None:
    for field, what in (
        ("algorithm", "quant_algo"),
        ("kv_cache", "the KV cache"),
        ("groups", "the quantized layers"),
        ("ignore", "the excluded modules"),
    ):
        mine, other_value = getattr(ours, field), getattr(theirs, field)
        if mine != other_value:
            values = f": {mine!r}, not {other_value!r}" if isinstance(mine, str) else ""
            raise CheckpointConfigError(f"contradicts {other.name} about {what}{values}", file=file)
