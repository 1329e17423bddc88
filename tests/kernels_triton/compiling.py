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
    gemm,
    linear_blackwell,
    linear_dense,
    linear_fp8_block,
    linear_packed,
    quantize,
    quantize_fp8,
)
from anyfp4.kernels.triton.layout import GROUP, SEGMENT

INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma", "v_wmma")
#: pointers that are not to float16
POINTERS = {
    "p_w": "*i32", "p_s": "*i32", "p_low": "*i32", "p_high": "*i32", "p_tiles": "*i32", "p_a": "*u8", "p_g": "*fp32",
    "p_alpha": "*fp32", "p_bias": "*fp32", "p_row": "*fp32", "p_sums": "*fp32", "p_counters": "*i32",
    "p_scale": "*fp32", "p_token_scale": "*fp32", "p_again": "*i32", "p_y": "*bf16",
}  # fmt: skip
GROUPS = {"GROUP": GROUP, "SEGMENT_GROUPS": SEGMENT // GROUP}
PACKED = {
    "SEGMENTS": 4, "SPLIT": True, "DESCRIPTOR": False, "BITS": 4, "W": 16, "SUBNORMAL": False, "EVEN_K": True,
    "WHOLE": True, "ROW": False, "BIAS": False, "R": 64, "T": 16, **GROUPS,
}  # fmt: skip
IN_TURN = {"SPLIT": False, "T": 64, "SUBNORMAL": True, "EVEN_K": False, "WHOLE": False, "BIAS": True}
WIDE = {"SPLIT": False, "DESCRIPTOR": True, "T": 128, "R": 128}
GEMM = {
    "SEGMENT": SEGMENT, "ROW": False, "BIAS": True, "T": gemm.TOKENS, "STEP": gemm.STEP, "TOKEN_TILES": 8,
}  # fmt: skip
X_TILE, W_TILE = ({name: f"tensordesc<fp16[{rows}, {gemm.STEP}]>"} for name, rows in (("x_desc", 128), ("w_desc", 256)))
DENSE = {"SEGMENT": SEGMENT, "SEGMENTS": 4, "SPLIT": True, "EVEN_K": True, "BIAS": True, "T": 16, "R": 64}
BLOCKS = {"SEGMENTS": 4, "SPLIT": True, "SCALED": True, "EVEN_K": True, "BIAS": False, "R": 64, "T": 16, **GROUPS}
FOUR = {"num_warps": 4, "num_stages": 3}
#: name -> kernel, types that differ, constants, warps and stages
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, object], dict[str, int]]] = {
    "packed": (linear_packed._packed_linear, {}, PACKED, FOUR),
    "packed, in turn": (linear_packed._packed_linear, {}, {**PACKED, **IN_TURN}, FOUR),
    "packed, wide": (
        linear_packed._packed_linear, {"x_desc": "tensordesc<fp16[128, 128]>"}, {**PACKED, **WIDE},
        {"num_warps": 8, "num_stages": 3},
    ),
    "weight-only": (linear_packed._packed_linear, {"p_x": "*bf16"}, PACKED, FOUR),
    "fp8": (linear_packed._packed_linear, {}, {**PACKED, "BITS": 8, "W": 32, "ROW": True}, FOUR),
    "fp8 blocks": (linear_fp8_block._fp8_block_linear, {}, BLOCKS, FOUR),
    "fp8 blocks, weight-only": (
        linear_fp8_block._fp8_block_linear, {"p_x": "*bf16"},
        {**BLOCKS, "SPLIT": False, "SCALED": False, "EVEN_K": False, "T": 64}, FOUR,
    ),
    "blackwell": (
        linear_blackwell._blackwell_linear, {}, {"EVEN_K": True, "BIAS": False, "BM": 32, "BN": 64}, FOUR,
    ),
    "blackwell, few tokens": (
        linear_blackwell._blackwell_linear, {}, {"EVEN_K": False, "BIAS": True, "BM": 16, "BN": 16},
        {"num_warps": 1, "num_stages": 4},
    ),
    "blackwell again": (
        linear_blackwell._blackwell_again, {}, {"BIAS": False, "BM": 16, "BN": 32}, {"num_warps": 2, "num_stages": 1},
    ),
    "dense": (
        linear_dense._dense_linear, {"p_x": "*bf16", "p_w": "*bf16"}, {**DENSE, "FLOAT32": False, "STEP": 128}, FOUR,
    ),
    "dense, float32": (
        linear_dense._dense_linear, {"p_x": "*fp32", "p_w": "*fp32"},
        {**DENSE, "SPLIT": False, "FLOAT32": True, "STEP": 32}, FOUR,
    ),
    "gemm": (gemm._gemm, {**X_TILE, **W_TILE}, {**GEMM, "R": 256}, {"num_warps": 8, "num_stages": 4}),
    "gemm, narrow": (
        gemm._gemm, {**X_TILE, "w_desc": X_TILE["x_desc"]}, {**GEMM, "R": 128}, {"num_warps": 8, "num_stages": 4},
    ),
    "dequantize": (gemm._dequantize, {}, {"BITS": 4, "W": 16, "R": 64, "GROUP": GROUP}, {"num_warps": 4}),
    "quantize": (
        quantize._quantize, {"p_x": "*bf16", "p_pre": "*bf16", "p_scale": "*u8"},
        {"PRE": True, "VALUES": True, "BLOCKS": 128, "WHOLE": True}, {"num_warps": 4},
    ),
    "quantize, packed": (
        quantize._quantize, {"p_x": "*fp32", "p_pre": "*fp32", "p_scale": "*u8", "p_out": "*u8"},
        {"PRE": False, "VALUES": False, "BLOCKS": 64, "WHOLE": False}, {"num_warps": 4},
    ),
    "quantize_fp8": (quantize_fp8._quantize_fp8, {"p_x": "*bf16"}, {"STATIC": False, "BLOCK": 1024}, {"num_warps": 4}),
    "quantize_fp8_blocks": (
        quantize_fp8._quantize_fp8_blocks, {"p_x": "*bf16"}, {"BLOCKS": 8, "SIZE": GROUP}, {"num_warps": 4},
    ),
}  # fmt: skip
#: where there is a bulk copy engine
DESCRIPTORS, COPY_ENGINE = ("packed, wide", "gemm", "gemm, narrow"), ("90", "100")


def build(name: str, target: GPUTarget) -> dict[str, int]:
    kernel, types, constants, options = KERNELS[name]
    signature = {}
    for argument in kernel.arg_names:
        default = "*fp16" if argument.startswith("p_") else "fp32" if argument == "unit" else "i32"
        if argument == "x_desc" and argument not in types:
            constants = {**constants, argument: None}
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
    names = [n for n in KERNELS if arch in COPY_ENGINE or n not in DESCRIPTORS]
    print(json.dumps({name: build(name, target) for name in names}))


if __name__ == "__main__":
    main()
