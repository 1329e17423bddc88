"""Every instruction set that this machine can run, with one and two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from anyfp4.backends.cpu import CpuBackend

BACKEND = CpuBackend()
REASON = BACKEND.why_not(torch.device("cpu"))
ISAS = ["none"] if REASON else BACKEND.native.available_isas()


@pytest.fixture(params=[(isa, threads) for isa in ISAS for threads in (1, 2)], ids=lambda p: f"{p[0]}-{p[1]}")
def backend(request: pytest.FixtureRequest) -> Iterator[CpuBackend]:
    if REASON:
        pytest.skip(REASON)
    isa, threads = request.param
    before = BACKEND.native.isa(), BACKEND.native.threads()
    assert BACKEND.native.select_isa(isa)
    BACKEND.native.set_threads(threads)
    yield BACKEND
    BACKEND.native.select_isa(before[0])
    BACKEND.native.set_threads(before[1])
