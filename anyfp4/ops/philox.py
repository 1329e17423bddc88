"""Random numbers from a counter: Philox4x32-10 (Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, SC'11).

A number depends on (seed, position) alone, so it does not matter who draws it, when, or beside what else.
"""

from __future__ import annotations

_MASK32, _MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


def uniform64(seed: int, position: int) -> int:
    """A random integer in 0…2⁶⁴−1 for (seed, position)."""
    x = philox4x32((position & _MASK32, (position >> 32) & _MASK32, 0, 0), (seed & _MASK32, (seed >> 32) & _MASK32))
    return x[0] | (x[1] << 32)


def fold_seed(seed: int, stream: int) -> int:
    """A seed for another stream of random numbers under the same seed (the n-th completion of one request)."""
    if stream == 0:
        return seed & _MASK64
    x = philox4x32((stream & _MASK32, stream >> 32, 1, 0), (seed & _MASK32, (seed >> 32) & _MASK32))
    return x[0] | (x[1] << 32)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit integers for a counter of four and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3
