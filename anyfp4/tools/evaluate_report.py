"""The results of ``anyfp4 eval``: as rows of a table, as JSON, as plots, as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anyfp4.tools import report, report_svg
from anyfp4.tools.evaluate import Comparison, Score


@dataclass(frozen=True)
class Subject:
    """One of the models, as the user named it."""

    model: str
    numerics: str
    dtype: str
    backend: str

    @property
    def name(self) -> str:
        """One line that tells it from the other."""
        return f"{self.model} ({self.numerics}, {self.dtype}, {self.backend})"


@dataclass(frozen=True)
class Text:
    """The text that was read.

    Attributes:
        file: its name.
        tokens: tokens that were read.
        all_tokens: tokens of the whole file.
        all_bytes: bytes of the whole file in UTF-8.
        context: tokens of a window.
    """

    file: str
    tokens: int
    all_tokens: int
    all_bytes: int
    context: int


@dataclass(frozen=True)
class Evaluation:
    """Everything that ``eval`` found.

    Attributes:
        other: the reference; None if nothing was compared.
        layer_tokens: tokens that the error of each layer was measured on.
        environment: the machine and the versions.
    """

    subject: Subject
    score: Score
    text: Text
    other: Subject | None
    comparison: Comparison | None
    layer_tokens: int
    environment: Mapping[str, str]

    def bits_per_byte(self, score: Score) -> float:
        """Bits that a byte of the text costs under a model."""
        return score.loss / math.log(2) * self.text.all_tokens / self.text.all_bytes


def score_rows(e: Evaluation) -> list[tuple[str, ...]]:
    """(what, the model's figure, the reference's figure if there is one)."""
    scores = [e.score] if e.comparison is None else [e.score, e.comparison.reference]
    return [
        ("perplexity", *(f"{s.perplexity:.4f}" for s in scores)),
        ("mean loss (nats)", *(f"{s.loss:.6f}" for s in scores)),
        ("bits per byte", *(f"{e.bits_per_byte(s):.4f}" for s in scores)),
        ("predictions", *(f"{len(s.losses):,}" for s in scores)),
        ("tokens/s", *(f"{e.text.tokens / s.seconds:,.1f}" for s in scores)),
    ]


def comparison_rows(e: Evaluation) -> list[tuple[str, str]]:
    """What the comparison found."""
    c = e.comparison
    if c is None:
        return []
    rows = [
        ("KL divergence, mean (nats)", f"{c.kl_mean:.6g}"),
        ("KL divergence, 99th percentile", f"{c.kl_p99:.6g}"),
        ("KL divergence, maximum", f"{c.kl_max:.6g}"),
        ("same most likely token", f"{c.agreement:.2%}"),
    ]
    if c.layer_errors is None:
        rows.append(("error of each layer", "not measured: the models differ in depth or width"))
    else:
        rows.append((f"error after the last layer ({e.layer_tokens} tokens)", f"{c.layer_errors[-1]:.4g}"))
    return rows


def text_row(e: Evaluation) -> str:
    """The text in one line."""
    t = e.text
    part = "" if t.tokens == t.all_tokens else f" (of {t.all_tokens:,})"
    return f"{t.file}: {t.tokens:,} tokens{part} in windows of {t.context:,}"


def to_dict(e: Evaluation) -> dict[str, Any]:
    """Everything as JSON; divergences are summed up."""
    c = e.comparison
    return {
        "model": vars(e.subject) | _score(e, e.score),
        "text": vars(e.text),
        "against": None if c is None or e.other is None else vars(e.other) | _score(e, c.reference),
        "comparison": None
        if c is None
        else {
            "kl_mean": c.kl_mean,
            "kl_p99": c.kl_p99,
            "kl_max": c.kl_max,
            "top1_agreement": c.agreement,
            "layer_tokens": e.layer_tokens,
            "layer_errors": None if c.layer_errors is None else list(c.layer_errors),
        },
        "environment": dict(e.environment),
    }


def _score(e: Evaluation, score: Score) -> dict[str, float]:
    return {
        "perplexity": score.perplexity,
        "loss": score.loss,
        "bits_per_byte": e.bits_per_byte(score),
        "predictions": len(score.losses),
        "seconds": score.seconds,
        "tokens_per_second": e.text.tokens / score.seconds,
    }


def plots(e: Evaluation) -> list[str]:
    """SVG plots of what was found."""
    scores = {e.subject.name: e.score}
    c = e.comparison
    if c is not None and e.other is not None:
        scores = {"model": e.score, "reference": c.reference}
    made = [
        report_svg.lines(
            "Perplexity of each window",
            {
                name: [(i + 1.0, math.exp(loss)) for i, loss in enumerate(score.window_losses.tolist())]
                for name, score in scores.items()
            },
            f"window of {e.text.context:,} tokens",
            "perplexity",
        )
    ]
    if c is None:
        return made
    made.append(report_svg.histogram("KL divergence of each prediction", c.kl.tolist(), "KL (nats)", "predictions"))
    if c.layer_errors is not None:
        made.append(
            report_svg.lines(
                "Relative error of the hidden states",
                {"error": [(float(i), error) for i, error in enumerate(c.layer_errors)]},
                "layers done",
                "relative error",
                log_y=True,
            )
        )
    return made


def to_html(e: Evaluation) -> str:
    """Everything as a page that loads nothing."""
    sentence = f"perplexity {e.score.perplexity:.4f}"
    header = ["", e.subject.name]
    if e.comparison is not None and e.other is not None:
        sentence += (
            f" against {e.comparison.reference.perplexity:.4f}, mean KL divergence {e.comparison.kl_mean:.4g} nats, "
            f"same most likely token in {e.comparison.agreement:.2%}"
        )
        header.append(f"reference: {e.other.name}")
    sections = [
        ("Plots", report.plots(plots(e))),
        ("Scores", report.table(score_rows(e), header)),
    ]
    if rows := comparison_rows(e):
        sections.append(("How far apart", report.table(rows)))
    if e.comparison is not None and e.comparison.layer_errors is not None:
        errors = [(f"layer {i - 1}" if i else "embedding", f"{x:.6g}") for i, x in enumerate(e.comparison.layer_errors)]
        sections.append(
            ("Relative error of the hidden states", report.folded("after each layer", report.table(errors)))
        )
    sections.append(("Where and what", report.table([("text", text_row(e)), *e.environment.items()])))
    return report.page(f"Evaluation of {e.subject.model}", sentence, "good", sections)
