"""``anyfp4 eval``: loads one model or two, reads the text under a progress bar, prints the figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from rich.table import Table
from rich.text import Text as RichText

from anyfp4 import envs
from anyfp4.engine.config import EngineConfig
from anyfp4.engine.kv_cache import UNUSED_BYTES
from anyfp4.entrypoints.console import byte_progress, stderr, stdout, step_progress
from anyfp4.errors import InvalidArgumentError
from anyfp4.llm import LLM
from anyfp4.tools import evaluate_report, report, report_svg
from anyfp4.tools.evaluate import DEFAULT_CONTEXT, compare, evaluate
from anyfp4.tools.evaluate_report import Evaluation, Subject, Text


@dataclass(frozen=True)
class Options:
    """The flags of the command; see its help."""

    model: str
    text: Path
    revision: str | None = None
    numerics: str | None = None
    backend: str | None = None
    device: str | None = None
    dtype: str = "auto"
    context: int | None = None
    max_tokens: int | None = None
    against: str | None = None
    against_numerics: str | None = None
    against_dtype: str | None = None
    against_backend: str | None = None
    layer_tokens: int = 256
    plot: Path | None = None
    report: Path | None = None
    as_json: bool = False

    @property
    def compares(self) -> bool:
        """Whether there is a reference."""
        return any((self.against, self.against_numerics, self.against_dtype, self.against_backend))


def run(options: Options) -> None:
    """Runs the command.

    Raises:
        AnyFP4Error: a wrong flag or file, or models that cannot be loaded or compared. Flags are checked first.
    """
    _check(options)
    text = _read_text(options.text)
    llm = _load(options.model, options, options.numerics, options.dtype, options.backend, options.revision)
    tokens = llm.tokenizer.encode(text)
    other = _load_reference(options)
    if other is not None:
        _check_same_tokens(tokens, other.tokenizer.encode(text), options)
    everything, bytes_in_all = len(tokens), len(text.encode())
    tokens = tokens[: options.max_tokens]
    if len(tokens) < 2:
        raise InvalidArgumentError(f"--text {options.text}: {len(tokens)} tokens; at least 2 are needed")
    context = _context(options, [llm] if other is None else [llm, other])
    comparison = None
    with step_progress("reading", "tokens") as advance:
        if other is None:
            score = evaluate(llm.engine.model, tokens, context=context, progress=advance)
        else:
            score, comparison = compare(
                llm.engine.model,
                other.engine.model,
                tokens,
                context=context,
                layer_tokens=options.layer_tokens,
                progress=advance,
            )
    found = Evaluation(
        subject=_subject(llm, options.numerics),
        score=score,
        text=Text(str(options.text), len(tokens), everything, bytes_in_all, context),
        other=None if other is None else _subject(other, options.against_numerics or options.numerics),
        comparison=comparison,
        layer_tokens=min(options.layer_tokens, context, len(tokens)),
        environment=report.environment(llm.engine.model),
    )
    _show(found, options)


def _check(options: Options) -> None:
    for flag, value, least in (
        ("--context", options.context, 2),
        ("--max-tokens", options.max_tokens, 2),
        ("--layer-tokens", options.layer_tokens, 1),
    ):
        if value is not None and value < least:
            raise InvalidArgumentError(f"{flag} must be {least} or more, got {value}")
    report.check_output(options.plot, "--plot", ".svg")
    report.check_output(options.report, "--report", ".html")


def _read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"--text {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"--text {file}: not UTF-8: {error}") from error
    if not text:
        raise InvalidArgumentError(f"--text {file}: the file is empty")
    return text


def _load(
    model: str, options: Options, numerics: str | None, dtype: str, backend: str | None, revision: str | None
) -> LLM:
    with byte_progress(f"loading {model}") as progress:
        return LLM(
            model,
            revision=revision,
            numerics=numerics,
            backend=backend,
            device=options.device,
            dtype=dtype,
            # windows run past the engine, on a cache of their own
            config=EngineConfig(max_num_seqs=1, kv_cache_bytes=UNUSED_BYTES),
            progress=progress,
        )


def _load_reference(options: Options) -> LLM | None:
    """The model to compare with: what --against says, in all else like the first."""
    if not options.compares:
        return None
    return _load(
        options.against or options.model,
        options,
        options.against_numerics or options.numerics,
        options.against_dtype or options.dtype,
        options.against_backend or options.backend,
        options.revision if options.against is None else None,
    )


def _check_same_tokens(own: Sequence[int], other: Sequence[int], options: Options) -> None:
    for i, (a, b) in enumerate(zip_longest(own, other)):
        if a != b:
            raise InvalidArgumentError(
                f"--against {options.against}: its tokenizer reads the text differently (token {i} is {b}, not {a}); "
                "models are compared token by token, so both need the same tokenizer"
            )


def _context(options: Options, llms: Sequence[LLM]) -> int:
    limit = min(llm.engine.model.cos_sin.shape[0] for llm in llms)
    if options.context is not None and options.context > limit:
        raise InvalidArgumentError(f"--context {options.context}: the model has {limit} positions")
    return options.context or min(DEFAULT_CONTEXT, limit)


def _subject(llm: LLM, numerics: str | None) -> Subject:
    model = llm.engine.model
    dtype = str(model.config.dtype).removeprefix("torch.")
    return Subject(llm.model, numerics or envs.read().numerics, dtype, model.ops.name)


def _show(e: Evaluation, options: Options) -> None:
    if options.as_json:
        print(json.dumps(evaluate_report.to_dict(e), indent=2))
    else:
        stdout.print(RichText(evaluate_report.text_row(e)), soft_wrap=True)
        table = Table("")
        table.add_column(RichText(e.subject.name))
        if e.other is not None:
            table.add_column(RichText(f"reference: {e.other.name}"))
        for row in evaluate_report.score_rows(e):
            table.add_row(*row)
        stdout.print(table)
        if rows := evaluate_report.comparison_rows(e):
            table = Table("how far apart", "")
            for row in rows:
                table.add_row(*row)
            stdout.print(table)
    if options.plot is not None:
        report.write(options.plot, report_svg.stack(evaluate_report.plots(e)), "--plot")
    if options.report is not None:
        report.write(options.report, evaluate_report.to_html(e), "--report")
    for path in (options.plot, options.report):
        if path is not None:
            stderr.print(f"written: {path}", highlight=False, soft_wrap=True)
