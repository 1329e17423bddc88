"""Number formats and the quantized tensor: codes, packing, scales."""

from anyfp4.formats.nvfp4 import BLOCK_SIZE, NVFP4Tensor, dequantize, quantize

__all__ = ["BLOCK_SIZE", "NVFP4Tensor", "dequantize", "quantize"]
