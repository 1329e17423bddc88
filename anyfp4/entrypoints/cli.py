"""The command line: ``anyfp4 generate | quantize | inspect | backends | demo``."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

import anyfp4
from anyfp4 import envs
from anyfp4.entrypoints.console import byte_progress, stderr, stdout
from anyfp4.errors import AnyFP4Error, InvalidArgumentError

app = typer.Typer(
    name="anyfp4",
    help="NVFP4 language models on hardware that has no FP4 units.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Numerics(StrEnum):
    """How W4A4 products are summed."""

    native = "native"
    blackwell = "blackwell"


class Layout(StrEnum):
    """How a checkpoint names and stores its tensors."""

    compressed_tensors = "compressed-tensors"
    modelopt = "modelopt"


ModelArgument = Annotated[str, typer.Argument(help="Folder of a checkpoint, or a Hugging Face id (owner/name).")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id.")]
NumericsOption = Annotated[
    Numerics | None,
    typer.Option(help="native: this device's own matrix units; blackwell: bit for bit a Blackwell tensor core.  "
                 "[default: $ANYFP4_NUMERICS or native]"),
]  # fmt: skip
BackendOption = Annotated[
    str | None,
    typer.Option(help="Linear backend (see `anyfp4 backends`); one that cannot run raises.  "
                 "[default: $ANYFP4_BACKEND or auto]"),
]  # fmt: skip
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.  [default: a GPU if there is one]")]


def _version(show: bool) -> None:
    if show:
        print(anyfp4.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    del version
    envs.read()  # a wrong variable is reported before any work


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; `-` reads it from stdin.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Prompts from a file, one a line, or JSON lines if it ends in .jsonl; prints JSON lines."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: complete the text as it stands.")] = False,
    system: Annotated[str | None, typer.Option(help="System message before the prompt.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens that have this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 for all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Keep tokens this fraction as likely as the best.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers; drawn and shown if not given.")] = None,
    max_tokens: Annotated[int, typer.Option(help="At most this many new tokens.")] = 256,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may be repeated.")] = None,
    n: Annotated[int, typer.Option("-n", help="Completions of the prompt.")] = 1,
    logprobs: Annotated[
        int | None, typer.Option(help="Show log-probabilities of the chosen and of this many most likely tokens.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of streaming text.")] = False,
    numerics: NumericsOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="Of activations: auto, bfloat16, float16 or float32.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of prompt and answer together.")] = None,
    revision: RevisionOption = None,
) -> None:
    """Generate text. Messages and figures go to stderr, text to stdout."""
    # checks before the model loads, so that a typo costs no time
    from anyfp4.engine.config import EngineConfig, SamplingParams  # noqa: PLC0415

    if (prompt is None) == (file is None):
        raise InvalidArgumentError("give either a PROMPT or --file")
    params = SamplingParams(
        n=n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        max_tokens=max_tokens,
        stop=stop,
        logprobs=logprobs,
    )
    from anyfp4.entrypoints import generate as command  # noqa: PLC0415  (torch takes seconds to import)
    from anyfp4.llm import LLM  # noqa: PLC0415

    texts = command.read_prompts(file) if file is not None else None
    if prompt == "-":
        prompt = sys.stdin.read()
    with byte_progress(f"loading {model}") as progress:
        llm = LLM(
            model,
            revision=revision,
            numerics=numerics,
            backend=backend,
            device=device,
            dtype=dtype,
            config=EngineConfig(max_model_len=max_model_len),
            progress=progress,
        )
    if texts is not None:
        prompts = [command.prompt_for(llm, t, raw=raw, system=system) if isinstance(t, str) else t for t in texts]
        command.run_batch(llm, prompts, params)
    else:
        assert prompt is not None
        command.run_one(llm, command.prompt_for(llm, prompt, raw=raw, system=system), params, as_json=as_json)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="bf16 folder, GGUF file, or Hugging Face id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    layout: Annotated[Layout, typer.Option("--format", help="Layout to write.")] = Layout.compressed_tensors,
    weight_only: Annotated[bool, typer.Option("--weight-only", help="Leave activations unquantized.")] = False,
    calibrate: Annotated[
        Path | None, typer.Option(help="Text that input scales are calibrated on; a built-in text by default.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layers to leave alone: name, glob or re:pattern; may be repeated.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    revision: RevisionOption = None,
) -> None:
    """Quantize a model to NVFP4."""
    from anyfp4.checkpoint.locate import locate  # noqa: PLC0415
    from anyfp4.tools.progress import StageBars  # noqa: PLC0415
    from anyfp4.tools.quantize import quantize_checkpoint  # noqa: PLC0415

    path = Path(source).expanduser()
    with StageBars(stderr) as bars:
        summary = quantize_checkpoint(
            path if path.exists() else locate(source, revision, say=stderr.print),
            out,
            layout=layout.value,
            weight_only=weight_only,
            calibrate=calibrate,
            ignore=tuple(ignore or ()),
            overwrite=overwrite,
            progress=bars.update,
        )
    for note in (*summary.notes, *(f"warning: {w}" for w in summary.warnings)):
        stderr.print(note, highlight=False)
    stdout.print(
        f"{summary.out}: {len(summary.quantized)} layers quantized, {len(summary.dense)} left dense, "
        f"{summary.source_bytes / 1e6:.1f} MB -> {summary.written_bytes / 1e6:.1f} MB in {summary.seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def inspect(
    model: ModelArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    revision: RevisionOption = None,
) -> None:
    """Show what a checkpoint is made of, and whatever would be refused. Exits with 1 if anything would be."""
    from anyfp4.checkpoint.locate import locate  # noqa: PLC0415
    from anyfp4.tools.inspect import inspect as look  # noqa: PLC0415
    from anyfp4.tools.inspect import render  # noqa: PLC0415

    with byte_progress(f"reading {model}") as progress:
        report = look(locate(model, revision, say=stderr.print), progress)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        stdout.print(render(report))
    if report.refusals:
        raise typer.Exit(1)


@app.command()
def backends(
    numerics: NumericsOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which linear backends there are, which one is chosen here, and why each other is not."""
    from anyfp4 import device as devices  # noqa: PLC0415
    from anyfp4.backends import registry  # noqa: PLC0415

    environment = envs.read()
    chosen_numerics = numerics.value if numerics is not None else environment.numerics
    place = devices.resolve(device)
    rows = registry.table(place, numerics=chosen_numerics, requested=backend or environment.backend)
    if as_json:
        print(json.dumps([{"name": r.name, "chosen": r.chosen, "why_not": r.reason} for r in rows], indent=2))
        return
    table = Table("backend", "what it is", "here", title=f"{place} ({devices.architecture(place)}), {chosen_numerics}")
    for row in rows:
        here = Text("chosen", style="bold green") if row.chosen else Text(f"no: {row.reason}")
        table.add_row(row.name, row.description, here)
    stdout.print(table)


@app.command()
def demo(
    prompt: Annotated[str | None, typer.Argument(help="What to ask.")] = None,
    layout: Annotated[Layout, typer.Option("--format", help="Layout to quantize to.")] = Layout.compressed_tensors,
    numerics: NumericsOption = None,
    max_tokens: Annotated[int, typer.Option(help="At most this many new tokens.")] = 128,
) -> None:
    """Fetch a small model, quantize it to NVFP4, and let it answer a question."""
    from anyfp4.tools.demo import DEFAULT_PROMPT, run_demo  # noqa: PLC0415

    run_demo(
        prompt or DEFAULT_PROMPT,
        layout=layout.value,
        numerics=None if numerics is None else numerics.value,
        max_tokens=max_tokens,
    )


def main() -> None:
    """Entry point: an error that anyfp4 foresaw is one line, without a traceback."""
    try:
        app()
    except AnyFP4Error as error:
        stderr.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # the reader of a pipe has gone; closing quietly is what a filter does
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
