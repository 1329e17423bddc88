"""What this machine has: devices, architectures, memory. Facts only; choices are made in ``backends``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

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


@dataclass(frozen=True)
class Memory:
    """A device's memory, bytes.

    Attributes:
        total: that programs can use; on the CPU, the container's limit if it has one.
        free: that this program could take now.
    """

    total: int
    free: int


def memory(device: torch.device) -> Memory:
    """The memory of ``device``, other programs' use taken into account."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch for later
        return Memory(total, free + unused)
    return host_memory()


#: of a GPU's memory that may be in use, unless told otherwise: the rest is for other libraries and for what is uneven
GPU_FRACTION = 0.9


def budget(device: torch.device, fraction: float | None = None) -> int:
    """Bytes that this program may take now of a device's memory.

    Args:
        device: the device.
        fraction: of all its memory that may then be in use, by other programs too; by default 0.9 of a GPU's, and all
            of a CPU's.
    """
    if fraction is None:
        fraction = GPU_FRACTION if device.type == "cuda" else 1.0
    found = memory(device)
    return max(0, found.free - int((1.0 - fraction) * found.total))


def size(nbytes: int) -> str:
    """A number of bytes for a message, such as ``4.80 GiB``."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} bytes"


def host_memory(root: Path = Path("/")) -> Memory:
    """The machine's memory and the limits of all control groups that this process is in.

    Pages of files do not count as used: they are given back when memory is short.

    Args:
        root: of the file system; another one in tests.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = _numbers(root / "proc/meminfo").get("MemAvailable:")  # not there outside Linux
    free = total if available is None else 1024 * available
    for folder, names in _control_groups(root):
        limit, used = (_number(folder / name) for name in names[:2])
        if limit is None:
            continue
        total = min(total, limit)
        if used is not None:
            statistics = _numbers(folder / "memory.stat")
            files = sum(statistics.get(name, 0) for name in names[2:])
            free = min(free, limit - used + files)
    return Memory(total, max(0, min(free, total)))


_V2 = ("memory.max", "memory.current", "active_file", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_active_file", "total_inactive_file")


def _control_groups(root: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The folders of this process's control groups for memory and of those around them, with the names in them.

    In a container the groups outside it are not to be seen, and its own is the topmost folder.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", maxsplit=2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        group = PurePosixPath(path)
        for place in (group, *group.parents):
            yield top / str(place).strip("/"), _V1 if controllers else _V2


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit


def _numbers(file: Path) -> dict[str, int]:
    """The lines of a file that begin with a name and a number."""
    try:
        rows = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
