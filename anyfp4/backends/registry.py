"""Which backends there are, in order of preference per platform, and how one is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anyfp4.backends.base import Backend
from anyfp4.backends.cpu import CpuBackend
from anyfp4.backends.cublas import CublasBackend
from anyfp4.backends.hopper import HopperBackend
from anyfp4.backends.triton import TritonBackend
from anyfp4.errors import BackendError

REFERENCE = Backend()
#: in order of preference, per device type; a new backend is added here and nowhere else
PREFERENCE: dict[str, tuple[Backend, ...]] = {
    "cpu": (CpuBackend(), REFERENCE),
    "cuda": (HopperBackend(), TritonBackend(), CublasBackend(), REFERENCE),
}


@dataclass(frozen=True)
class Row:
    """One line of ``anyfp4 backends``."""

    name: str
    description: str
    chosen: bool
    reason: str | None


def select(
    device: torch.device,
    *,
    shape: tuple[int, int] | None = None,
    numerics: str = "native",
    requested: str = "auto",
) -> Backend:
    """The backend for a linear on ``device``: the first that can run, or exactly the one that was asked for.

    One that is there only by name is passed over unless it is asked for.

    Args:
        device: where the weights lie.
        shape: (N, K) of the layer; None asks in general.
        numerics: of the W4A4 product.
        requested: ``auto`` or a backend's name. A named backend never falls back.

    Raises:
        BackendError: the requested backend is unknown or cannot run, or none can; with the reasons.
    """
    candidates = PREFERENCE[device.type]
    if requested != "auto":
        by_name = {b.name: b for b in all_backends()}
        if requested not in by_name:
            raise BackendError(f"unknown backend {requested!r}; there are: {', '.join(sorted(by_name))}")
        backend = by_name[requested]
        reason = _why_not(backend, device, shape, numerics)
        if reason is not None:
            raise BackendError(f"backend {requested!r} cannot run here: {reason}")
        return backend
    reasons = []
    for backend in candidates:
        reason = _why_not(backend, device, shape, numerics) or backend.by_name_only
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise BackendError(f"no backend can run on {device}: " + "; ".join(reasons))


def all_backends() -> tuple[Backend, ...]:
    """Every backend of every platform, once."""
    unique = {b.name: b for backends in PREFERENCE.values() for b in backends}
    return tuple(unique.values())


def table(device: torch.device, *, numerics: str = "native", requested: str = "auto") -> list[Row]:
    """What ``anyfp4 backends`` prints: every backend, whether it is chosen, and if not, why.

    Raises:
        BackendError: as :func:`select`.
    """
    chosen = select(device, numerics=numerics, requested=requested)
    rows = []
    for backend in all_backends():
        reason = _why_not(backend, device, None, numerics)
        if reason is None and backend is not chosen:
            other = "not the one asked for" if requested != "auto" else f"{chosen.name} is preferred here"
            reason = backend.by_name_only or other
        rows.append(Row(backend.name, backend.description, backend is chosen, reason))
    return rows


def _why_not(backend: Backend, device: torch.device, shape: tuple[int, int] | None, numerics: str) -> str | None:
    if backend not in PREFERENCE[device.type]:
        return f"does not run on {device.type} devices"
    return backend.why_not(device, shape, numerics)
