"""NVFP4 inside Hugging Face transformers: importing this module is all that it takes.

    import anyfp4.integrations.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("folder-or-id")

loads ModelOpt's checkpoints and compressed-tensors' with NVFP4 layers, and runs them as W4A4 or weight-only with packed
weights. ``AnyFP4Config`` as ``quantization_config`` chooses numerics, backend and more, and quantizes unquantized
models while they load; ``calibrate`` makes those W4A4. What is not ours goes to transformers' own quantizers, and so
does an NVFP4 checkpoint loaded with an explicit ``CompressedTensorsConfig``.

Registered are, through transformers' own functions, the method ``anyfp4`` and ModelOpt's names. compressed-tensors is
taken by transformers itself, so which of the two loads a checkpoint is decided where transformers brings the
checkpoint's configuration and the caller's together (``AutoHfQuantizer.merge_quantization_configs``).
"""

from __future__ import annotations

from typing import Any

from anyfp4.errors import UnsupportedError
from anyfp4.integrations.transformers_config import METHOD, MODELOPT_METHODS, AnyFP4Config, is_ours
from anyfp4.integrations.transformers_internals import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    CompressedTensorsConfig,
    merge_quantization_configs,
    register_quantization_config,
    register_quantizer,
)
from anyfp4.integrations.transformers_linear import QuantizedLinear
from anyfp4.integrations.transformers_quantize import calibrate
from anyfp4.integrations.transformers_quantizer import AnyFP4HfQuantizer

__all__ = ["AnyFP4Config", "AnyFP4HfQuantizer", "QuantizedLinear", "calibrate"]


def _merge(cls: type, quantization_config: Any, quantization_config_from_args: Any) -> Any:
    """The configuration that a model is loaded with, from the checkpoint's and the caller's (which may be None)."""
    del cls
    asked = quantization_config_from_args
    if isinstance(quantization_config, dict):
        ours = is_ours(quantization_config)
        if isinstance(asked, AnyFP4Config):
            if not ours:
                method, stored = (quantization_config.get(key) for key in ("quant_method", "format"))
                what = f"quant_method {method!r}" + (f", format {stored!r}" if stored else "")
                raise UnsupportedError(
                    f"AnyFP4Config was given for a checkpoint that anyfp4 does not load ({what}); it loads ModelOpt's, "
                    "and compressed-tensors' with NVFP4 layers"
                )
            return asked.for_checkpoint(quantization_config)
        if ours and asked is None:
            return AnyFP4Config.from_dict(quantization_config)
        if isinstance(asked, CompressedTensorsConfig):
            from_dict: Any = CompressedTensorsConfig.from_dict
            quantization_config = from_dict(quantization_config)
    elif isinstance(quantization_config, AnyFP4Config) and isinstance(asked, AnyFP4Config | None):
        return quantization_config if asked is None else asked.for_checkpoint(quantization_config.table or {})
    return merge_quantization_configs(quantization_config, asked)


def _register() -> None:
    """Makes anyfp4 known; what is registered already stays."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(AnyFP4HfQuantizer)
    for method in (METHOD, *MODELOPT_METHODS):
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            register_quantization_config(method)(AnyFP4Config)
    setattr(AutoHfQuantizer, "merge_quantization_configs", classmethod(_merge))  # noqa: B010  (mypy forbids the other)


_register()
