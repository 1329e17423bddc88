"""Compiles the kernels of the decoder's other ops: ``python -m tests.kernels_triton.compiling_ops cuda 90``.

Prints a JSON object: kernel -> how often each matrix instruction and each width of matrix operand occurs in the result,
bytes of shared memory, size of the binary, fused multiply-adds.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anyfp4.kernels.triton import activation, attention, fused, kv_cache, norm, rope, sampling, softmax
from tests.kernels_triton.compiling import INSTRUCTIONS

#: pointers that are not to bfloat16
POINTERS = {
    "p_positions": "*i64", "p_slots": "*i64", "p_ids": "*i64", "p_keys": "*i64", "p_start": "*i32", "p_length": "*i32",
    "p_table": "*i32", "p_arrived": "*i32",
    "p_cos_sin": "*fp32", "p_m": "*fp32", "p_mass": "*fp32", "p_acc": "*fp32", "p_best": "*fp32",
    "p_sums": "*fp64", "p_g": "*fp32", "p_values": "*fp16", "p_scale": "*u8",
}  # fmt: skip
#: integers that are multiples of 16
ALIGNED = ("token_stride", "head_stride", "x_stride", "k_stride", "v_stride", "q_token", "q_head")
FLOATS = ("eps", "scale", "v_scale", "k_inverse", "v_inverse")
LOGITS = {"p_x": "*fp32", "p_y": "*fp32"}
CHOICES = {"p_x": "*fp32", "p_sums": "*i64"} | dict.fromkeys(("p_choices", "p_tokens"), "*i64")
PLAIN = {"enable_fp_fusion": False, "num_warps": 4}
FP8 = {"p_k_cache": "*u8", "p_v_cache": "*u8"}
WORDS = {"p_k_cache": "*i32", "p_v_cache": "*i32"}
HALVES = dict.fromkeys(("p_q", "p_k_cache", "p_v_cache", "p_out"), "*fp16")
SINGLES = dict.fromkeys(("p_q", "p_k_cache", "p_v_cache", "p_out"), "*fp32")
#: name -> kernel, types that differ, constants
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, object]]] = {
    "rms_norm": (norm._rms_norm, {}, {"ADD": False, "ROWS": 8, "BLOCK": 128}),
    "add_rms_norm": (norm._rms_norm, {"p_weight": "*fp32"}, {"ADD": True, "ROWS": 1, "BLOCK": 4096}),
    "silu_mul": (activation._silu_mul, {}, {"BLOCK": 1024}),
    "norm_quantize": (
        fused._norm_quantize, {},
        {"ADD": True, "PRE": True, "ROWS": 1, "BLOCKS": 256, "PARTS": 1, "SCALES": 2},
    ),
    # an argument of 1 becomes a constant
    "norm_quantize, 1 row": (
        fused._norm_quantize, {},
        {"ADD": True, "PRE": False, "ROWS": 1, "BLOCKS": 256, "PARTS": 4, "SCALES": 1, "rows": 1},
    ),
    "silu_mul_quantize": (
        fused._silu_mul_quantize, {}, {"PRE": True, "BLOCKS": 128, "WHOLE": True, "SCALES": 1},
    ),
    "silu_mul_quantize, 1 row": (
        fused._silu_mul_quantize, {}, {"PRE": False, "BLOCKS": 32, "WHOLE": False, "SCALES": 1, "rows": 1},
    ),
    "rope": (rope._apply_rope, {}, {"HEADS": 32, "BLOCK": 64}),
    "rope_and_write": (rope._rope_and_write, {}, {"NORM": True, "HEADS": 8, "BLOCK": 64, "EVEN": True}),
    "rope_and_write, fp8": (rope._rope_and_write, FP8, {"NORM": False, "HEADS": 8, "BLOCK": 64, "EVEN": True}),
    "write_kv": (kv_cache._write_kv, {}, {"BLOCK": 1024}),
    "write_kv, fp8": (kv_cache._write_kv, FP8, {"BLOCK": 1024}),
    "best of pieces": (softmax._best_of_pieces, LOGITS, {"PIECE": 4096}),
    "sum of pieces": (softmax._sum_pieces, LOGITS, {"PIECE": 4096, "PIECES": 64}),
    "log_softmax": (softmax._log_softmax, LOGITS, {"PIECE": 4096, "PIECES": 64}),
    "greedy": (softmax._greedy, LOGITS, {"PIECES": 64}),
    "weights of pieces": (sampling._sum_pieces, CHOICES, {"PIECE": 4096}),
    "draw": (sampling._draw, CHOICES, {"PIECE": 4096, "PIECES": 64}),
    "keys of weights": (sampling._write_keys, CHOICES, {"PIECE": 4096}),
    "draw from the heaviest": (
        sampling._draw_heaviest, CHOICES, {"PIECES": 64, "CANDIDATES": sampling.CANDIDATES},
    ),
}  # fmt: skip
#: name -> types that differ, head size, window, operands of the two products
ATTENTION: dict[str, tuple[dict[str, str], int, bool, Any, Any]] = {
    "attention": ({}, 128, False, tl.bfloat16, tl.bfloat16),
    "attention, fp8": (WORDS, 128, False, tl.bfloat16, tl.float16),
    "attention, heads of 80": (HALVES, 80, True, tl.float16, tl.float16),
    "attention, fp32": (SINGLES, 64, False, tl.float32, tl.float32),
    "attention, quantized": ({}, 128, False, tl.bfloat16, tl.bfloat16),
}
#: which of them are compiled for which target (10 s each on sm_100); all of them for others
COMPILED = {
    "80": ("attention", "attention, fp8", "attention, quantized"), "100": ("attention",),
    "gfx950": ("attention", "attention, fp8"),
}  # fmt: skip


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, object], options: dict[str, Any], target: GPUTarget
) -> Any:
    """A kernel as Triton compiles it."""
    if "OVERLAP" in kernel.arg_names:
        constants = {**constants, "OVERLAP": target.backend == "cuda" and int(target.arch) >= 90}
    signature = {}
    for argument in kernel.arg_names:
        default = "*bf16" if argument.startswith("p_") else "fp32" if argument in FLOATS else "i32"
        signature[argument] = "constexpr" if argument in constants else types.get(
            argument, POINTERS.get(argument, default)
        )  # fmt: skip
    aligned = [a for a, t in signature.items() if t.startswith("*") or a in ALIGNED]
    attributes = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned}
    places = {(kernel.arg_names.index(a),): v for a, v in constants.items()}
    return triton.compile(ASTSource(kernel, signature, places, attributes), target=target, options=options)


def build(
    kernel: Any, types: dict[str, str], constants: dict[str, object], options: dict[str, Any], target: GPUTarget
) -> dict[str, int]:
    made = compiled(kernel, types, constants, options, target)
    text = made.asm.get("ptx") or made.asm["amdgcn"]
    found = {i: text.count(i) for i in (*INSTRUCTIONS, "griddepcontrol.wait") if i in text}
    for width in set(re.findall(r"kWidth = (\d+)", made.asm["ttgir"])):
        found[f"kWidth {width}"] = 1
    for shape in set(re.findall(r"amd_mfma.*instrShape = \[(.*?)\]", made.asm["ttgir"])):
        found[f"mfma {shape}"] = 1
    if "griddepcontrol.wait" in text:
        before = text[: text.index("griddepcontrol.wait")]
        found["before waiting"] = len(re.findall(r"(?:ld|st|atom|red)\.\w*\.?global|cp\.async|\tret;", before))
    binary = made.asm["cubin" if target.backend == "cuda" else "hsaco"]
    fused = len(re.findall(r"fma\.rn\.f(?:32|64)", text))
    return {**found, "binary": len(binary), "shared": made.metadata.shared, "fma": fused}


def build_attention(name: str, few_rows: bool, target: GPUTarget) -> dict[str, int]:
    types, dim, window, qk, pv = ATTENTION[name]
    arch = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    padded = 64 if dim == 64 else 128
    how = attention.launch(arch, padded, 4 if qk == tl.float32 else 2, few_rows)
    constants = {
        "GROUP": 4, "D": dim, "DIM": padded, "ROWS": how.rows, "TILE": how.tile, "SUMS": how.sums, "BLOCK_SIZE": 16,
        "WINDOW": window, "SHARED": few_rows, "MERGED": 4, "DELAY": how.delay, "QK": qk, "PV": pv,
        "INTERPRET": False, "SCALES": int(name == "attention, quantized"), "PRE": False,
    }  # fmt: skip
    return build(attention.attend, types, constants, how.options(arch), target)


def main() -> None:
    backend, arch = sys.argv[1:3]
    target = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)
    done = {name: build(*case, PLAIN, target) for name, case in KERNELS.items()}
    for name in COMPILED.get(arch, tuple(ATTENTION)):
        done[name] = build_attention(name, False, target)
        done[f"{name}, few rows"] = build_attention(name, True, target)
    print(json.dumps(done))


if __name__ == "__main__":
    main()
