"""CUDA C++ of this folder to machine code for sm_90a, by NVRTC: no toolkit and no GPU is needed.

The library comes with torch's wheels (package ``nvidia-cuda-nvrtc``). Sources include nothing; a kernel that shares
code with others is compiled from several files, one after the other.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cache, lru_cache
from pathlib import Path

from anyfp4.errors import BackendError

_FOLDER = Path(__file__).parent
#: no contraction: every rounding is part of a definition
OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17", "--fmad=false", "-lineinfo")
Defines = tuple[tuple[str, int | str], ...]


def find_nvrtc() -> str | None:
    """Path or name of the library; None if there is none. Imports nothing."""
    found: list[Path] = []
    for package in ("nvidia", "torch"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for pattern in ("*/lib/libnvrtc.so.*", "lib/libnvrtc.so*", "lib/libnvrtc-*.so*"):
                found += Path(folder).glob(pattern)
    libraries = [p for p in found if "builtins" not in p.name and ".alt." not in p.name]
    if libraries:
        return str(max(libraries, key=_version))
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return None


def _version(path: Path) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", path.name)))


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    path = find_nvrtc()
    if path is None:
        raise BackendError("libnvrtc was not found; it comes with the package nvidia-cuda-nvrtc")
    # it opens its other half by name, which need not be where the loader looks
    for other in Path(path).parent.glob("libnvrtc-builtins.so.*") if "/" in path else ():
        ctypes.CDLL(str(other), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(path)
    library.nvrtcGetErrorString.restype = c_char_p
    return library


@cache
def compile_only(files: tuple[str, ...], defines: Defines = (), options: tuple[str, ...] = ()) -> bytes:
    """A cubin for sm_90a; kept for the life of the process.

    Args:
        files: sources of this folder, joined in order.
        defines: macros and their values.
        options: further ones for NVRTC.

    Raises:
        BackendError: NVRTC is missing or refuses the source; with its log.
    """
    return compile_with_log(files, defines, options)[0]


def compile_with_log(files: tuple[str, ...], defines: Defines = (), options: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """As :func:`compile_only`, anew each time, and what the compiler said."""
    nvrtc = _nvrtc()
    source = "\n".join(f'#line 1 "{name}"\n{(_FOLDER / name).read_text()}' for name in files)
    program = c_void_p()
    _check(nvrtc.nvrtcCreateProgram(byref(program), source.encode(), files[-1].encode(), 0, None, None))
    try:
        arguments = [*OPTIONS, *options, *(f"-D{name}={value}" for name, value in defines)]
        array = (c_char_p * len(arguments))(*(a.encode() for a in arguments))
        status = nvrtc.nvrtcCompileProgram(program, c_int(len(arguments)), array)
        size = c_size_t()
        _check(nvrtc.nvrtcGetProgramLogSize(program, byref(size)))
        log = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        text = log.value.decode(errors="replace")
        if status:
            reason = nvrtc.nvrtcGetErrorString(status).decode()
            raise BackendError(f"NVRTC could not compile {files[-1]} with {dict(defines)}: {reason}\n{text}")
        _check(nvrtc.nvrtcGetCUBINSize(program, byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin.raw, text
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


def _check(status: int) -> None:
    if status:
        raise BackendError(f"NVRTC failed: {_nvrtc().nvrtcGetErrorString(status).decode()}")
