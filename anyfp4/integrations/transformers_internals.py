"""What anyfp4 uses of transformers' insides, in one place: a release that changed one of them says so on import."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from anyfp4.errors import UnsupportedError

#: the releases that the tests were run with
TRIED = "5.17.0, 5.19.0 and 5.23.0"

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        ConversionOps,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
        revert_weight_conversion,
    )
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        AutoHfQuantizer,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.hub import cached_file
    from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

    merge_quantization_configs: Any = AutoHfQuantizer.merge_quantization_configs
except (ImportError, AttributeError) as error:
    raise UnsupportedError(
        f"transformers {metadata.version('transformers')} is not one that anyfp4.integrations.transformers can extend: "
        f"{error}; tried with {TRIED}"
    ) from error

__all__ = [
    "AUTO_QUANTIZATION_CONFIG_MAPPING",
    "AUTO_QUANTIZER_MAPPING",
    "TRIED",
    "AutoHfQuantizer",
    "CompressedTensorsConfig",
    "ConversionOps",
    "HfQuantizer",
    "QuantizationConfigMixin",
    "WeightConverter",
    "WeightRenaming",
    "cached_file",
    "get_model_conversion_mapping",
    "merge_quantization_configs",
    "register_quantization_config",
    "register_quantizer",
    "rename_source_key",
    "revert_weight_conversion",
]
