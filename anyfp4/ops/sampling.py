"""Log-probabilities, and choosing a token, the same for a row whatever rows stand beside it.

Random numbers come from a counter: Philox4x32-10 (Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, SC'11)
keyed by the request's seed, at the position of the token. Probabilities are turned into 64-bit integers before they are
summed, so that sums are exact and no order of summation can show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.ops import elementary, exact

#: the most likely token's weight; a token 2⁴¹ times less likely weighs nothing
_WEIGHT_ONE = 1 << 40
_MASK32, _MASK64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Choice:
    """How one row's token is chosen.

    Attributes:
        temperature: 0 takes the most likely token (the lowest id among equals).
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the most likely tokens that together have at least this probability.
        min_p: only tokens at least this fraction as likely as the most likely one.
        seed: 64-bit key of the random numbers.
        position: counter of the random numbers: the absolute position of the token to be chosen.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0


def log_softmax(logits: Tensor) -> Tensor:
    """(x − max) − ln Σ e^(x − max), the sum exact and rounded once: float32 [M, V] to float32 [M, V].

    Raises:
        InvalidArgumentError: ``logits`` is not float32.
    """
    if logits.dtype != torch.float32:
        raise InvalidArgumentError(f"logits must be float32, got {logits.dtype}")
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return shifted - elementary.log(exact.total(elementary.exp(shifted))).unsqueeze(-1)


def sample(logits: Tensor, choices: list[Choice]) -> list[int]:
    """Chooses a token for every row.

    Filters apply in the order top_k, top_p, min_p, on the probabilities after the temperature.

    Args:
        logits: float32 [M, V].
        choices: one for each row.

    Returns:
        M token ids.

    Raises:
        InvalidArgumentError: wrong dtype or count, or a row with a NaN.
    """
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.shape[0] != len(choices):
        raise InvalidArgumentError(
            f"logits must be float32 [{len(choices)}, V], got {logits.dtype} {list(logits.shape)}"
        )
    tokens = []
    for index, (row, choice) in enumerate(zip(logits, choices, strict=True)):
        best, token = _first_maximum(row)
        if math.isnan(best):
            raise InvalidArgumentError(f"the logits of row {index} hold a NaN: the model or its input is broken")
        tokens.append(token if choice.temperature == 0 else _sample_row(row, best, choice))
    return tokens


def _first_maximum(row: Tensor) -> tuple[float, int]:
    """The largest element and its first index; NaN if there is one."""
    if row.device.type == "cpu":
        # numpy stays on this thread: torch would wake its pool for a vocabulary, and 10 µs become milliseconds
        token = int(np.argmax(row.numpy()))
        return float(row[token]), token
    best, index = row.max(dim=-1)
    return float(best), int(index)


def _sample_row(logits: Tensor, best: float, choice: Choice) -> int:
    temperature = torch.tensor(choice.temperature, dtype=torch.float32, device=logits.device)
    probability = elementary.exp((logits - best) / temperature)  # of the most likely token: 1
    weight = torch.round(probability.to(torch.float64) * _WEIGHT_ONE).to(torch.int64)
    smallest = int(choice.min_p * _WEIGHT_ONE) if choice.min_p > 0 else 1
    if choice.top_k or choice.top_p < 1:
        # stable: among equals the lower id comes first
        order = torch.sort(weight, descending=True, stable=True)
        ids, weight = order.indices, order.values
        if choice.top_k:
            ids, weight = ids[: choice.top_k], weight[: choice.top_k]
        if choice.top_p < 1:
            before = weight.cumsum(0) - weight
            keep = before < int(choice.top_p * int(weight.sum()))
            keep[0] = True
            ids, weight = ids[keep], weight[keep]
    else:
        ids = torch.arange(weight.shape[0], device=weight.device)
    weight = torch.where(weight >= smallest, weight, torch.zeros_like(weight))
    cumulative = weight.cumsum(0)
    target = (uniform64(choice.seed, choice.position) * int(cumulative[-1])) >> 64
    return int(ids[int(torch.searchsorted(cumulative, target, right=True))])


def uniform64(seed: int, position: int) -> int:
    """A random integer in 0…2⁶⁴−1 for (seed, position)."""
    x = philox4x32((position & _MASK32, (position >> 32) & _MASK32, 0, 0), (seed & _MASK32, (seed >> 32) & _MASK32))
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


def fold_seed(seed: int, stream: int) -> int:
    """A seed for another stream of random numbers under the same seed (the n-th completion of one request)."""
    if stream == 0:
        return seed & _MASK64
    x = philox4x32((stream & _MASK32, stream >> 32, 1, 0), (seed & _MASK32, (seed >> 32) & _MASK32))
    return x[0] | (x[1] << 32)
