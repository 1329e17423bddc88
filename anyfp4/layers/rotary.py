"""Tables of cosines and sines for rotary embedding, with the scalings that published models use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anyfp4.errors import UnsupportedError


def cos_sin_table(head_dim: int, positions: int, kind: str, theta: float, parameters: dict[str, float]) -> Tensor:
    """cos and sin of position × frequency, in float64, rounded once.

    Frequencies: ``default`` theta^(−2j/D); ``linear`` those over the factor (Chen et al., arXiv 2306.15595);
    ``llama3`` as in the Llama 3.1 release; ``yarn`` as in Peng et al., arXiv 2309.00071, with its scaling of the
    attention folded into both tables.

    Args:
        head_dim: D.
        positions: P, how many positions.
        kind: default, linear, llama3 or yarn.
        theta: base of the frequencies.
        parameters: of the kind, under the names that config files use.

    Returns:
        float32 [P, 2, D/2].

    Raises:
        UnsupportedError: unknown kind.
    """
    # Python's own pow, cos and sin: an element's bits do not depend on where it stands in a vector
    frequencies = [theta ** (-2.0 * j / head_dim) for j in range(head_dim // 2)]
    scale = 1.0
    if kind == "linear":
        frequencies = [f / parameters["factor"] for f in frequencies]
    elif kind == "llama3":
        frequencies = [_llama3(f, parameters) for f in frequencies]
    elif kind == "yarn":
        frequencies = _yarn(frequencies, head_dim, theta, parameters)
        scale = _yarn_scale(parameters)
    elif kind != "default":
        raise UnsupportedError(f"rope_type {kind!r} is not supported")
    # transformers keeps frequencies in float32, and models were trained with those
    rounded = torch.tensor(frequencies, dtype=torch.float64).to(torch.float32).to(torch.float64).tolist()
    cos, sin = math.cos, math.sin
    table = torch.empty((positions, 2, head_dim // 2), dtype=torch.float32)
    for j, f in enumerate(rounded):
        # the angle is a float32 product in transformers; a float64 one differs by up to 2⁻²⁵ of the angle
        angles = (torch.arange(positions, dtype=torch.float32) * torch.tensor(f, dtype=torch.float32)).tolist()
        table[:, 0, j] = torch.tensor([cos(a) * scale for a in angles], dtype=torch.float64)
        table[:, 1, j] = torch.tensor([sin(a) * scale for a in angles], dtype=torch.float64)
    return table


def _llama3(frequency: float, p: dict[str, float]) -> float:
    wavelength = 2 * math.pi / frequency
    original = p["original_max_position_embeddings"]
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / p["factor"]
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / p["factor"] + smooth * frequency


def _yarn(frequencies: list[float], head_dim: int, theta: float, p: dict[str, float]) -> list[float]:
    original = p["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(p.get("beta_fast") or 32.0), dimension(p.get("beta_slow") or 1.0)
    if p.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = (high - low) or 0.001
    result = []
    for j, f in enumerate(frequencies):
        ramp = min(max((j - low) / span, 0.0), 1.0)  # 0: keep the frequency, 1: divide it
        result.append(f / p["factor"] * ramp + f * (1 - ramp))
    return result


def _yarn_scale(p: dict[str, float]) -> float:
    if p.get("attention_factor"):
        return p["attention_factor"]

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(p["factor"]) + 1.0 if p["factor"] > 1 else 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return magnitude(p["mscale"]) / magnitude(p["mscale_all_dim"])
    return magnitude(1.0)
