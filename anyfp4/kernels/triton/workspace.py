"""Memory in which programs that share a tile leave their sums; kept from call to call, one for each stream.

Calls of one stream follow each other, so they can share it. CUDA graphs have one of their own for each device: graphs
of a device must not be replayed at the same time (cuBLAS asks the same of graphs captured on one stream).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

#: float32 sums (32 MiB), and tiles
SUMS, TILES = 8 << 20, 16 << 10
NBYTES = 4 * (SUMS + TILES)
_GRAPHS = -1


@dataclass(frozen=True, eq=False)
class Workspace:
    """``sums``: float32 [SUMS]. ``counters``: int32 [TILES], zero between launches."""

    sums: Tensor
    counters: Tensor


def fits(tiles: int, elements: int) -> bool:
    """Whether so many tiles, each with so many sums in all, have room."""
    return tiles <= TILES and tiles * elements <= SUMS


def reserve(device: torch.device) -> None:
    """Must come before a capture: allocates what graphs of this device use."""
    _workspace(device, _GRAPHS)


def of(x: Tensor) -> Workspace:
    """That of the current stream of ``x``'s device."""
    if x.device.type != "cuda":
        return _workspace(x.device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _workspace(x.device, _GRAPHS)
    # what is launched now may be captured next
    reserve(x.device)
    return _workspace(x.device, torch.cuda.current_stream(x.device).cuda_stream)


@cache
def _workspace(device: torch.device, stream: int) -> Workspace:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("workspace.reserve must be called before a CUDA graph is captured")
    sums = torch.empty(SUMS, dtype=torch.float32, device=device)
    return Workspace(sums, torch.zeros(TILES, dtype=torch.int32, device=device))
