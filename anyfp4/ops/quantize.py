"""Activation quantization: x [M, K] to codes and block scales, with a static global scale."""

from __future__ import annotations

from torch import Tensor

from anyfp4.formats import nvfp4


def quantize_activation(x: Tensor, input_global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes the rows of an activation to NVFP4; the formula is in :func:`anyfp4.formats.nvfp4.quantize_blocks`.

    Args:
        x: [M, K] float32, bfloat16 or float16, K a multiple of 16.
        input_global_scale: float32 [] or [1], the multiplier (true value = code × block_scale × multiplier).

    Returns:
        (packed uint8 [M, K/2], block_scale float8_e4m3fn [M, K/16]).

    Raises:
        InvalidArgumentError: wrong shape or dtype, or a scale that is not positive and finite.
    """
    nvfp4.check_global_scale(input_global_scale)
    return nvfp4.quantize_blocks(x, input_global_scale)
