"""Loads compiled kernels and launches them through CUDA's driver, on torch's device and stream.

A launch costs a few microseconds of Python, allocates nothing on the device, and may be captured in a CUDA graph (what
may not is loading a kernel, so load before).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_float, c_int, c_int64, c_uint, c_uint32, c_uint64, c_void_p
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from anyfp4.errors import BackendError
from anyfp4.kernels.hopper.compiler import Defines, compile_only

# of cuda.h
_MAX_DYNAMIC_SHARED, _NON_PORTABLE_CLUSTER = 8, 14
_ATTRIBUTE_CLUSTER, _ATTRIBUTE_OVERLAP = 4, 6
_INVALID_CONTEXT = 201
_TENSOR_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_SWIZZLE_128B, _PROMOTE_256B = 3, 3


class _Attribute(ctypes.Structure):
    _fields_ = (("id", c_int), ("pad", c_int), ("value", c_uint * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", c_uint * 3), ("block", c_uint * 3), ("shared", c_uint), ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("count", c_uint),
    )  # fmt: skip


class TensorMap:
    """What the bulk tensor copy engine needs to know of a matrix; an argument of kind ``T``, passed by value.

    It holds an address: the tensor must live until the kernel has run.
    """

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(128 + 64)
        self.address = (ctypes.addressof(self._memory) + 63) // 64 * 64  # CUDA asks for 64


def tensor_map(x: Tensor, box: tuple[int, int]) -> TensorMap:
    """A map of a row-major matrix, for copies of boxes into shared memory with the 128-byte swizzle.

    Args:
        x: float16 or bfloat16 [R, C] on a GPU, contiguous rows, C a multiple of 8.
        box: rows (at most 256) and columns (at most 64) of a copy; what lies outside x reads as zeros.
    """
    out = TensorMap()
    rows, columns = x.shape
    sizes = (c_uint64 * 2)(columns, rows)
    strides = (c_uint64 * 1)(x.stride(0) * x.element_size())
    boxes, steps = (c_uint32 * 2)(box[1], box[0]), (c_uint32 * 2)(1, 1)
    status = _driver().cuTensorMapEncodeTiled(
        c_void_p(out.address), _TENSOR_TYPES[x.dtype], c_uint(2), c_void_p(x.data_ptr()), sizes, strides, boxes, steps,
        0, _SWIZZLE_128B, _PROMOTE_256B, 0,
    )  # fmt: skip
    _check(status, "cuTensorMapEncodeTiled")
    return out


class Kernel:
    """A function on one device.

    Attributes:
        name: of the function.
        device: its index.
    """

    def __init__(self, function: c_void_p, name: str, kinds: str, shared: int, device: int) -> None:
        """Takes the arguments' ``kinds``, see :func:`load`."""
        self.name, self.device = name, device
        self._function, self._shared, self._kinds = function, shared, kinds
        storage = {"P": c_uint64, "i": c_int, "q": c_int64, "f": c_float, "T": c_uint64}
        self._values: list[Any] = [storage[kind]() for kind in kinds]
        self._pointers = (c_void_p * len(kinds))(*(ctypes.addressof(v) for v in self._values))
        self._attributes = (_Attribute * 2)()
        self._config = _Config(shared=shared, attributes=self._attributes)
        self._lock = threading.Lock()

    def launch(
        self,
        grid: tuple[int, int, int],
        block: int,
        arguments: Sequence[int | float | Tensor | TensorMap | None],
        *,
        cluster: int = 1,
        overlap: bool = False,
    ) -> None:
        """Runs the kernel on torch's current stream of its device.

        Args:
            grid: blocks; x a multiple of ``cluster``.
            block: threads.
            arguments: one for each kind; for ``P`` a tensor, an address or None.
            cluster: blocks of a cluster, along x.
            overlap: the kernel may start before the one ahead of it on the stream has ended; it must wait itself
                (``griddepcontrol.wait``) before it reads what that one wrote, or writes anything.
        """
        driver = _driver()
        with self._lock:
            for i, (kind, value, cell) in enumerate(zip(self._kinds, arguments, self._values, strict=True)):
                if kind == "T":
                    assert isinstance(value, TensorMap)
                    self._pointers[i] = value.address
                elif isinstance(value, Tensor):
                    cell.value = value.data_ptr()
                else:
                    cell.value = 0 if value is None else value
            config, count = self._config, 0
            config.grid[:], config.block[0], config.block[1], config.block[2] = grid, block, 1, 1
            if cluster > 1:
                self._attributes[count].id = _ATTRIBUTE_CLUSTER
                self._attributes[count].value[:3] = (cluster, 1, 1)
                count += 1
            if overlap:
                self._attributes[count].id = _ATTRIBUTE_OVERLAP
                self._attributes[count].value[0] = 1
                count += 1
            config.count = count
            config.stream = torch.cuda.current_stream(self.device).cuda_stream
            status = driver.cuLaunchKernelEx(byref(config), self._function, self._pointers, None)
            if status == _INVALID_CONTEXT:  # a thread that has not used this device yet
                with _context(self.device):
                    status = driver.cuLaunchKernelEx(byref(config), self._function, self._pointers, None)
        _check(status, f"launching {self.name}")


@cache
def load(files: tuple[str, ...], name: str, kinds: str, device: int, defines: Defines = (), shared: int = 0) -> Kernel:
    """Compiles (once) and loads a kernel; kept for the life of the process.

    Args:
        files: sources of this folder, joined in order.
        name: of an ``extern "C"`` function.
        kinds: of its parameters: P pointer, i int, q long long, f float, T tensor map.
        device: index of the GPU.
        defines: macros and their values.
        shared: bytes of dynamic shared memory.

    Raises:
        BackendError: it does not compile or load, or asks for more shared memory than there is.
    """
    cubin = compile_only(files, defines)
    driver = _driver()
    module, function = c_void_p(), c_void_p()
    with _context(device):
        _check(driver.cuModuleLoadData(byref(module), c_char_p(cubin)), f"loading {name}")
        _check(driver.cuModuleGetFunction(byref(function), module, name.encode()), f"finding {name}")
        if shared > 48 << 10:
            _check(driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared), f"{shared} bytes of shared memory")
        _check(driver.cuFuncSetAttribute(function, _NON_PORTABLE_CLUSTER, 1), "clusters of more than 8")
    return Kernel(function, name, kinds, shared, device)


def why_no_driver() -> str | None:
    """Why CUDA's driver cannot be used; None if it can."""
    try:
        _driver()
    except BackendError as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError("CUDA's driver (libcuda.so.1) was not found") from error


@cache
def _primary_context(device: int) -> c_void_p:
    driver, handle, context = _driver(), c_int(), c_void_p()
    torch.cuda.init()
    _check(driver.cuDeviceGet(byref(handle), device), f"GPU {device}")
    _check(driver.cuDevicePrimaryCtxRetain(byref(context), handle), f"the context of GPU {device}")
    return context


@contextmanager
def _context(device: int) -> Iterator[None]:
    """The context that torch uses on a device is the calling thread's, for a while."""
    driver = _driver()
    _check(driver.cuCtxPushCurrent_v2(_primary_context(device)), f"the context of GPU {device}")
    try:
        yield
    finally:
        driver.cuCtxPopCurrent_v2(byref(c_void_p()))


def _check(status: int, what: str) -> None:
    if status:
        text = c_char_p()
        _driver().cuGetErrorString(status, byref(text))
        raise BackendError(f"{what}: {text.value.decode() if text.value else f'CUDA error {status}'}")
