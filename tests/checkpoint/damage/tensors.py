"""Tensors that are missing, extra, or have a wrong shape, dtype or value."""

from __future__ import annotations

import torch

from anyfp4.errors import CheckpointConfigError, TensorError
from tests.checkpoint.damage.case import (
    CT,
    GROUP,
    MO,
    MODEL,
    NAN,
    ONE,
    Case,
    both,
    change,
    config,
    modelopt,
    remove,
    replace,
    set_bits,
)
from tests.checkpoint.small import (
    ATTENTION,
    HIDDEN,
    INTER,
    LAYER,
    UP,
    Q,
    Small,
    ct_config,
    ct_fp8_block_group,
    ct_fp8_group,
    ct_group,
    fp8_tensors,
    put,
    with_kv_scales,
)


def fp8_blocks(name: str, match: str, **tensors: torch.Tensor) -> Case:
    """One layer in block-wise FP8, with these tensors in place of the right ones, or beside them."""
    right = fp8_tensors(300, 200, 0, torch.ones(3, 2), None)

    def edit(s: Small) -> None:
        s.quantization_config = ct_config(ct_group(), ct_fp8_block_group(targets=["re:.*up_proj"]))
        put(s, UP, {suffix: t for suffix, t in (right | tensors).items() if t.numel()})

    return Case(f"FP8 blocks: {name}", edit, TensorError, rf"{MODEL}: {UP}\.{match}")


def fp8_block_scale(value: float) -> Case:
    """One layer in block-wise FP8, a single block, with this scale."""

    def edit(s: Small) -> None:
        s.quantization_config = ct_config(ct_group(), ct_fp8_block_group(targets=["re:.*up_proj"]))
        put(s, UP, fp8_tensors(INTER, HIDDEN, 0, torch.full((1, 1), value), None))

    match = rf"{MODEL}: {UP}.weight_scale: the scale of block \[0, 0\] is {value}, and 1 in all are not positive"
    return Case(f"FP8 block scale {value}", edit, TensorError, match, on_open=False)


