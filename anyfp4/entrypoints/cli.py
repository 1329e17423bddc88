"""The command line: ``anyfp4 generate | serve | verify | eval | quantize | inspect | backends | demo``."""

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
MemoryOption = Annotated[
    float | None,
    typer.Option(help="Part of the device's memory that may be in use in all, above 0 to 1.  "
                 "[default: 0.9 of a GPU's, all of a CPU's]"),
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
    memory_fraction: MemoryOption = None,
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
    config = EngineConfig(max_model_len=max_model_len, memory_fraction=memory_fraction)
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
            config=config,
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


@app.command()
def verify(
    model: ModelArgument,
    trials: Annotated[int, typer.Option(help="Random schedules of requests to run and compare.")] = 16,
    batch_sizes: Annotated[
        str, typer.Option(help="Numbers of requests in a schedule, one drawn for each trial.")
    ] = "1,2,4,8,16,32",
    max_prompt: Annotated[
        int | None,
        typer.Option(help="Most tokens of a prompt.  [default: 192, or what the model has room for]"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens of a request.")] = 24,
    threads: Annotated[
        str | None,
        typer.Option(help="Numbers of CPU threads to alternate between.  [default: 1 and all]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, parameters and schedules.")] = 0,
    layers: Annotated[
        bool, typer.Option("--layers", help="First check every op of every layer; names the first that differs.")
    ] = False,
    replay: Annotated[
        Path | None, typer.Option(help="Run one schedule, as a failure prints it; `-` reads it from stdin.")
    ] = None,
    shrink_seconds: Annotated[
        float, typer.Option(help="After a difference, look this long for the smallest schedule that shows it.")
    ] = 60.0,
    report: Annotated[Path | None, typer.Option(help="Write a page with figures and plots (.html).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of tables.")] = False,
    numerics: NumericsOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="Of activations: auto, bfloat16, float16 or float32.")] = "auto",
    revision: RevisionOption = None,
) -> None:
    """Prove batch invariance here: random batches against each request alone, bit by bit. Exits with 1 if they differ.

    Ctrl-C shows what was compared so far and exits with 130.
    """
    from anyfp4.entrypoints import verify as command  # noqa: PLC0415  (torch takes seconds to import)

    code = command.run(
        command.Options(
            model=model,
            revision=revision,
            numerics=None if numerics is None else numerics.value,
            backend=backend,
            device=device,
            dtype=dtype,
            trials=trials,
            batch_sizes=batch_sizes,
            max_prompt=max_prompt,
            max_tokens=max_tokens,
            threads=threads,
            seed=seed,
            layers=layers,
            replay=replay,
            shrink_seconds=shrink_seconds,
            report=report,
            as_json=as_json,
        )
    )
    if code:
        raise typer.Exit(code)


@app.command()
def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 lets the system choose.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model.  [default: the folder's name, or the id]")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="That clients must send; other users of this machine can see it here.  "
            "[default: $ANYFP4_API_KEY or none]"
        ),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Completions that may wait; one more gets a 429.")] = 256,
    max_body_mb: Annotated[float, typer.Option(help="Largest body of a request, in MB.")] = 8.0,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that running requests get after SIGTERM.")] = 30.0,
    log_requests: Annotated[bool, typer.Option(help="A line for each request.")] = True,
    numerics: NumericsOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="Of activations: auto, bfloat16, float16 or float32.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of prompt and answer together.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Completions that run at the same time.")] = 64,
    max_step_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of one step; longer prompts are cut, so that others do not wait for them.  "
            "[default: 512 on a CPU, 2048 on a GPU]"
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens of one block of the KV cache.")] = 16,
    kv_cache_gib: Annotated[
        float | None, typer.Option(help="Memory of the KV cache in GiB.  [default: from what the machine has]")
    ] = None,
    memory_fraction: MemoryOption = None,
    prefix_caching: Annotated[bool, typer.Option(help="Reuse what prompts have in common.")] = True,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Launch steps of up to 512 tokens as CUDA graphs.  [default: where the device and the model can]",
        ),
    ] = None,
    async_scheduling: Annotated[
        bool | None,
        typer.Option(
            "--async-scheduling/--no-async-scheduling",
            help="Launch a step before the tokens of the one before it are read.  "
            "[default: where steps run as CUDA graphs]",
        ),
    ] = None,
    revision: RevisionOption = None,
) -> None:
    """Serve a model over HTTP: OpenAI's API, metrics, and a chat page. SIGTERM finishes what runs and exits with 0."""
    from anyfp4.entrypoints import serve as command  # noqa: PLC0415

    command.run(
        command.Options(
            model=model,
            revision=revision,
            numerics=None if numerics is None else numerics.value,
            backend=backend,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_step_tokens=max_step_tokens,
            block_size=block_size,
            kv_cache_gib=kv_cache_gib,
            memory_fraction=memory_fraction,
            prefix_caching=prefix_caching,
            cuda_graphs=cuda_graphs,
            async_scheduling=async_scheduling,
            host=host,
            port=port,
            served_model_name=served_model_name,
            api_key=api_key,
            max_queue=max_queue,
            max_body_mb=max_body_mb,
            drain_timeout=drain_timeout,
            log_requests=log_requests,
        )
    )


@app.command("eval")
def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option(help="Text to predict, UTF-8.")],
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window.  [default: 1024, or the model's limit if that is less]")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Read only the first tokens of the text.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Another model to compare with: folder or Hugging Face id, same tokenizer.")
    ] = None,
    against_numerics: Annotated[
        Numerics | None, typer.Option(help="Compare with other numerics of --against, or of the model itself.")
    ] = None,
    against_dtype: Annotated[
        str | None, typer.Option(help="Compare with another dtype of activations, likewise.")
    ] = None,
    against_backend: Annotated[str | None, typer.Option(help="Compare with another backend, likewise.")] = None,
    layer_tokens: Annotated[int, typer.Option(help="Tokens that the error of each layer is measured on.")] = 256,
    plot: Annotated[Path | None, typer.Option(help="Write the plots (.svg).")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with figures and plots (.html).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of tables.")] = False,
    numerics: NumericsOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="Of activations: auto, bfloat16, float16 or float32.")] = "auto",
    revision: RevisionOption = None,
) -> None:
    """Perplexity of a text; with --against, how far two models or two numerics lie apart on it."""
    from anyfp4.entrypoints import evaluate as command  # noqa: PLC0415  (torch takes seconds to import)

    command.run(
        command.Options(
            model=model,
            text=text,
            revision=revision,
            numerics=None if numerics is None else numerics.value,
            backend=backend,
            device=device,
            dtype=dtype,
            context=context,
            max_tokens=max_tokens,
            against=against,
            against_numerics=None if against_numerics is None else against_numerics.value,
            against_dtype=against_dtype,
            against_backend=against_backend,
            layer_tokens=layer_tokens,
            plot=plot,
            report=report,
            as_json=as_json,
        )
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
