"""``anyfp4 verify``: loads the model, runs the trials under a progress bar, prints what was found."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from anyfp4 import envs
from anyfp4.engine.config import EngineConfig
from anyfp4.engine.kv_cache import UNUSED_BYTES
from anyfp4.entrypoints.console import byte_progress, stderr, stdout, step_progress
from anyfp4.errors import InvalidArgumentError
from anyfp4.llm import LLM
from anyfp4.models.decoder import Decoder
from anyfp4.tools import report, verify_page, verify_report
from anyfp4.tools.schedules import Plan, Schedule, from_json
from anyfp4.tools.verify import Proof, Verifier, plan_for, verify
from anyfp4.tools.verify_layers import OpCheck, check_layers
from anyfp4.tools.verify_report import Setting
from anyfp4.tools.verify_run import default_threads

EXIT_EQUAL, EXIT_DIFFERENT, EXIT_INTERRUPTED = 0, 1, 130
_COLORS = {"good": "bold green", "bad": "bold red", "open": "bold yellow"}


@dataclass(frozen=True)
class Options:
    """The flags of the command; see its help."""

    model: str
    revision: str | None = None
    numerics: str | None = None
    backend: str | None = None
    device: str | None = None
    dtype: str = "auto"
    trials: int = 16
    batch_sizes: str = "1,2,4,8,16,32"
    max_prompt: int | None = None
    max_tokens: int = 24
    threads: str | None = None
    seed: int = 0
    layers: bool = False
    replay: Path | None = None
    shrink_seconds: float = 60.0
    report: Path | None = None
    as_json: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """Those that choose what model is checked, as words of a command."""
        given = {
            "--revision": self.revision,
            "--numerics": self.numerics,
            "--backend": self.backend,
            "--device": self.device,
            "--dtype": None if self.dtype == "auto" else self.dtype,
        }
        return tuple(word for flag, value in given.items() if value is not None for word in (flag, value))


def run(options: Options) -> int:
    """Runs the command.

    Returns:
        Its exit code: 0 if every comparison was equal, 1 if one was not, 130 if it was interrupted.

    Raises:
        AnyFP4Error: a wrong flag, or a model that cannot be loaded. Flags are checked first.
    """
    batch_sizes = numbers(options.batch_sizes, "--batch-sizes")
    threads = () if options.threads is None else numbers(options.threads, "--threads")
    _check(options)
    replayed = None if options.replay is None else _read_schedule(options.replay)
    with byte_progress(f"loading {options.model}") as progress:
        llm = LLM(
            options.model,
            revision=options.revision,
            numerics=options.numerics,
            backend=options.backend,
            device=options.device,
            dtype=options.dtype,
            # its own cache stays unused: every trial builds an engine
            config=EngineConfig(max_num_seqs=1, kv_cache_bytes=UNUSED_BYTES),
            progress=progress,
        )
    model = llm.engine.model
    threads = _threads(model, threads)
    plan = None
    if replayed is None:
        plan = plan_for(
            model,
            max_prompt=options.max_prompt,
            max_tokens=options.max_tokens,
            batch_sizes=batch_sizes,
            threads=threads,
            seed=options.seed,
        )
        schedules, total, longest = _schedules(plan, options.trials), options.trials, plan.max_length
    else:
        schedules, total = iter([replayed]), 1
        # a prompt that generates nothing still needs a position after it
        longest = max(max(a.request.max_length, len(a.request.tokens) + 1) for a in replayed.arrivals)
    setting = Setting(
        model=options.model,
        options=options.flags,
        numerics=options.numerics or envs.read().numerics,
        dtype=str(model.config.dtype).removeprefix("torch."),
        trials=total,
        plan=plan,
        environment=report.environment(model),
    )
    proof, checks = Proof(), list[OpCheck]()
    try:
        if options.layers:
            _check_layers(model, options.seed, threads, checks)
        verifier = Verifier(model, tuple(llm.engine.eos), longest)
        with step_progress("starting", "trials") as advance:
            verify(verifier, schedules, proof, total=total, shrink_seconds=options.shrink_seconds, progress=advance)
    except KeyboardInterrupt:
        proof.interrupted = True  # what was compared so far is still worth showing
    return _finish(proof, checks, setting, options)


def numbers(text: str, flag: str) -> tuple[int, ...]:
    """Whole numbers of 1 or more, with commas between them.

    Raises:
        InvalidArgumentError: it is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) >= 1 for part in parts):
        raise InvalidArgumentError(f"{flag} {text}: expected numbers of 1 or more with commas between, like 1,4,16")
    return tuple(dict.fromkeys(map(int, parts)))


