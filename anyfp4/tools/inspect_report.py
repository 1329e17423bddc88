"""The report of ``inspect``: what it holds, as JSON, and as tables for a terminal."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

#: rows of long lists that a terminal is shown
_SHOWN = 20


@dataclass(frozen=True)
class Kind:
    """Layers that are stored alike.

    Attributes:
        name: such as ``NVFP4 W4A4`` or ``dense bfloat16``.
        layers: how many.
        dtypes: of their tensors.
        weights: numbers they stand for, scales not counted.
        nbytes: bytes they take, scales counted.
        bits_per_weight: 8 × nbytes / weights.
    """

    name: str
    layers: int
    dtypes: tuple[str, ...]
    weights: int
    nbytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Spread:
    """How far the global scales of projections that run as one GEMM lie apart.

    Attributes:
        group: such as ``q/k/v``.
        scale: ``weight`` or ``input``.
        groups: how many such groups there are.
        differing: in how many of them the scales differ.
        worst_ratio: the largest maximum / minimum.
        worst: the module where that is.
    """

    group: str
    scale: str
    groups: int
    differing: int
    worst_ratio: float
    worst: str


@dataclass(frozen=True)
class BlockScales:
    """Block scales at the ends of E4M3's range.

    Attributes:
        module: the layer, or empty for all together.
        total: how many block scales.
        zero: of these, zero.
        subnormal: below 2⁻⁶, where E4M3 loses precision.
        saturated: 448, the largest (each tensor's largest block is meant to be there).
    """

    module: str
    total: int
    zero: int
    subnormal: int
    saturated: int


@dataclass(frozen=True)
class KVScales:
    """Scales of the KV cache.

    Attributes:
        layers: how many attention modules have some.
        k: (smallest, largest) multiplier of K.
        v: (smallest, largest) multiplier of V.
    """

    layers: int
    k: tuple[float, float]
    v: tuple[float, float]


@dataclass(frozen=True)
class Refusal:
    """Something for which a loader refuses the checkpoint.

    Attributes:
        error: the exception's name.
        message: what is wrong, where, and what would be right.
    """

    error: str
    message: str


@dataclass(frozen=True)
class Report:
    """What ``inspect`` found; ``None`` or empty where a refusal kept it from looking."""

    folder: str
    layout: str | None
    producer: str
    algorithm: str
    architecture: str | None
    model_type: str | None
    total_bytes: int
    parameters: int
    bits_per_weight: float
    kinds: tuple[Kind, ...]
    spreads: tuple[Spread, ...]
    block_scales: BlockScales | None
    worst_block_scales: tuple[BlockScales, ...]
    kv_cache: str
    kv_scales: KVScales | None
    pre_quant_scales: tuple[str, ...]
    refusals: tuple[Refusal, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as a dictionary for JSON."""
        return dataclasses.asdict(self)


def render(report: Report) -> RenderableType:
    """The report as tables for a terminal."""
    parts: list[RenderableType] = [_head(report), _kinds(report)]
    if report.spreads:
        parts.append(_spreads(report))
    if report.block_scales is not None:
        parts.append(_block_scales(report))
    if report.pre_quant_scales:
        names = ", ".join(report.pre_quant_scales[:_SHOWN])
        more = len(report.pre_quant_scales) - _SHOWN
        parts.append(
            Text(
                f"layers with a pre_quant_scale ({len(report.pre_quant_scales)}): {names}"
                + (f" and {more} more" if more > 0 else "")
            )
        )
    parts.append(_refusals(report))
    spaced = [part for each in parts for part in (each, Text())]
    return Group(*spaced[:-1])


def _head(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    model = " ".join(p for p in (report.architecture, f"({report.model_type})" if report.model_type else "") if p)
    kv = report.kv_cache
    if report.kv_scales is not None:
        scales = report.kv_scales
        kv += f" ({scales.layers} layers: k {_range(scales.k)}, v {_range(scales.v)})"
    for name, value in (
        ("folder", report.folder),
        ("model", model or "unknown"),
        ("layout", report.layout or "refused"),
        ("producer", report.producer or "unknown"),
        ("algorithm", report.algorithm or "none"),
        ("size", f"{_bytes(report.total_bytes)}, {report.parameters / 1e6:,.1f} M parameters"),
        ("bits per weight", f"{report.bits_per_weight:.2f}"),
        ("KV cache", kv),
    ):
        table.add_row(name, Text(value))
    return table


def _kinds(report: Report) -> Table:
    table = Table(title="kinds of layers", title_justify="left")
    table.add_column("kind")
    for name in ("layers", "weights", "bytes", "bits per weight"):
        table.add_column(name, justify="right")
    table.add_column("dtypes")
    for kind in report.kinds:
        table.add_row(
            kind.name,
            str(kind.layers),
            f"{kind.weights:,}",
            _bytes(kind.nbytes),
            f"{kind.bits_per_weight:.2f}" if kind.weights else "",
            ", ".join(kind.dtypes),
        )
    return table


def _spreads(report: Report) -> Table:
    table = Table(title="global scales within fused groups", title_justify="left")
    for name in ("group", "scale", "groups that differ", "largest ratio", "where"):
        table.add_column(name)
    for s in report.spreads:
        where = s.worst if s.differing else ""
        table.add_row(s.group, s.scale, f"{s.differing} of {s.groups}", f"{s.worst_ratio:.3f}", where)
    return table


def _block_scales(report: Report) -> Table:
    table = Table(title="block scales at the ends of their range", title_justify="left")
    table.add_column("layers")
    for name in ("blocks", "zero", "subnormal", "saturated (448)"):
        table.add_column(name, justify="right")
    assert report.block_scales is not None
    for row in (report.block_scales, *report.worst_block_scales):
        counts = (row.total, row.zero, row.subnormal, row.saturated)
        table.add_row(row.module or "all", *(f"{count:,}" for count in counts))
    return table


def _refusals(report: Report) -> RenderableType:
    if not report.refusals:
        return Text("nothing refused: this checkpoint can be loaded", style="green")
    table = Table(title=f"refused ({len(report.refusals)})", title_justify="left", title_style="bold red")
    table.add_column("error")
    table.add_column("why", overflow="fold")
    for refusal in report.refusals[:_SHOWN]:
        table.add_row(refusal.error, Text(refusal.message))
    more = len(report.refusals) - _SHOWN
    if more > 0:
        table.add_row("", f"and {more} more (--json lists all)")
    return table


def _range(pair: tuple[float, float]) -> str:
    low, high = pair
    return f"{low:.4g}" if low == high else f"{low:.4g}…{high:.4g}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:,.2f} GB"
