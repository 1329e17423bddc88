"""Operands that exercise Hopper's arithmetic: shared by the test of the model and the test on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

#: rows of a and of b: one wgmma tile
SIZE = 64
INF = float("inf")
NAN = float("nan")


class Case(NamedTuple):
    """One product: ``acc + a @ b.T``.

    Attributes:
        name: of the case.
        acc: float32 [SIZE, SIZE], the accumulators to start from.
        a: float16 or bfloat16 [SIZE, K].
        b: [SIZE, K].
    """

    name: str
    acc: Tensor
    a: Tensor
    b: Tensor


def cases(dtype: torch.dtype, seed: int = 0) -> Iterator[Case]:
    """Yields every case for ``dtype``."""
    g = torch.Generator().manual_seed(seed)
    fp16 = dtype == torch.float16
    zero = torch.zeros(SIZE, SIZE)

    def normal(k: int) -> Tensor:
        return torch.randn(SIZE, k, generator=g)

    def scaled(k: int, low: int, high: int) -> Tensor:
        """Magnitudes spread evenly over the binades 2^low…2^high."""
        power = torch.randint(low, high + 1, (SIZE, k), generator=g).to(torch.float64)
        return (normal(k).to(torch.float64) * torch.exp2(power)).to(dtype)

    def sprinkle(x: Tensor, values: tuple[float, ...], share: float) -> Tensor:
        choice = torch.tensor(values, dtype=x.dtype)[torch.randint(len(values), x.shape, generator=g)]
        return torch.where(torch.rand(x.shape, generator=g) < share, choice, x)

    def accumulators(low: int, high: int) -> Tensor:
        power = torch.randint(low, high + 1, (SIZE, SIZE), generator=g).to(torch.float64)
        return (normal(SIZE).to(torch.float64) * torch.exp2(power)).to(torch.float32)

    yield Case("normal", zero, normal(256).to(dtype), normal(256).to(dtype))
    yield Case("one product", zero, scaled(1, -10, 3), scaled(1, -10, 3))
    yield Case("K not a multiple of 16", zero, scaled(39, -4, 3), scaled(39, -4, 3))
    low, high = (-24, 12) if fp16 else (-133, 55)
    yield Case("wide", zero, scaled(96, low, high), scaled(96, low, high))
    yield Case("wide, accumulators", accumulators(-40, 20), scaled(48, -12, 8), scaled(48, -12, 8))
    low, high = (-26, -13) if fp16 else (-135, -124)
    yield Case("subnormal inputs", zero, scaled(64, low, high), scaled(64, -3, 12))
    sparse = sprinkle(scaled(64, -6, 6), (0.0, -0.0), 0.7)
    yield Case("zeros", zero, sparse, sprinkle(scaled(64, -6, 6), (0.0, -0.0), 0.7))
    yield Case("negative zeros", -zero, torch.full((SIZE, 16), -0.0, dtype=dtype), normal(16).abs().to(dtype))
    a, b = scaled(24, -8, 4), scaled(24, -8, 4)
    noise = sprinkle(torch.zeros(SIZE, 24, dtype=dtype), (2.0**-14, -(2.0**-14)), 0.2)
    yield Case("cancellation", zero, torch.cat((a, -a, noise), 1), torch.cat((b, b, normal(24).to(dtype)), 1))
    yield Case("cancels the accumulator", -(a.double() @ b.double().T).float(), a, b)
    specials = sprinkle(normal(32).to(dtype), (INF, -INF, NAN, 0.0), 0.01)
    yield Case("infinities and NaNs", zero, specials, sprinkle(normal(32).to(dtype), (INF, 0.0), 0.01))
    odd = sprinkle(normal(SIZE), (INF, -INF, NAN, 2.0**-149, -(2.0**-130), 3e38, -3e38), 0.5)
    yield Case("odd accumulators", odd, normal(16).to(dtype), sprinkle(normal(16).to(dtype), (0.0,), 0.3))
    if not fp16:
        yield from _bfloat16_cases(scaled, sprinkle, accumulators)
    else:
        yield Case("largest", zero, scaled(64, 11, 14).clamp(-65504, 65504), scaled(64, 11, 14))


def _bfloat16_cases(
    scaled: Callable[[int, int, int], Tensor],
    sprinkle: Callable[[Tensor, tuple[float, ...], float], Tensor],
    accumulators: Callable[[int, int], Tensor],
) -> Iterator[Case]:
    """Products that leave float32's range on either side."""
    zero = torch.zeros(SIZE, SIZE)
    for low, high in ((-76, -70), (-80, -72), (-86, -76), (-100, -76)):
        a, b = scaled(48, low, high), scaled(48, low, high)
        yield Case(f"tiny products, 2^{2 * low}…2^{2 * high}", zero, a, b)
        yield Case(f"tiny products and zeros, 2^{2 * low}…2^{2 * high}", zero, sprinkle(a, (0.0,), 0.6), b)
        yield Case(f"tiny products and accumulators, 2^{2 * low}", accumulators(-152, -120), a, b)
    # one product of 2^-149 less one far below: whether the small one still counts shows where E stops
    step = torch.arange(SIZE, dtype=torch.float64)[:, None]
    a = torch.cat((torch.full((SIZE, 1), 2.0**-70), -torch.exp2(-75 - step)), 1).to(torch.bfloat16)
    b = torch.tensor([[2.0**-79, 2.0**-75]]).to(torch.bfloat16).expand(SIZE, 2).contiguous()
    yield Case("exponent of zero", zero, a, b)
    yield Case(
        "exponent of zero, no zero products",
        zero,
        torch.cat([a] + [a[:, 1:]] * 14, 1),
        torch.cat([b] + [b[:, 1:]] * 14, 1),
    )
    yield Case("overflow", zero, scaled(32, 58, 63), scaled(32, 58, 64))
    yield Case("overflow of products", zero, scaled(32, 60, 120), scaled(32, 60, 120).clamp(-3e38, 3e38))
    a, b = scaled(6, 60, 110), scaled(6, 60, 110)
    yield Case("products beyond float32 that cancel", zero, torch.cat((a, -a), 1), torch.cat((b, b), 1))
    big = accumulators(120, 128).clamp(-3.4028e38, 3.4028e38)
    yield Case("overflow, accumulators", big, scaled(32, 58, 62), scaled(32, 58, 62))
    top = torch.full((SIZE, SIZE), 3.4028234663852886e38)
    yield Case("at the largest number", top, scaled(16, 45, 53), scaled(16, 45, 53))
