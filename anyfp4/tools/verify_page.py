"""The results of ``anyfp4 verify`` as a page with plots."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape

from anyfp4.tools import report, report_svg, verify_report
from anyfp4.tools.verify import Failure, Proof
from anyfp4.tools.verify_layers import OpCheck
from anyfp4.tools.verify_report import Setting


def to_html(proof: Proof, checks: Sequence[OpCheck], setting: Setting) -> str:
    """Everything as a page that loads nothing."""
    sentence, state = verify_report.verdict(proof, checks, setting)
    about = [
        ("model", setting.model),
        ("numerics", setting.numerics),
        ("dtype", setting.dtype),
        ("seed", str(setting.plan.seed) if setting.plan else "a schedule was replayed"),
        ("time", f"{proof.seconds:.0f} s"),
        *setting.environment.items(),
    ]
    sections = []
    if proof.failure is not None:
        text = "\n".join(verify_report.failure_lines(proof.failure, checks, setting))
        sections.append(("The difference", f"<pre>{escape(text)}</pre>"))
    culprit = verify_report.culprit_of(checks)
    if culprit is not None:
        sections.append(("The first op that differs", f"<pre>{escape(verify_report.culprit_text(culprit))}</pre>"))
    if missing := verify_report.gaps(proof, setting):
        sections.append(("What these trials do not show", report.bullets(missing)))
    if proof.trials:
        sections.append(("Plots", report.plots(_plots(proof))))
        groups = [(heading.capitalize(), report.table(group)) for heading, group in verify_report.rows(proof, setting)]
        sections.append(("Figures", report.side_by_side(groups)))
    if checks:
        sections.append(
            (
                "Op by op",
                report.table(verify_report.layer_rows(checks), ("op", "layers", "comparisons of a row", "result")),
            )
        )
    sections.append(("Where and what", report.table(about)))
    return report.page(f"Batch invariance of {setting.model}", sentence, state, sections)


def _plots(proof: Proof) -> list[str]:
    made = []
    if proof.failure is not None and proof.failure.series:
        made.append(_difference_plot(proof.failure))
    numbers = [float(i + 1) for i in range(len(proof.trials))]
    tokens = itertools.accumulate(float(t.compared.tokens) for t in proof.trials)
    values = itertools.accumulate(float(t.compared.logprobs) for t in proof.trials)
    return [
        *made,
        report_svg.bars("Sequences in a step", proof.seen.sequences, "sequences", "steps"),
        report_svg.bars("Tokens in a step", proof.seen.tokens, "tokens", "steps"),
        report_svg.bars("Tokens of one sequence in a step", proof.seen.chunks, "tokens", "times"),
        report_svg.lines(
            "Comparisons, all of them equal" if proof.failure is None else "Comparisons until the difference",
            {
                "tokens": list(zip(numbers, tokens, strict=True)),
                "log-probabilities": list(zip(numbers, values, strict=True)),
            },
            "trials",
            "compared so far",
        ),
    ]


def _difference_plot(failure: Failure) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for pair in failure.series:
        name = "prompt" if pair.completion is None else f"completion {pair.completion}"
        series.setdefault(name, []).append((float(pair.position), abs(pair.alone - pair.batch)))
    return report_svg.lines(
        f"Request {failure.original_difference.request} of trial {failure.trial}: log-probabilities that differ",
        series,
        "position in the sequence",
        "|alone - in the batch|",
        log_y=True,
        points_only=True,
    )
