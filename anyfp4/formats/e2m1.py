"""E2M1: the 4-bit floating-point numbers of NVFP4.

One sign bit, two exponent bits, one mantissa bit (OCP *Microscaling Formats* v1.0, section 5.3.3): magnitudes
0, 0.5, 1, 1.5, 2, 3, 4, 6, no infinity, no NaN. A code is the bit pattern, 0…15.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError

#: value of each magnitude code 0…7
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: value of each code 0…15
VALUES = (*MAGNITUDES, *(-m for m in MAGNITUDES))
MAX = 6.0


def encode(x: Tensor) -> Tensor:
    """Rounds to the nearest E2M1 number, ties to the even code, saturating at ±6; keeps the sign of zero.

    The seven thresholds are the midpoints of neighbouring magnitudes; a tie belongs to the even code, so the
    comparison below an odd code is strict and the one below an even code is not. NaN gives code 0: E2M1 has no
    NaN, and a NaN is carried by the block scale.

    Args:
        x: float32, any shape.

    Returns:
        uint8 codes 0…15, shape of ``x``.
    """
    if x.dtype != torch.float32:
        raise InvalidArgumentError(f"e2m1.encode takes float32, got {x.dtype}")
    m = x.abs()
    code = (m > 0.25).to(torch.uint8)
    code += m >= 0.75
    code += m > 1.25
    code += m >= 1.75
    code += m > 2.5
    code += m >= 3.5
    code += m > 5.0
    return code | ((torch.signbit(x) & ~torch.isnan(x)).to(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    """The float32 value of each code.

    Args:
        codes: uint8 codes 0…15, any shape.

    Returns:
        float32, shape of ``codes``.
    """
    table = torch.tensor(VALUES, dtype=torch.float32, device=codes.device)
    return table[codes.to(torch.int32)]


def pack(codes: Tensor) -> Tensor:
    """Packs two codes in each byte, the even index in the low nibble.

    Args:
        codes: uint8 [..., K], K even.

    Returns:
        uint8 [..., K/2].
    """
    if codes.dtype != torch.uint8 or codes.shape[-1] % 2:
        raise InvalidArgumentError(f"e2m1.pack takes uint8 [..., even], got {codes.dtype} {list(codes.shape)}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack`: uint8 [..., K/2] to uint8 codes [..., K]."""
    if packed.dtype != torch.uint8:
        raise InvalidArgumentError(f"e2m1.unpack takes uint8, got {packed.dtype}")
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode_packed(packed: Tensor) -> Tensor:
    """``decode(unpack(packed))`` through one table of 256 pairs: uint8 [..., K/2] to float32 [..., K]."""
    if packed.dtype != torch.uint8:
        raise InvalidArgumentError(f"e2m1.decode_packed takes uint8, got {packed.dtype}")
    pairs = decode(unpack(torch.arange(256, dtype=torch.uint8, device=packed.device)[:, None]))  # [256, 2]
    # the two float32 of a pair move as one int64: faster than gathering rows of two
    pairs = pairs.view(torch.int64).squeeze(-1)
    return torch.take(pairs, packed.contiguous().to(torch.int64)).view(torch.float32)
