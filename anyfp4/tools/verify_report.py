"""The results of ``anyfp4 verify``: in words and figures, and as JSON."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anyfp4.tools.schedules import Plan, Schedule
from anyfp4.tools.verify import Failure, Proof
from anyfp4.tools.verify_compare import show
from anyfp4.tools.verify_layers import OpCheck

Row = tuple[str, str]


@dataclass(frozen=True)
class Setting:
    """What was verified.

    Attributes:
        model: as the user named it.
        options: the flags of the command that choose the model's form, such as ``--numerics blackwell``.
        trials: how many were asked for.
        plan: what schedules were drawn from; None: a schedule was replayed.
        environment: the machine and the versions.
    """

    model: str
    options: tuple[str, ...]
    numerics: str
    dtype: str
    trials: int
    plan: Plan | None
    environment: Mapping[str, str]


def verdict(proof: Proof, checks: Sequence[OpCheck], setting: Setting) -> tuple[str, str]:
    """One sentence, and ``good``, ``bad`` or ``open``."""
    culprit = culprit_of(checks)
    found = []
    if culprit is not None:
        found.append(f"the op {culprit.name} depends on the other rows of its batch")
    if proof.failure is not None:
        found.append(f"in trial {proof.failure.trial} a request is not what it is alone")
    if found:
        return "NOT batch-invariant: " + "; ".join(found), "bad"
    parts = []
    if proof.trials:
        c = proof.compared
        parts.append(
            f"{c.requests:,} requests, {c.tokens:,} tokens and {c.logprobs:,} log-probabilities in "
            f"{len(proof.trials)} schedules are bit for bit what they are alone"
        )
    if checks:
        rows = sum(check.rows for check in checks)
        parts.append(f"{len(checks)} ops give the same bits in {rows:,} comparisons of a row")
    if proof.interrupted:
        return "interrupted; so far " + ("; ".join(parts) or "nothing was compared"), "open"
    return "; ".join(parts) or "nothing was compared", "good" if parts else "open"


def culprit_of(checks: Sequence[OpCheck]) -> OpCheck | None:
    """The first op that differs."""
    return next((c for c in checks if c.difference is not None), None)


def gaps(proof: Proof, setting: Setting) -> list[str]:
    """What these trials did not show, because it did not happen in them."""
    if not proof.trials:
        return []
    seen, found = proof.seen, []
    if max(seen.sequences, default=0) < 2:
        found.append("no step held two sequences: nothing is shown about batches")
    if not seen.starts:
        found.append("no sequence had its second part in a later step: nothing is shown about chunks or decoding")
    if not seen.prefix_hit_tokens:
        found.append("no prefix-cache hit happened: nothing is shown about the prefix cache")
    if not seen.preemptions:
        found.append("no sequence was preempted: nothing is shown about recomputation")
    if not seen.steps_ahead:
        found.append("no step was launched before tokens were read: nothing is shown about async scheduling")
    if not seen.aborted:
        found.append("no request was aborted beside others")
    if len({t.schedule.threads for t in proof.trials}) < 2:
        found.append("the number of threads was never changed")
    return found


def rows(proof: Proof, setting: Setting) -> list[tuple[str, list[Row]]]:
    """The table: groups of (what, figures)."""
    c, seen = proof.compared, proof.seen
    schedules = [t.schedule for t in proof.trials]
    compared = [
        ("trials", f"{len(proof.trials)} of {setting.trials}"),
        ("requests in them", f"{c.requests:,} ({proof.distinct_requests:,} different ones, each also run alone)"),
        ("completions", f"{c.completions:,}"),
        ("tokens", f"{c.tokens:,}"),
        ("log-probabilities", f"{c.logprobs:,}"),
        ("finish reasons", f"{c.finish_reasons:,}"),
    ]
    happened = [
        ("steps", f"{seen.steps:,}"),
        ("sequences in a step", _spread(seen.sequences)),
        ("tokens in a step", _spread(seen.tokens)),
        ("tokens of one sequence in a step", _spread(seen.chunks)),
        ("sequences continued in a later step", f"{seen.starts:,} times"),
        ("prefix-cache hits", f"{seen.prefix_hit_tokens:,} of {seen.prefix_query_tokens:,} prompt tokens"),
        ("preemptions", f"{seen.preemptions:,}"),
        ("requests aborted", f"{seen.aborted:,}"),
    ]
    varied = [
        ("requests in a schedule", _values(len(s.arrivals) for s in schedules)),
        ("arrivals", f"{sum(len({a.at for a in s.arrivals}) > 1 for s in schedules)} schedules with several times"),
        ("tokens of a step at most", _values(s.max_step_tokens for s in schedules)),
        ("sequences of a step at most", _values(s.max_num_seqs for s in schedules)),
        ("block size", _values(s.block_size for s in schedules)),
        ("small KV caches", f"{sum(s.cache_blocks is not None for s in schedules)} schedules"),
        (
            "prefix cache",
            f"{sum(s.prefix_caching for s in schedules)} schedules with, "
            f"{sum(not s.prefix_caching for s in schedules)} without; "
            f"emptied meanwhile in {sum(bool(s.resets) for s in schedules)}",
        ),
        ("threads", _values(s.threads for s in schedules)),
        (
            "async scheduling",
            f"{sum(s.async_scheduling for s in schedules)} schedules with, "
            f"{sum(not s.async_scheduling for s in schedules)} without",
        ),
    ]
    if seen.steps_ahead:
        happened.append(("steps launched before tokens were read", f"{seen.steps_ahead:,}"))
    if seen.graph_steps:
        happened.append(("steps that ran as CUDA graphs", f"{seen.graph_steps:,}"))
        without = sum(not s.cuda_graphs for s in schedules)
        varied.append(("CUDA graphs", f"{len(schedules) - without} schedules with, {without} without"))
    return [("compared, bit by bit", compared), ("what the engine did", happened), ("what was varied", varied)]


def _values(values: Any) -> str:
    counts = Counter(values)
    return ", ".join(f"{value or 'default'} ({count}×)" for value, count in sorted(counts.items())) or "nothing"


def _spread(counts: Mapping[int, int]) -> str:
    if not counts:
        return "none"
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}, {len(counts)} different numbers"


def layer_rows(checks: Sequence[OpCheck]) -> list[tuple[str, str, str, str]]:
    """A row for each kind of op: name, layers, comparisons, result."""
    grouped: dict[str, list[OpCheck]] = {}
    for check in checks:
        grouped.setdefault(check.op, []).append(check)
    found = []
    for op, own in grouped.items():
        bad = [c for c in own if c.difference is not None]
        where = "" if bad and bad[0].layer is None else ", first in layer " + str(bad[0].layer) if bad else ""
        result = f"DIFFERS in {len(bad)} of {len(own)}{where}" if bad else "same bits"
        layers = str(len(own)) if own[0].layer is not None else ""
        found.append((op, layers, f"{sum(c.rows for c in own):,}", result))
    return found


def culprit_text(check: OpCheck) -> str:
    """Which element of the first differing op, and how."""
    d = check.difference
    assert d is not None
    return (
        f"first culprit: {check.name}, row {d.row}, column {d.column}: {d.batch!r} ({d.batch_bits}) in the batch of "
        f"all rows, {d.other!r} ({d.other_bits}) with {d.variant}"
    )


def failure_lines(failure: Failure, checks: Sequence[OpCheck], setting: Setting) -> list[str]:
    """The finding in words: first difference, smallest schedule, commands."""
    d, smallest = failure.difference, failure.smallest
    where = "prompt" if d.completion is None else f"completion {d.completion}"
    lines = [
        f"first difference: request {d.request} ({where}), position {d.position}, {d.what}",
        f"  alone:        {show(d.alone)}",
        f"  in the batch: {show(d.batch)}",
    ]
    count = len(smallest.arrivals)
    if not failure.repeatable:
        lines.append(
            f"the same schedule of {count} requests, run again, showed no difference: the model does not repeat itself"
        )
        if setting.plan is not None:
            lines.append(f"try again: {_command(setting, '--trials', str(failure.trial + 1))}")
        return lines
    before = len(failure.original.arrivals)
    lines.append(f"smallest schedule found: {count} request{'s' * (count > 1)} (of {before} in trial {failure.trial})")
    lines += [f"  {line}" for line in schedule_lines(smallest)]
    lines.append("run it again:")
    lines.append(f"  echo {shlex.quote(smallest.to_json())} | {_command(setting, '--replay', '-')}")
    if not checks:
        lines += ["name the op:", f"  {_command(setting, '--layers', '--trials', '0')}"]
    return lines


def schedule_lines(schedule: Schedule) -> list[str]:
    """A schedule in words, one line for the engine and one for each request."""
    s = schedule
    cache = "default cache" if s.cache_blocks is None else f"{s.cache_blocks} cache blocks"
    lines = [
        f"engine: max_step_tokens {s.max_step_tokens}, max_num_seqs {s.max_num_seqs}, block_size {s.block_size}, "
        f"{cache}, prefix cache {'on' if s.prefix_caching else 'off'}, threads {s.threads or 'default'}, "
        f"CUDA graphs {'where possible' if s.cuda_graphs else 'off'}, "
        f"async scheduling {'on' if s.async_scheduling else 'off'}"
    ]
    if s.resets:
        lines.append(f"prefix cache emptied before step {', '.join(map(str, s.resets))}")
    for i, arrival in enumerate(s.arrivals):
        request = arrival.request
        given = ", ".join(f"{k}={v}" for k, v in request.to_dict()["params"].items() if k != "logit_bias")
        left = "" if arrival.abort_after is None else f", aborted after {arrival.abort_after} steps"
        lines.append(f"request {i}: {len(request.tokens)} tokens, arrives at step {arrival.at}{left}; {given}")
    return lines


def _command(setting: Setting, *words: str) -> str:
    seed = () if setting.plan is None or "--replay" in words else ("--seed", str(setting.plan.seed))
    return shlex.join(["anyfp4", "verify", setting.model, *setting.options, *seed, *words])


def to_dict(proof: Proof, checks: Sequence[OpCheck], setting: Setting) -> dict[str, Any]:
    """Everything as JSON."""
    sentence, state = verdict(proof, checks, setting)
    failure = proof.failure
    return {
        "verdict": {"good": "invariant", "bad": "not invariant", "open": "interrupted"}[state],
        "summary": sentence,
        "model": setting.model,
        "numerics": setting.numerics,
        "dtype": setting.dtype,
        "plan": None if setting.plan is None else dataclasses.asdict(setting.plan),
        "environment": dict(setting.environment),
        "trials": len(proof.trials),
        "trials_wanted": setting.trials,
        "compared": dataclasses.asdict(proof.compared),
        "distinct_requests": proof.distinct_requests,
        "seen": {k: dict(sorted(v.items())) if isinstance(v, Counter) else v for k, v in vars(proof.seen).items()},
        "not_shown": gaps(proof, setting),
        "seconds": proof.seconds,
        "failure": None
        if failure is None
        else {
            "trial": failure.trial,
            **failure.difference.to_dict(),
            "repeatable": failure.repeatable,
            "schedule": failure.smallest.to_json(),
            "original_requests": len(failure.original.arrivals),
        },
        "layers": [dataclasses.asdict(c) | {"name": c.name} for c in checks],
    }
