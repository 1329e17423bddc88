"""``AnyFP4Config``: what a user asks of anyfp4 inside transformers, and which checkpoints are ours."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from anyfp4 import envs
from anyfp4.errors import InvalidArgumentError
from anyfp4.integrations.transformers_internals import QuantizationConfigMixin

METHOD: Final = "anyfp4"
#: ``quant_method`` as ModelOpt's exports spell it
MODELOPT_METHODS: Final = ("modelopt", "modelopt_fp4", "modelopt_mixed")
LAYOUTS: Final = ("compressed-tensors", "modelopt")
_NVFP4_FORMAT = "nvfp4-pack-quantized"


class AnyFP4Config(QuantizationConfigMixin):
    """How anyfp4 runs, quantizes and saves a model of transformers.

    For a checkpoint that is quantized already it may be left out; what is not given stays as the checkpoint says.

    Attributes:
        numerics: of W4A4 products, ``native`` or ``blackwell``; ``ANYFP4_NUMERICS`` by default.
        backend: ``auto`` or a backend's name; ``ANYFP4_BACKEND`` by default.
        layout: what ``save_pretrained`` writes, ``compressed-tensors`` or ``modelopt``; by default the layout that was
            loaded, and compressed-tensors for a model quantized on the fly. May be changed before saving.
        weight_only: True leaves activations unquantized, also where the checkpoint has input scales (which are then
            dropped). On the fly it is the default, since input scales need :func:`calibrate`.
        ignore: linear layers that stay dense, on the fly only: full names, globs, or ``re:`` and a regular expression
            that matches from the start of the name. Each must match something.
        kv_cache: ``dense`` keeps the KV cache in the model's dtype although the checkpoint says FP8. transformers has
            no FP8 cache with the checkpoint's scales, so such a checkpoint is refused without this.
        table: the checkpoint's own ``quantization_config``; set by loading and saving.
    """

    def __init__(
        self,
        *,
        numerics: str | None = None,
        backend: str | None = None,
        layout: Literal["compressed-tensors", "modelopt"] | None = None,
        weight_only: bool | None = None,
        ignore: Sequence[str] = (),
        kv_cache: Literal["dense"] | None = None,
        table: Mapping[str, Any] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        """Checks the values.

        Raises:
            InvalidArgumentError: one is not allowed.
        """
        _check("numerics", numerics, (None, *envs.NUMERICS))
        _check("layout", layout, (None, *LAYOUTS))
        _check("weight_only", weight_only, (None, True, False))
        _check("kv_cache", kv_cache, (None, "dense"))
        _check("quant_method", quant_method, (METHOD,))
        if isinstance(ignore, str) or not all(isinstance(pattern, str) and pattern for pattern in ignore):
            raise InvalidArgumentError(f"ignore must be a list of names, not {ignore!r}")
        if backend == "":
            raise InvalidArgumentError("backend is empty; name one (`anyfp4 backends`), or 'auto'")
        self.quant_method: Any = quant_method  # transformers' own are members of an enum
        self.numerics = numerics
        self.backend = backend
        self.layout = layout
        self.weight_only = weight_only
        self.ignore = list(ignore)
        self.kv_cache = kv_cache
        self.table = None if table is None else dict(table)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From config.json's ``quantization_config`` in either layout, or from what :meth:`to_dict` gave."""
        own = config_dict.get("quant_method") == METHOD
        try:
            config = cls(**config_dict) if own else cls(table=config_dict)
        except TypeError as error:
            raise InvalidArgumentError(f"quantization_config: {error}") from error
        unused = config.update(**kwargs)  # type: ignore[no-untyped-call]
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The content of ``quantization_config``: the checkpoint's own once there is one."""
        if self.table is not None:
            return copy.deepcopy(self.table)
        fields = {name: value for name, value in self.__dict__.items() if value not in (None, [])}
        return copy.deepcopy(fields)

    def for_checkpoint(self, table: Mapping[str, Any]) -> AnyFP4Config:
        """The same choices for a checkpoint whose ``quantization_config`` is ``table``."""
        config = copy.deepcopy(self)
        config.table = dict(table)
        return config

    def resolved(self) -> tuple[str, str]:
        """(numerics, backend), from the environment where nothing was said.

        Raises:
            EnvironmentVariableError: a variable has a value that is not allowed.
        """
        environment = envs.read()
        return self.numerics or environment.numerics, self.backend or environment.backend


def is_ours(table: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is loaded by anyfp4: ModelOpt's, or compressed-tensors' with NVFP4 in it."""
    method = table.get("quant_method")
    if method in MODELOPT_METHODS or method == METHOD:
        return True
    producer = table.get("producer")
    if method is None and isinstance(producer, dict) and producer.get("name") == "modelopt":
        return True
    if method != "compressed-tensors":
        return False
    groups = table.get("config_groups")
    stored = [group.get("format") for group in groups.values() if isinstance(group, dict)] if groups else []
    return _NVFP4_FORMAT in (table.get("format"), *stored)


def _check(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(value is a or (isinstance(value, str) and value == a) for a in allowed):
        raise InvalidArgumentError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
