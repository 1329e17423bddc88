"""How much memory there is: the machine's, the control groups', a GPU's; and what may be taken of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from anyfp4 import device as devices
from anyfp4.device import Memory, host_memory

GIB = 1 << 30
PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_control_groups(tmp_path: Path) -> None:
    assert host_memory(tmp_path) == Memory(PHYSICAL, PHYSICAL)  # nothing to be learnt outside Linux
    root = machine(tmp_path, {"proc/meminfo": "MemTotal: 8 kB\nMemAvailable:  4096 kB\nHugePages_Total: 0\n"})
    assert host_memory(root) == Memory(PHYSICAL, 4 << 20)


@pytest.mark.parametrize("path", ["/", "/a/b", "/../x"])
def test_the_second_version(path: str, tmp_path: Path) -> None:
    """The limit of a group around this one counts, whether this one has a folder of its own or not."""
    root = machine(
        tmp_path,
        {
            "proc/meminfo": f"MemAvailable: {PHYSICAL // 1024} kB\n",
            "proc/self/cgroup": f"0::{path}\n",
            "sys/fs/cgroup/memory.max": "2000000\n",
            "sys/fs/cgroup/memory.current": "700000\n",
            "sys/fs/cgroup/memory.stat": "anon 400000\ninactive_file 200000\nactive_file 50000\n",
            "sys/fs/cgroup/a/memory.max": "max\n",
        },
    )
    assert host_memory(root) == Memory(2_000_000, 2_000_000 - 700_000 + 250_000)
    if path == "/a/b":
        machine(root, {"sys/fs/cgroup/a/b/memory.max": "900000", "sys/fs/cgroup/a/b/memory.current": "800000"})
        assert host_memory(root) == Memory(900_000, 100_000)
        machine(root, {"sys/fs/cgroup/a/b/memory.current": "950000"})
        assert host_memory(root) == Memory(900_000, 0)


def test_the_first_version(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "12:cpu,cpuacct:/x\n4:memory:/job\n1:name=systemd:/\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "3000000",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1000000",
            "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 300000\ntotal_active_file 1\nactive_file 77\n",
        },
    )
    assert host_memory(root) == Memory(3_000_000, 2_300_001)


def test_this_machine() -> None:
    found = devices.memory(torch.device("cpu"))
    assert 0 < found.free <= found.total <= PHYSICAL


def test_what_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "memory", lambda _: Memory(80 * GIB, 70 * GIB))
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert devices.budget(cpu) == devices.budget(cpu, 1.0) == devices.budget(gpu, 1.0) == 70 * GIB
    assert devices.budget(gpu) == devices.budget(gpu, 0.9) == pytest.approx(62 * GIB, abs=1)
    assert devices.budget(gpu, 0.5) == 30 * GIB
    assert devices.budget(gpu, 0.1) == 0


def test_memory_that_torch_keeps_for_later_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 7 * GIB)
    assert devices.memory(torch.device("cuda", 1)) == Memory(24 * GIB, 8 * GIB)


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.50 KiB"), (5 << 20, "5.00 MiB")]
)
def test_sizes_in_messages(nbytes: int, text: str) -> None:
    assert devices.size(nbytes) == text
