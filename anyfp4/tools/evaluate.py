"""``anyfp4 eval``: perplexity of a text, and how far two models' predictions lie apart.

docs/eval.md has the formulas.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anyfp4.errors import InvalidArgumentError
from anyfp4.models.decoder import Decoder
from anyfp4.tools.evaluate_score import Reader, divergence, token_losses, windows

DEFAULT_CONTEXT = 1024
#: called with (tokens done, tokens in all)
Progress = Callable[[int, int], None]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Attributes:
        losses: −ln p of each predicted token, in order.
        window_losses: the mean loss of each window.
        seconds: in the model.
    """

    losses: Numbers
    window_losses: Numbers
    seconds: float

    @property
    def loss(self) -> float:
        """The mean loss in nats."""
        return math.fsum(self.losses) / len(self.losses)

    @property
    def perplexity(self) -> float:
        """e to the mean loss."""
        return math.exp(self.loss)


@dataclass(frozen=True)
class Comparison:
    """How far a model's predictions lie from a reference's.

    Attributes:
        reference: how well the reference predicts the same text.
        kl: KL(reference ‖ model) of each predicted token, in nats.
        agreement: share of predictions where both have the same most likely token.
        layer_errors: of the residual stream after the embedding, then after each layer; None if the two have
            different shapes.
    """

    reference: Score
    kl: Numbers
    agreement: float
    layer_errors: tuple[float, ...] | None

    @property
    def kl_mean(self) -> float:
        """The mean divergence."""
        return math.fsum(self.kl) / len(self.kl)

    @property
    def kl_p99(self) -> float:
        """The 99th percentile, linear between the two values next to it."""
        return float(np.quantile(self.kl, 0.99))

    @property
    def kl_max(self) -> float:
        """The largest divergence."""
        return float(self.kl.max())


@dataclass
class _Reading:
    """One model on its way through the text."""

    reader: Reader
    losses: list[Numbers] = field(default_factory=list)
    window_losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def tiles(self, piece: Sequence[int]) -> Iterator[Tensor]:
        """Scores a window; yields the logits of its predictions, a tile at a time."""
        started, own = time.perf_counter(), []
        hidden = self.reader.hidden(piece)[:-1]  # nothing follows the last token
        for rows, logits in self.reader.logits(hidden):
            losses = token_losses(self.reader.model, logits, piece[rows.start + 1 : rows.stop + 1])
            own.append(losses.cpu().numpy().astype(np.float64))
            self.seconds += time.perf_counter() - started
            yield logits
            started = time.perf_counter()
        self.losses += own
        self.window_losses.append(float(np.concatenate(own).mean()))

    def score(self) -> Score:
        """The result so far."""
        return Score(np.concatenate(self.losses), np.array(self.window_losses), self.seconds)


def evaluate(
    model: Decoder, tokens: Sequence[int], *, context: int = DEFAULT_CONTEXT, progress: Progress | None = None
) -> Score:
    """Scores a text.

    Args:
        model: the decoder.
        tokens: the text.
        context: tokens of a window; each begins anew, and its first token has no prediction.
        progress: called after every window.

    Raises:
        InvalidArgumentError: fewer than two tokens, windows longer than the model's positions, or a NaN in the logits.
    """
    reading = _Reading(Reader(model, context))
    _read([reading], tokens, context, None, progress)
    return reading.score()


def compare(
    model: Decoder,
    reference: Decoder,
    tokens: Sequence[int],
    *,
    context: int = DEFAULT_CONTEXT,
    layer_tokens: int = 256,
    progress: Progress | None = None,
) -> tuple[Score, Comparison]:
    """Scores a text with two models of the same vocabulary, and compares their predictions.

    Args:
        model: the one in question.
        reference: what it is compared with.
        tokens: the text.
        context: tokens of a window.
        layer_tokens: the first so many tokens, a window at most, are used for the error of each layer.
        progress: called after every window.

    Raises:
        InvalidArgumentError: as :func:`evaluate`, or the vocabularies differ in size.
    """
    sizes = model.config.vocab_size, reference.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InvalidArgumentError(f"the models have {sizes[0]} and {sizes[1]} logits: they cannot be compared")
    readings = [_Reading(Reader(model, context)), _Reading(Reader(reference, context))]
    kl: list[Tensor] = []
    same: list[Tensor] = []

    def meet(own: Tensor, other: Tensor) -> None:
        divergences, agree = divergence(other, own)
        kl.append(divergences)
        same.append(agree)

    _read(readings, tokens, context, meet, progress)
    agreement = float(torch.cat(same).to(torch.float64).mean())
    errors = layer_errors(readings[0].reader, readings[1].reader, tokens[: min(layer_tokens, context)])
    return readings[0].score(), Comparison(
        readings[1].score(), torch.cat(kl).cpu().numpy(), agreement, None if errors is None else tuple(errors)
    )


def layer_errors(model: Reader, reference: Reader, tokens: Sequence[int]) -> list[float] | None:
    """‖h − h_ref‖ / ‖h_ref‖ of the residual stream h over all tokens: after the embedding, then after each layer.

    Returns:
        None if the models differ in depth or width.
    """
    a, b = model.model.config, reference.model.config
    if (a.num_layers, a.hidden_size) != (b.num_layers, b.hidden_size):
        return None
    found = []
    with model.model.ops.quiet():
        for own, other in zip(model.states(tokens), reference.states(tokens), strict=True):
            h, ref = own.to(torch.float64), other.to(torch.float64)
            found.append(float((h - ref).norm() / ref.norm()))
    return found


def _read(
    readings: Sequence[_Reading],
    tokens: Sequence[int],
    context: int,
    meet: Callable[..., None] | None,
    progress: Progress | None,
) -> None:
    """Takes all models through the text, window by window and tile by tile, so that no logits pile up."""
    if len(tokens) < 2:
        raise InvalidArgumentError(
            f"the text has {len(tokens)} tokens; at least 2 are needed, one to predict the other"
        )
    for window in windows(len(tokens), context):
        piece = tokens[window.start : window.stop]
        for logits in zip(*(reading.tiles(piece) for reading in readings), strict=True):
            if meet is not None:
                meet(*logits)
        if progress is not None:
            progress(window.stop, len(tokens))
