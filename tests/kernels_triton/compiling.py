"""Compiles the linear kernels for one target, without a GPU: ``python -m tests.kernels_triton.compiling cuda 90``.

Prints a JSON object: kernel -> how often each matrix instruction and each width of matrix operand occurs in the result.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anyfp4.kernels.triton import (
    epilogue,
    gemm,
    linear_blackwell,
    linear_dense,
    linear_packed,
    quantize,
    quantize_fp8,
)

INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma", "v_wmma")
#: pointers that are not to float16
POINTERS = {
    "p_w": "*i32", "p_s": "*i32", "p_low": "*i32", "p_high": "*i32", "p_tiles": "*i32", "p_a": "*u8", "p_g": "*fp32",
    "p_alpha": "*fp32", "p_bias": "*fp32", "p_row": "*fp32", "p_part": "*fp32", "p_y": "*bf16",
}  # fmt: skip
PACKED = {
    "BITS": 4,
    "W": 32,
    "SUBNORMAL": False,
    "EVEN_K": True,
    "PARTIAL": False,
    "ROW": False,
    "BIAS": False,
    "BN": 64,
}
ODD = {"BM": 64, "W": 16, "SUBNORMAL": True, "EVEN_K": False, "BIAS": True}
GEMM = {"SEGMENT": 4096, "ROW": False, "BIAS": True, "BM": gemm.BM, "BN": gemm.BN, "BK": gemm.BK, "GROUP": 8}
DESCRIPTORS = {
    "x_desc": f"tensordesc<fp16[{gemm.BM}, {gemm.BK}]>",
    "w_desc": f"tensordesc<fp16[{gemm.BN}, {gemm.BK}]>",
}
DENSE = {"SEGMENT": 4096, "EVEN_K": True, "PARTIAL": True, "BIAS": True, "BM": 16, "BN": 64}
#: name -> kernel, types that differ, constants, warps and stages
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, object], dict[str, int]]] = {
    "packed": (linear_packed._packed_linear, {}, {**PACKED, "BM": 16}, {"num_warps": 4, "num_stages": 3}),
    "packed, 64 tokens": (
        linear_packed._packed_linear, {}, {**PACKED, **ODD},
        {"num_warps": 4, "num_stages": 3},
    ),
    "weight-only": (
        linear_packed._packed_linear, {"p_x": "*bf16"}, {**PACKED, "BM": 16}, {"num_warps": 4, "num_stages": 3},
    ),
    "fp8": (
        linear_packed._packed_linear, {}, {**PACKED, "BM": 16, "BITS": 8, "ROW": True},
        {"num_warps": 4, "num_stages": 3},
    ),
    "blackwell": (
        linear_blackwell._blackwell_linear, {}, {"EVEN_K": True, "BIAS": False, "BM": 32, "BN": linear_blackwell.TILE},
        {"num_warps": 2, "num_stages": 3},
    ),
    "dense": (
        linear_dense._dense_linear, {"p_x": "*bf16", "p_w": "*bf16"}, {**DENSE, "FLOAT32": False, "BK": 128},
        {"num_warps": 4, "num_stages": 3},
    ),
    "dense, float32": (
        linear_dense._dense_linear, {"p_x": "*fp32", "p_w": "*fp32"}, {**DENSE, "FLOAT32": True, "BK": 32},
        {"num_warps": 4, "num_stages": 3},
    ),
    "gemm": (gemm._gemm, DESCRIPTORS, {**GEMM, "SEGMENTS": 1}, {"num_warps": 8, "num_stages": 4}),
    "gemm, 3 segments": (gemm._gemm, DESCRIPTORS, {**GEMM, "SEGMENTS": 3}, {"num_warps": 8, "num_stages": 4}),
    "dequantize": (gemm._dequantize, {}, {"BITS": 4, "W": 16, "R": 32}, {"num_warps": 4}),
    "quantize": (
        quantize._quantize, {"p_x": "*bf16", "p_pre": "*bf16", "p_scale": "*u8"},
        {"PRE": True, "VALUES": True, "BLOCKS": 128, "WHOLE": True}, {"num_warps": 4},
    ),
    "quantize, packed": (
        quantize._quantize, {"p_x": "*fp32", "p_pre": "*fp32", "p_scale": "*u8", "p_out": "*u8"},
        {"PRE": False, "VALUES": False, "BLOCKS": 64, "WHOLE": False}, {"num_warps": 4},
    ),
    "quantize_fp8": (
        quantize_fp8._quantize_fp8, {"p_x": "*bf16", "p_scale": "*fp32"}, {"STATIC": False, "BLOCK": 1024},
        {"num_warps": 4},
    ),
    "add_segments": (
        epilogue._add_segments, {}, {"SEGMENTS": 3, "ROW": True, "BIAS": True, "BLOCK": 1024}, {"num_warps": 4},
    ),
}  # fmt: skip
#: not used on AMD
NVIDIA_ONLY = ("gemm", "gemm, 3 segments")


def build(name: str, target: GPUTarget) -> dict[str, int]:
    kernel, types, constants, options = KERNELS[name]
    signature = {}
    for argument in kernel.arg_names:
        default = "*fp16" if argument.startswith("p_") else "fp32" if argument == "unit" else "i32"
        signature[argument] = "constexpr" if argument in constants else types.get(
            argument, POINTERS.get(argument, default)
        )  # fmt: skip
    aligned = [a for a, t in signature.items() if t.startswith("*") or a in ("N", "K", "x_stride")]
    attributes = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned}
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(a),): v for a, v in constants.items()}, attributes
    )  # fmt: skip
    compiled = triton.compile(source, target=target, options={**options, "enable_fp_fusion": False})
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    found = {i: text.count(i) for i in (*INSTRUCTIONS, "tf32") if i in text}
    for width in set(re.findall(r"kWidth = (\d+)", compiled.asm["ttgir"])):
        found[f"kWidth {width}"] = 1
    binary = "cubin" if target.backend == "cuda" else "hsaco"
    return {**found, binary: len(compiled.asm[binary]), "fma": text.count("fma.rn.f32")}


def main() -> None:
    backend, arch = sys.argv[1:3]
    target = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)
    names = [n for n in KERNELS if backend == "cuda" or n not in NVIDIA_ONLY]
    print(json.dumps({name: build(name, target) for name in names}))


if __name__ == "__main__":
    main()
