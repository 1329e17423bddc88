"""The decoder's shape, and how it is read from a Hugging Face ``config.json``.

All guessing about config files happens in :meth:`DecoderConfig.from_hf`; the rest of the package reads these fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from anyfp4.errors import CheckpointConfigError, UnsupportedError

#: model_type -> what differs from Llama
FAMILIES: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding.

    Attributes:
        kind: default, linear, llama3 or yarn.
        theta: base of the frequencies.
        parameters: of the kind, as in the config file (factor, original_max_position_embeddings …).
    """

    kind: str = "default"
    theta: float = 10000.0
    parameters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the Llama/Mistral/Qwen family."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    dtype: torch.dtype
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    #: positions a query sees, itself included, for each layer; None: all
    sliding_windows: tuple[int | None, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], file: str = "config.json") -> DecoderConfig:
        """Reads a Hugging Face config, old style (``rope_theta``, ``rope_scaling``) or new (``rope_parameters``).

        Args:
            config: the parsed JSON.
            file: its name, for messages.

        Raises:
            UnsupportedError: an architecture or option that the decoder does not have; named.
            CheckpointConfigError: a field is missing or contradicts another.
        """
        read = _Fields(config, file)
        model_type = read.string("model_type")
        if model_type not in FAMILIES:
            raise UnsupportedError(
                f"{file}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
            )
        family = FAMILIES[model_type]
        for name, allowed in (("hidden_act", ("silu",)), ("attention_dropout", (0, None))):
            if config.get(name, allowed[0]) not in allowed and name == "hidden_act":
                raise UnsupportedError(f"{file}: hidden_act {config[name]!r} is not supported; supported: 'silu'")
        for name in ("num_experts", "num_local_experts", "n_routed_experts"):
            if config.get(name):
                raise UnsupportedError(f"{file}: {name} = {config[name]}: mixture-of-experts is not supported yet")
        heads = read.positive("num_attention_heads")
        hidden = read.positive("hidden_size")
        kv_heads = read.positive("num_key_value_heads", heads)
        if heads % kv_heads:
            raise CheckpointConfigError(
                f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}", file=file
            )
        if config.get("head_dim") is None and hidden % heads:
            raise CheckpointConfigError(
                f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}, and there is no head_dim",
                file=file,
            )
        layers = read.positive("num_hidden_layers")
        attention_bias = read.flag("attention_bias", False)
        eos = config.get("eos_token_id")
        return cls(
            model_type=model_type,
            hidden_size=hidden,
            intermediate_size=read.positive("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=read.positive("head_dim", hidden // heads),
            vocab_size=read.positive("vocab_size"),
            max_position=read.positive("max_position_embeddings"),
            rms_norm_eps=read.number("rms_norm_eps"),
            rope=_read_rope(config, file),
            dtype=_read_dtype(config, file),
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            qkv_bias=family.get("qkv_bias", False) or attention_bias,
            o_bias=attention_bias,
            mlp_bias=read.flag("mlp_bias", False),
            qk_norm=family.get("qk_norm", False),
            sliding_windows=_read_windows(config, model_type, layers, file),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
        )


class _Fields:
    """Typed access to a config's fields; errors name the field."""

    def __init__(self, config: Mapping[str, Any], file: str) -> None:
        self.config, self.file = config, file

    def _get(self, name: str, default: Any) -> Any:
        value = self.config.get(name)
        value = default if value is None else value
        if value is None:
            raise CheckpointConfigError(f"{name} is missing", file=self.file)
        return value

    def string(self, name: str) -> str:
        value = self._get(name, None)
        if not isinstance(value, str):
            raise CheckpointConfigError(f"{name} must be a string, got {value!r}", file=self.file)
        return value

    def positive(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointConfigError(f"{name} must be a positive integer, got {value!r}", file=self.file)
        return value

    def number(self, name: str) -> float:
        value = self._get(name, None)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointConfigError(f"{name} must be a number, got {value!r}", file=self.file)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise CheckpointConfigError(f"{name} must be true or false, got {value!r}", file=self.file)
        return value


def _read_dtype(config: Mapping[str, Any], file: str) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in _DTYPES:
        raise UnsupportedError(f"{file}: dtype {name!r} is not supported; supported: {', '.join(_DTYPES)}")
    return _DTYPES[name]


_ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


def _read_rope(config: Mapping[str, Any], file: str) -> RopeConfig:
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    parameters = dict(new or old or {})
    kind = str(parameters.pop("rope_type", None) or parameters.pop("type", None) or "default")
    parameters.pop("type", None)
    theta = parameters.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    if config.get("partial_rotary_factor", 1.0) != 1.0 or parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(f"{file}: partial_rotary_factor is not supported")
    if kind not in _ROPE_KINDS:
        raise UnsupportedError(f"{file}: rope_type {kind!r} is not supported; supported: {', '.join(_ROPE_KINDS)}")
    for name in _ROPE_KINDS[kind]:
        if not isinstance(parameters.get(name), int | float):
            raise CheckpointConfigError(f"rope_type {kind!r} needs {name}", file=file)
    numbers = {k: float(v) for k, v in parameters.items() if isinstance(v, int | float)}
    if kind == "yarn":  # as transformers does; never the length that an engine happens to be set up for
        numbers.setdefault("original_max_position_embeddings", float(config["max_position_embeddings"]))
    return RopeConfig(kind, float(theta), numbers)


def _read_windows(config: Mapping[str, Any], model_type: str, layers: int, file: str) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if config.get("use_sliding_window") is False or window is None:
        return (None,) * layers
    if model_type == "llama":  # Llama has the field in no release; transformers ignores it
        return (None,) * layers
    kinds = config.get("layer_types")
    if kinds is not None:
        if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
            raise UnsupportedError(
                f"{file}: layer_types must name full_attention or sliding_attention for each of {layers} layers"
            )
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if model_type.startswith("qwen"):
        if not config.get("use_sliding_window", False):
            return (None,) * layers
        first = config.get("max_window_layers", 28)
        return tuple(window if i >= first else None for i in range(layers))
    return (window,) * layers
