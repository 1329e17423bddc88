"""``AnyFP4HfQuantizer``: what transformers calls around its loading and saving of a model."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyfp4.checkpoint.config import read_quantization
from anyfp4.checkpoint.scheme import QuantizationConfig
from anyfp4.errors import InvalidArgumentError, UnsupportedError
from anyfp4.formats.nvfp4 import BLOCK_SIZE
from anyfp4.integrations.transformers_config import AnyFP4Config
from anyfp4.integrations.transformers_internals import ConversionOps, HfQuantizer
from anyfp4.integrations.transformers_linear import QuantizedLinear
from anyfp4.integrations.transformers_load import declare_layers, quant_config_folder, require_unquantized
from anyfp4.integrations.transformers_quantize import QuantizeOnLoad
from anyfp4.integrations.transformers_save import NAMES, layout_of, quantization_table, state_dict
from anyfp4.ops.linear import ACTIVATION_DTYPES


class AnyFP4HfQuantizer(HfQuantizer):
    """Loads, quantizes and saves models through anyfp4."""

    requires_calibration = False
    quantization_config: AnyFP4Config

    def __init__(self, quantization_config: AnyFP4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.on_load: QuantizeOnLoad | None = None
        self._dtypes: dict[str, torch.dtype] = {}  # of the model's parameters before any was loaded

    @property
    def is_trainable(self) -> bool:
        """No: the layers have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes: each layer is one op of PyTorch."""
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Yes, in both layouts."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses device maps that would move weights while the model runs.

        Raises:
            UnsupportedError: offloading.
        """
        if not isinstance(device_map, Mapping):
            return
        kinds = {"disk" if device == "disk" else _device_type(device) for device in device_map.values()}
        if "disk" in kinds or ("cpu" in kinds and len(kinds) > 1):
            where = "the disk" if "disk" in kinds else "the CPU"
            raise UnsupportedError(
                f"device_map puts a part of the model on {where} and would move it to the accelerator in each step "
                "(offloading), which packed weights cannot do; give a device_map that fits, such as 'cpu' or 'cuda:0', "
                "or more max_memory"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that was asked for.

        Raises:
            UnsupportedError: activations of that dtype cannot be multiplied.
        """
        if dtype not in ACTIVATION_DTYPES:
            raise UnsupportedError(f"dtype {dtype} is not supported; supported: bfloat16, float16, float32")
        return dtype

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a loaded tensor is to be quantized now."""
        return self.on_load is not None and self.on_load.needs(param_name)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes of an element once it is loaded: codes and block scales, for what is quantized now."""
        if self.param_needs_quantization(model, param_name):
            return 0.5 + 1 / BLOCK_SIZE
        return param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        """What a weight goes through that is to be quantized."""
        assert self.on_load is not None
        return self.on_load.operation()

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        config = self.quantization_config
        if getattr(model.config, "distributed_config", None) is not None:
            raise UnsupportedError("tensor parallelism is not supported: packed weights are not sharded")
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        numerics, backend = config.resolved()
        files = [Path(file) for file in checkpoint_files or ()]
        quantization = self._quantization(model, files)
        if quantization is None:
            if config.weight_only is False:
                raise UnsupportedError(
                    "AnyFP4Config(weight_only=False): W4A4 needs input scales, which a model quantized on the fly does "
                    "not have; load it weight-only, then call calibrate(model, batches) of "
                    "anyfp4.integrations.transformers"
                )
            if files:
                require_unquantized(files)
            names = NAMES[config.layout or "compressed-tensors"]
            self.on_load = QuantizeOnLoad(model, names, config.ignore, numerics=numerics, backend=backend)
            return
        self._check_choices(quantization)
        if quantization.kv_cache != "none":
            model._keys_to_ignore_on_load_unexpected = {
                *(model._keys_to_ignore_on_load_unexpected or ()),
                r"\.[kvq]_scale$",
            }
        declare_layers(model, quantization, files, numerics=numerics, backend=backend)

    def _quantization(self, model: Any, files: list[Path]) -> QuantizationConfig | None:
        """What the checkpoint's configuration says; None where it is not quantized."""
        table = self.quantization_config.table
        if table is not None and files:
            return read_quantization(files[0].parent, {"quantization_config": table})
        folder = quant_config_folder(model, files)
        if folder is None:
            return None
        self.pre_quantized = True  # config.json does not say so, hf_quant_config.json does
        return read_quantization(folder, {})

    def _check_choices(self, quantization: QuantizationConfig) -> None:
        """Refuses choices that make no sense for what is quantized already."""
        config = self.quantization_config
        if config.ignore:
            raise InvalidArgumentError(
                "AnyFP4Config(ignore=...) is for quantizing on the fly; which layers of this checkpoint are quantized, "
                "its configuration says"
            )
        if config.weight_only is False and any(group.scheme.weight_only for group in quantization.groups):
            raise UnsupportedError(
                "AnyFP4Config(weight_only=False): layers of this checkpoint are weight-only and have no input scales; "
                "load them so, then call anyfp4.integrations.transformers.calibrate(model, batches)"
            )
        if quantization.kv_cache != "none" and config.kv_cache != "dense":
            raise UnsupportedError(
                f"the checkpoint asks for a KV cache in {quantization.kv_cache.upper()}, which transformers does not "
                "have; quantization_config=AnyFP4Config(kv_cache='dense') keeps the cache in the model's dtype"
            )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.on_load is not None:
            self.on_load.check()
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.finish(weight_only=bool(self.quantization_config.weight_only))
        self.on_load = None
        self.pre_quantized = True
        self._restore_dtypes(model)
        model.requires_grad_(False)
        model.get_memory_footprint = types.MethodType(_memory_footprint, model)
        self.quantization_config.table = quantization_table(model, self._layout(model))
        return model

    def _restore_dtypes(self, model: Any) -> None:
        """Gives dense parameters the dtype of the model; up to 5.19, renamed ones keep that of their file."""
        wide = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        for name, parameter in model.named_parameters():
            dtype = self._dtypes.get(name, parameter.dtype)
            if parameter.dtype != dtype and not any(part in name for part in wide):
                parameter.data = parameter.data.to(dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What is saved, and config.json's ``quantization_config`` with it."""
        layout = self._layout(model)
        table = quantization_table(model, layout)
        state = state_dict(model, layout)
        self.quantization_config.table = table
        model.config.quantization_config = self.quantization_config
        return state, {}

    def _layout(self, model: Any) -> str:
        if self.quantization_config.layout is not None:
            return self.quantization_config.layout
        return layout_of(next(m.names for m in model.modules() if isinstance(m, QuantizedLinear)))


def _memory_footprint(model: Any, return_buffers: bool = True) -> int:
    """Bytes of the model: packed weights, which are no parameters, and all that transformers counts."""
    layers = sum(module.nbytes for module in model.modules() if isinstance(module, QuantizedLinear))
    return int(type(model).get_memory_footprint(model, return_buffers)) + layers


def _device_type(device: Any) -> str:
    return "accelerator" if isinstance(device, int) else torch.device(device).type
