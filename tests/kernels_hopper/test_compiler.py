"""NVRTC on sources of our own making; no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyfp4.errors import BackendError
from anyfp4.kernels.hopper import compiler

pytestmark = pytest.mark.skipif(compiler.find_nvrtc() is None, reason="libnvrtc is not installed")
KERNEL = 'extern "C" __global__ void k(float* p) { p[threadIdx.x] = twice(p[threadIdx.x]) * FACTOR; }\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compiler, "_FOLDER", tmp_path)
    (tmp_path / "shared.cu").write_text("__device__ float twice(float a) { return 2 * a; }\n")
    (tmp_path / "kernel.cu").write_text(KERNEL)
    return tmp_path


def test_files_are_joined_and_compiled(folder: Path) -> None:
    cubin = compiler.compile_only((str(folder / "shared.cu"), "kernel.cu"), (("FACTOR", 3),))
    assert cubin[:4] == b"\x7fELF"


def test_an_error_names_file_and_line(folder: Path) -> None:
    with pytest.raises(BackendError, match=r"(?s)kernel\.cu with \{'FACTOR': 5\}.*kernel\.cu\(1\): error.*twice"):
        compiler.compile_only(("kernel.cu",), (("FACTOR", 5),))
