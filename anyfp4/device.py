"""What this machine has: devices, architectures, memory. Facts only; choices are made in ``backends``."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from anyfp4.errors import InvalidArgumentError


def resolve(name: str | torch.device | None = None) -> torch.device:
    """The device called ``name``; by default the first GPU if there is one, else the CPU.

    Raises:
        InvalidArgumentError: no such device on this machine.
    """
    if name is None or name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidArgumentError(f"device {name!r}: expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"device {name!r}: anyfp4 runs on cpu and cuda (NVIDIA or AMD) devices")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InvalidArgumentError(f"device {name!r}: this machine has {count} GPUs")
    return device


def architecture(device: torch.device) -> str:
    """``cpu``, ``sm_90`` and the like, or ``gfx942`` and the like."""
    if device.type == "cpu":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":", maxsplit=1)[0]
    return f"sm_{properties.major}{properties.minor}"


def total_memory(device: torch.device) -> int:
    """Bytes of memory that programs on ``device`` can use; on the CPU, the container's limit if it has one."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            text = limit.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(physical, int(text))
    return physical


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