CASES = (
    # tensors that are missing, extra, or wrong
    Case("missing packed", remove(f"{UP}.weight_packed"), TensorError, rf"{MODEL}: {UP}.weight_packed: is missing"),
    Case("missing scale", remove(f"{UP}.weight_scale"), TensorError, rf"{MODEL}: {UP}.weight_scale: is missing"),
    Case("missing global", remove(f"{UP}.weight_global_scale"), TensorError, rf"{UP}.weight_global_scale: is missing"),
    Case("missing input", remove(f"{UP}.input_global_scale"), TensorError, rf"{UP}.input_global_scale: is missing"),
    Case("missing scale_2", remove(f"{UP}.weight_scale_2"), TensorError, rf"{UP}.weight_scale_2: is missing", MO),
    Case("missing input, modelopt", remove(f"{Q}.input_scale"), TensorError, rf"{Q}.input_scale: is missing", MO),
    Case(
        "extra zero point", replace(f"{UP}.weight_zero_point", ONE), TensorError, rf"{UP}.weight_zero_point: does not"
    ),
    Case("unknown suffix", replace(f"{UP}.weight_magic", ONE), TensorError, rf"{MODEL}: {UP}.weight_magic: does not"),
    Case(
        "input scale on weight-only",
        config(*GROUP, "input_activations", value=None),
        TensorError,
        r"input_global_scale: does not belong to a module stored as NVFP4 weight-only",
    ),
    Case(
        "pre_quant_scale without AWQ",
        replace(f"{UP}.pre_quant_scale", torch.ones(HIDDEN)),
        TensorError,
        rf"{UP}.pre_quant_scale: does not belong",
        MO,
    ),
    Case(
        "scale of wrong shape",
        change(f"{UP}.weight_scale", lambda x: x[:, :1].contiguous()),
        TensorError,
        rf"{UP}.weight_scale: must be float8_e4m3fn \[{INTER}, 2\], got float8_e4m3fn \[{INTER}, 1\]",
    ),
    Case(
        "scale in fp32",
        change(f"{UP}.weight_scale", lambda x: x.float()),
        TensorError,
        rf"{UP}.weight_scale: must be float8_e4m3fn .*, got float32",
    ),
    Case(
        "packed as int8",
        change(f"{UP}.weight_packed", lambda x: x.view(torch.int8)),
        TensorError,
        rf"{UP}.weight_packed: must be uint8 .*, got int8",
    ),
    Case(
        "packed of three dimensions",
        change(f"{UP}.weight_packed", lambda x: x[None]),
        TensorError,
        rf"{UP}.weight_packed: must be a matrix",
    ),
    Case(
        "K is not a multiple of 16",
        change(f"{UP}.weight_packed", lambda x: x[:, :12].contiguous()),
        TensorError,
        rf"{UP}.weight_packed: K = 24 is not a multiple of 16",
    ),
    Case(
        "global scale of two numbers",
        replace(f"{UP}.weight_global_scale", torch.ones(2)),
        TensorError,
        rf"{UP}.weight_global_scale: must be float32 \[\] or \[1\], got float32 \[2\]",
    ),
    Case(
        "global scale in bf16",
        replace(f"{UP}.weight_scale_2", torch.ones((), dtype=torch.bfloat16)),
        TensorError,
        rf"{UP}.weight_scale_2: must be float32",
        MO,
    ),
    Case(
        "bias of wrong length",
        replace(f"{UP}.bias", torch.zeros(HIDDEN)),
        TensorError,
        rf"{UP}.bias: must be .* \[{INTER}\]",
    ),
    # values
    Case(
        "NaN scale",
        set_bits(f"{UP}.weight_scale", 0x7F),
        TensorError,
        rf"{UP}.weight_scale: .*\[1, 0\] is nan",
        on_open=False,
    ),
    Case(
        "−NaN scale",
        set_bits(f"{UP}.weight_scale", 0xFF),
        TensorError,
        rf"{UP}.weight_scale: .*is nan",
        MO,
        on_open=False,
    ),
    Case(
        "negative scale",
        set_bits(f"{UP}.weight_scale", 0xB8),
        TensorError,
        rf"{UP}.weight_scale: .*is -1.0",
        on_open=False,
    ),
    *(
        Case(
            f"{layout} {suffix} {value}",
            replace(f"{UP}.{suffix}", torch.tensor(value).reshape(shape)),
            TensorError,
            rf"{MODEL}: {UP}.{suffix}: .*must be positive and finite",
            layout,
            on_open=False,
        )
        for layout, suffix, shape in (
            (CT, "weight_global_scale", (1,)),
            (CT, "input_global_scale", (1,)),
            (MO, "weight_scale_2", ()),
            (MO, "input_scale", ()),
        )
        for value in (0.0, -1.0, torch.inf, torch.nan, 1e-40)  # the reciprocal of 1e-40 overflows
    ),
    Case(
        "largest divisor",  # its reciprocal rounds to 2⁻¹²⁸, whose own reciprocal overflows
        replace(f"{UP}.input_global_scale", torch.tensor([torch.finfo(torch.float32).max])),
        TensorError,
        rf"{UP}.input_global_scale: .*must be positive and finite",
        on_open=False,
    ),
    Case(
        "NaN k_scale",
        both(with_kv_scales, replace(f"{ATTENTION}.k_proj.k_scale", NAN)),
        TensorError,
        rf"{ATTENTION}.k_proj.k_scale: is nan",
        MO,
        on_open=False,
    ),
    Case(
        "zero v_scale",
        both(with_kv_scales, replace(f"{ATTENTION}.v_scale", torch.zeros(1))),
        TensorError,
        rf"{ATTENTION}.v_scale: is 0.0",
        on_open=False,
    ),
    Case(
        "infinite pre_quant_scale",
        both(modelopt("quant_algo", "NVFP4_AWQ"), replace(f"{UP}.pre_quant_scale", torch.full((HIDDEN,), torch.inf))),
        TensorError,
        rf"{UP}.pre_quant_scale: holds a NaN or an infinity",
        MO,
        on_open=False,
    ),
    # KV scales
    Case("v_scale missing", both(with_kv_scales, remove(f"{ATTENTION}.v_scale")), TensorError, r"v_scale: is missing"),
    Case(
        "k_scale missing, modelopt",
        both(with_kv_scales, remove(f"{ATTENTION}.k_proj.k_scale")),
        TensorError,
        r"k_proj.k_scale: is missing",
        MO,
    ),
    Case("unexpected k_scale", replace(f"{ATTENTION}.k_scale", ONE), TensorError, r"k_scale: is not expected"),
    Case(
        "q_scale",
        both(with_kv_scales, replace(f"{ATTENTION}.q_scale", ONE)),
        TensorError,
        r"q_scale: is not expected: the configuration has no such KV scale",
    ),
    Case(
        "k_scale of each head",
        both(with_kv_scales, replace(f"{ATTENTION}.k_scale", torch.ones(2, 1, 1))),
        TensorError,
        r"k_scale: must be one floating-point number",
    ),
    # FP8
    Case(
        "FP8 row scale of wrong length",
        both(
            config(
                "config_groups",
                value={"a": ct_group(targets=["re:.*self_attn"]), "b": ct_fp8_group("channel", True, ["re:.*mlp"])},
            ),
            config("format", value="mixed-precision"),
            *(
                lambda s, m=m: put(
                    s, f"{LAYER}.mlp.{m}", fp8_tensors(HIDDEN, HIDDEN, 0, torch.ones(HIDDEN - 1, 1), None)
                )
                for m in ("gate_proj", "up_proj", "down_proj")
            ),
        ),
        TensorError,
        rf"_proj.weight_scale: must be .* \[{HIDDEN}\] or \[{HIDDEN}, 1\], got float32 \[{HIDDEN - 1}, 1\]",
    ),
    fp8_blocks(
        "too few scales",
        r"weight_scale: must be .* \[3, 2\] or \[3, 1, 2, 1\], got float32 \[2, 2\]",
        weight_scale=torch.ones(2, 2),
    ),
    fp8_blocks("transposed", r"weight_scale: must be .* got float32 \[2, 3\]", weight_scale=torch.ones(2, 3)),
    fp8_blocks("flat", r"weight_scale: must be .* got float32 \[6\]", weight_scale=torch.ones(6)),
    fp8_blocks(
        "a scale for each row", r"weight_scale: must be .* got float32 \[300, 1\]", weight_scale=torch.ones(300, 1)
    ),
    fp8_blocks("E8M0 scales", r"weight_scale: must be .* got uint8 \[3, 2\]", weight_scale=torch.ones(3, 2).byte()),
    fp8_blocks("no scales", r"weight_scale: is missing \(FP8 block-wise dynamic\)", weight_scale=torch.empty(0)),
    fp8_blocks(
        "E5M2", r"weight: must be float8_e4m3fn .* got float8_e5m2", weight=torch.ones(300, 200).to(torch.float8_e5m2)
    ),
    fp8_blocks("static", r"input_scale: does not belong to .* FP8 block-wise dynamic", input_scale=ONE),
    fp8_blocks("inverse scales", r"weight_scale_inv: does not belong to", weight_scale_inv=torch.ones(3, 2)),
    *(fp8_block_scale(value) for value in (0.0, -1.0, torch.nan, torch.inf)),
    # unquantized
    Case(
        "quantized without a configuration",
        lambda s: setattr(s, "quantization_config", None),
        CheckpointConfigError,
        r"belongs to a quantized module .*config.json has no quantization_config",
    ),
)
