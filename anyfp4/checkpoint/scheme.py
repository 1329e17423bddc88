"""How a module is stored, and which module is stored how: what both layouts' configurations boil down to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from anyfp4.errors import CheckpointConfigError, UnsupportedError

Kind: TypeAlias = Literal["nvfp4", "fp8", "dense"]
Layout: TypeAlias = Literal["compressed-tensors", "modelopt", "none"]
KVCache: TypeAlias = Literal["none", "fp8"]


@dataclass(frozen=True)
class Scheme:
    """How one linear module is stored.

    Attributes:
        kind: NVFP4, FP8 (E4M3) or dense.
        weight_only: NVFP4 or FP8 whose activations stay unquantized.
        input_dynamic: FP8 whose activation scale is computed for each token (block-wise: for each token and 128
            columns); otherwise, unless weight-only, it is static, one a tensor.
        weight_per_row: FP8 with one weight scale for each output row.
        block_wise: FP8 with one weight scale for each block of 128 × 128. Neither of the two: one a tensor.
        pre_quant_scale_allowed: the module may carry a ``pre_quant_scale`` (AWQ).
    """

    kind: Kind
    weight_only: bool = False
    input_dynamic: bool = False
    weight_per_row: bool = False
    block_wise: bool = False
    pre_quant_scale_allowed: bool = False

    @property
    def label(self) -> str:
        """A short name for tables, such as ``NVFP4 W4A4``."""
        if self.kind == "dense":
            return "dense"
        if self.kind == "nvfp4":
            return "NVFP4 weight-only" if self.weight_only else "NVFP4 W4A4"
        inputs = "weight-only" if self.weight_only else "dynamic" if self.input_dynamic else "static"
        return f"FP8 {'block-wise ' if self.block_wise else ''}{inputs}"


DENSE = Scheme("dense")


@dataclass(frozen=True)
class ModuleNames:
    """The modules that a list in a configuration names.

    Attributes:
        exact: full module names.
        patterns: regular expressions that match from the start of a name (not necessarily to its end).
    """

    exact: frozenset[str] = frozenset()
    patterns: tuple[re.Pattern[str], ...] = ()

    def match(self, module: str) -> bool:
        """Whether ``module`` is named."""
        return module in self.exact or any(p.match(module) for p in self.patterns)


@dataclass(frozen=True)
class Group:
    """Modules that share a scheme.

    Attributes:
        scheme: how they are stored.
        names: which they are.
        every_linear: whether every linear module that no other group names belongs here too.
    """

    scheme: Scheme
    names: ModuleNames = field(default_factory=ModuleNames)
    every_linear: bool = False


@dataclass(frozen=True)
class QuantizationConfig:
    """What a checkpoint's configuration says of its quantization.

    Attributes:
        layout: whose tensor names and conventions the files follow.
        producer: who wrote it, as far as it says, such as ``modelopt 0.47.0``.
        algorithm: the producer's own name for what was done, such as ``NVFP4`` or ``nvfp4-pack-quantized``.
        kv_cache: ``fp8`` if the KV cache is to be stored in E4M3.
        groups: the quantized modules; a name in an earlier group wins over one in a later group.
        ignore: modules that stay dense whatever the groups say.
    """

    layout: Layout
    producer: str = ""
    algorithm: str = ""
    kv_cache: KVCache = "none"
    groups: tuple[Group, ...] = ()
    ignore: ModuleNames = field(default_factory=ModuleNames)

    def scheme_of(self, module: str) -> Scheme:
        """How the linear module of that name is stored.

        A full name wins over a pattern, and a pattern over "every linear module". The configuration cannot tell
        a linear module from another one: for the name of a norm the answer means nothing.
        """
        if self.ignore.match(module):
            return DENSE
        for group in self.groups:
            if module in group.names.exact:
                return group.scheme
        for group in self.groups:
            if group.names.match(module):
                return group.scheme
        for group in self.groups:
            if group.every_linear:
                return group.scheme
        return DENSE


def unsupported(file: Path, what: str, value: object, supported: str) -> UnsupportedError:
    """An error for a valid value that anyfp4 does not implement: names the file, the field, and what is supported."""
    return UnsupportedError(f"{file}: {what} {value!r} is not supported; supported: {supported}")


def expect_dict(value: Any, file: Path, what: str) -> dict[str, Any]:
    """``value`` if it is a JSON object.

    Raises:
        CheckpointConfigError: it is not.
    """
    if not isinstance(value, dict):
        raise CheckpointConfigError(f"{what} must be an object, not {type(value).__name__}", file=file)
    return value


def expect_names(value: Any, file: Path, what: str) -> list[str]:
    """``value`` if it is a list of non-empty strings; an empty list for null.

    Raises:
        CheckpointConfigError: it is something else.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise CheckpointConfigError(f"{what} must be a list of names, not {type(value).__name__}", file=file)
    for item in value:
        if not isinstance(item, str) or not item:
            raise CheckpointConfigError(f"{what} must hold non-empty names, not {item!r}", file=file)
    return value


def reject_unknown(table: dict[str, Any], known: Iterable[str], file: Path, what: str) -> None:
    """Refuses fields that nobody reads: what they ask for would be silently ignored. Empty ones ask for nothing.

    Raises:
        UnsupportedError: a field that is not in ``known`` has a value.
    """
    known = set(known)
    for name, value in table.items():
        if name not in known and value not in (None, False, {}, []):
            raise UnsupportedError(f"{file}: {what}: unknown field {name!r} = {value!r}; known: {sorted(known)}")