def _check(options: Options) -> None:
    if options.trials < 0:
        raise InvalidArgumentError(f"--trials must be 0 or more, got {options.trials}")
    if options.trials == 0 and not options.layers:
        raise InvalidArgumentError("--trials 0 leaves nothing to do without --layers")
    if options.max_tokens < 1:
        raise InvalidArgumentError(f"--max-tokens must be 1 or more, got {options.max_tokens}")
    if options.max_prompt is not None and options.max_prompt < 1:
        raise InvalidArgumentError(f"--max-prompt must be 1 or more, got {options.max_prompt}")
    if not options.shrink_seconds >= 0:
        raise InvalidArgumentError(f"--shrink-seconds must be 0 or more, got {options.shrink_seconds}")
    report.check_output(options.report, "--report", ".html")


def _read_schedule(file: Path) -> Schedule:
    if str(file) == "-":
        return from_json(sys.stdin.read(), "--replay -")
    try:
        return from_json(file.read_text(encoding="utf-8"), f"--replay {file}")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"--replay {file}: {error}") from error


def _threads(model: Decoder, asked: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of threads to alternate between: one and all, unless the user says otherwise."""
    if model.device.type != "cpu":
        if asked:
            raise InvalidArgumentError(f"--threads sets the threads of CPU kernels; this model is on {model.device}")
        return (0,)
    if max(asked, default=0) > envs.MAX_THREADS:
        raise InvalidArgumentError(f"--threads: at most {envs.MAX_THREADS}, got {max(asked)}")
    return asked or tuple(dict.fromkeys((1, default_threads())))


def _schedules(plan: Plan, count: int) -> Iterator[Schedule]:
    return (plan.schedule(i) for i in range(count))


def _check_layers(model: Decoder, seed: int, threads: Sequence[int], checks: list[OpCheck]) -> None:
    with step_progress("starting", "layers") as advance:
        for check in check_layers(
            model, seed=seed, threads=threads, progress=lambda done, total: advance(done, total, "op by op")
        ):
            checks.append(check)


def _finish(proof: Proof, checks: Sequence[OpCheck], setting: Setting, options: Options) -> int:
    sentence, state = verify_report.verdict(proof, checks, setting)
    if options.as_json:
        print(json.dumps(verify_report.to_dict(proof, checks, setting), indent=2))
    else:
        _show(proof, checks, setting)
        stdout.print(Text(sentence, style=_COLORS[state]), soft_wrap=True)
    if options.report is not None:
        report.write(options.report, verify_page.to_html(proof, checks, setting), "--report")
        stderr.print(f"report: {options.report}", highlight=False, soft_wrap=True)
    if state == "bad":
        return EXIT_DIFFERENT
    return EXIT_INTERRUPTED if proof.interrupted else EXIT_EQUAL


def _show(proof: Proof, checks: Sequence[OpCheck], setting: Setting) -> None:
    if checks:
        table = Table("op", "layers", "comparisons of a row", "result", title=f"op by op: {setting.model}")
        for op, layers, count, result in verify_report.layer_rows(checks):
            table.add_row(op, layers, count, Text(result, style="red" if result.startswith("DIFFERS") else "green"))
        stdout.print(table)
    if proof.trials:
        seed = "replayed" if setting.plan is None else f"seed {setting.plan.seed}"
        name = f"{setting.model}, {setting.numerics}, {setting.dtype}, {seed}, {proof.seconds:.0f} s"
        table = Table("", "", title=name, show_header=False)
        for heading, rows in verify_report.rows(proof, setting):
            table.add_section()
            table.add_row(Text(heading, style="bold"), "")
            for row in rows:
                table.add_row(Text(f"  {row[0]}"), Text(row[1]))
        stdout.print(table)
    for gap in verify_report.gaps(proof, setting):
        stdout.print(Text.assemble(("not shown: ", "yellow"), gap), soft_wrap=True)
    culprit = verify_report.culprit_of(checks)
    if culprit is not None:
        stdout.print(Text(verify_report.culprit_text(culprit)), soft_wrap=True)
    if proof.failure is not None:
        for line in verify_report.failure_lines(proof.failure, checks, setting):
            stdout.print(Text(line), soft_wrap=True)
