"""Matrix products of ggml, through the shared libraries that llama-cpp-python brings, without its Python package."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from torch import Tensor


class _InitParams(Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class Ggml:
    """The library in the folder that BENCH_GGML_LIB names (llama_cpp/lib of an environment with llama-cpp-python)."""

    def __init__(self, folder: Path) -> None:
        suffix = ".dylib" if os.uname().sysname == "Darwin" else ".so"
        self.base = ctypes.CDLL(str(folder / f"libggml-base{suffix}"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / f"libggml-cpu{suffix}"), mode=ctypes.RTLD_GLOBAL)
        #: file name with its version
        self.version = (folder / f"libggml-base{suffix}").resolve().name
        b = self.base
        b.ggml_init.argtypes, b.ggml_init.restype = [_InitParams], c_void_p
        b.ggml_free.argtypes = [c_void_p]
        b.ggml_type_name.argtypes, b.ggml_type_name.restype = [c_int], c_char_p
        b.ggml_row_size.argtypes, b.ggml_row_size.restype = [c_int, c_int64], c_size_t
        b.ggml_new_tensor_2d.argtypes = [c_void_p, c_int, c_int64, c_int64]
        b.ggml_mul_mat.argtypes = [c_void_p, c_void_p, c_void_p]
        b.ggml_new_graph.argtypes = [c_void_p]
        for f in (b.ggml_new_tensor_2d, b.ggml_mul_mat, b.ggml_new_graph, b.ggml_get_data):
            f.restype = c_void_p
        b.ggml_get_data.argtypes = [c_void_p]
        b.ggml_build_forward_expand.argtypes = [c_void_p, c_void_p]
        b.ggml_quantize_chunk.argtypes = [c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, c_void_p]
        b.ggml_quantize_chunk.restype = c_size_t
        self.cpu.ggml_graph_compute_with_ctx.argtypes = [c_void_p, c_void_p, c_int]
        self.cpu.ggml_cpu_init()
        # the library does not check the number it is asked about, so take gguf's
        known = {t.name.lower(): int(t) for t in GGMLQuantizationType}
        self.types = {name: number for name, number in known.items() if b.ggml_type_name(number) == name.encode()}

    def product(self, kind: str, w: Tensor, x: Tensor, copies: int) -> Product:
        """One graph that multiplies ``x`` by ``copies`` copies of ``w`` quantized to ``kind``."""
        return Product(self, kind, w, x, copies)


class Product:
    def __init__(self, ggml: Ggml, kind: str, w: Tensor, x: Tensor, copies: int) -> None:
        self.ggml, b, number = ggml, ggml.base, ggml.types[kind]
        n, k = w.shape
        self.bytes = b.ggml_row_size(number, k) * n
        size = copies * (self.bytes + 4 * n * x.shape[0] + 4096) + x.numel() * 8 + (64 << 20)
        self.context = b.ggml_init(_InitParams(size, None, False))
        source, tokens = w.to(torch.float32).contiguous(), x.to(torch.float32).contiguous()
        activation = b.ggml_new_tensor_2d(self.context, ggml.types["f32"], k, x.shape[0])
        ctypes.memmove(b.ggml_get_data(activation), tokens.data_ptr(), 4 * x.numel())
        self.graph = b.ggml_new_graph(self.context)
        first = None
        for _ in range(copies):
            tensor = b.ggml_new_tensor_2d(self.context, number, k, n)
            data = b.ggml_get_data(tensor)
            if first is None:
                pointer = ctypes.cast(source.data_ptr(), POINTER(c_float))
                b.ggml_quantize_chunk(number, pointer, data, 0, n, k, None)
                first = data
            else:
                ctypes.memmove(data, first, self.bytes)
            self.out = b.ggml_mul_mat(self.context, tensor, activation)
            b.ggml_build_forward_expand(self.graph, self.out)
        self.shape = (x.shape[0], n)

    def run(self, threads: int) -> None:
        self.ggml.cpu.ggml_graph_compute_with_ctx(self.context, self.graph, threads)

    def result(self) -> Tensor:
        """Of the last product: float32 [M, N]."""
        buffer = (c_float * (self.shape[0] * self.shape[1])).from_address(self.ggml.base.ggml_get_data(self.out))
        return torch.frombuffer(buffer, dtype=torch.float32).view(self.shape).clone()

    def close(self) -> None:
        self.ggml.base.ggml_free(self.context)


def load() -> Ggml | str:
    """The library, or why there is none."""
    folder = os.environ.get("BENCH_GGML_LIB")
    if not folder:
        return "BENCH_GGML_LIB is not set (the llama_cpp/lib folder of an environment with llama-cpp-python)"
    try:
        return Ggml(Path(folder))
    except OSError as error:
        return str(error)
