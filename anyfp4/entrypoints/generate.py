"""``anyfp4 generate``: one prompt streams to the terminal, a file of prompts becomes JSON lines."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from anyfp4.engine.config import SamplingParams
from anyfp4.engine.outputs import TokenLogprobs
from anyfp4.entrypoints.console import stderr, stdout
from anyfp4.errors import EngineError, InvalidArgumentError
from anyfp4.llm import LLM, CompletionOutput, Prompt, RequestOutput


def prompt_for(llm: LLM, text: str, *, raw: bool, system: str | None) -> Prompt:
    """Text as it is, or as a user's message where the model has a chat template."""
    if raw or not llm.tokenizer.has_chat_template:
        if system is not None:
            raise InvalidArgumentError("--system needs a chat template; this is raw text")
        return text
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": text}]


def read_prompts(file: Path) -> list[str | list[dict[str, str]] | list[int]]:
    """Prompts of a file: one a line; in a ``.jsonl`` file, a string or an object with prompt or messages.

    Raises:
        InvalidArgumentError: the file is missing, empty, or a line is not of that form; with the line's number.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"--file {file}: {error}") from error
    prompts = [
        _parse_line(line, f"{file}:{number}", json_lines=file.suffix == ".jsonl")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise InvalidArgumentError(f"--file {file}: no prompts in it")
    return prompts


def _parse_line(line: str, where: str, *, json_lines: bool) -> str | list[dict[str, str]] | list[int]:
    if not json_lines:
        return line
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidArgumentError(f"{where}: not JSON: {error}") from error
    if isinstance(value, dict) and len(value) == 1:
        value = value.get("prompt", value.get("messages"))
    is_messages = isinstance(value, list) and all(
        isinstance(m, dict) and all(isinstance(v, str) for v in m.values()) for m in value
    )
    is_tokens = isinstance(value, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in value)
    if not value or not (isinstance(value, str) or is_messages or is_tokens):
        raise InvalidArgumentError(
            f'{where}: expected a string, {{"prompt": text or token ids}} or {{"messages": [...]}}'
        )
    return value  # type: ignore[no-any-return]


def run_one(llm: LLM, prompt: Prompt, params: SamplingParams, *, as_json: bool) -> None:
    """Streams one completion to stdout, then a line of figures to stderr."""
    if params.temperature and params.seed is None:
        params = replace(params, seed=secrets.randbits(31))
    shown = [0] * params.n
    started = time.perf_counter()
    first: float | None = None
    output: RequestOutput | None = None
    for output in llm.stream(prompt, params):
        first = first or time.perf_counter()
        if not as_json and params.n == 1:
            text = output.outputs[0].text
            sys.stdout.write(text[shown[0] :])
            sys.stdout.flush()
            shown[0] = len(text)
    ended = time.perf_counter()
    assert output is not None and first is not None
    if as_json:
        print(json.dumps(to_json(0, output, llm)))
    elif params.n == 1:
        print()
        _print_logprobs(output.outputs[0], llm)
    else:
        for completion in output.outputs:
            stdout.rule(f"completion {completion.index + 1}")
            print(completion.text)
            _print_logprobs(completion, llm)
    stderr.print(_figures(output, params, started, first, ended), style="dim", highlight=False)
    _raise_if_failed([output])


def run_batch(llm: LLM, prompts: Sequence[Prompt], params: SamplingParams) -> None:
    """Completes all prompts in one batch and prints a JSON line for each, in order."""
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - started
    for index, output in enumerate(outputs):
        print(json.dumps(to_json(index, output, llm)))
    count = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    stderr.print(
        f"{len(outputs)} prompts, {count} tokens, {count / seconds:.1f} tokens/s", style="dim", highlight=False
    )
    _raise_if_failed(outputs)


def to_json(index: int, output: RequestOutput, llm: LLM) -> dict[str, Any]:
    """One prompt's result as a JSON object."""
    return {
        "index": index,
        "prompt_token_ids": list(output.prompt_token_ids),
        "outputs": [
            {
                "text": c.text,
                "token_ids": list(c.token_ids),
                "finish_reason": c.finish_reason,
                "stop_reason": c.stop_reason,
                "error": c.error,
                "logprobs": None if c.logprobs is None else [_candidates(lp, llm) for lp in c.logprobs],
            }
            for c in output.outputs
        ],
    }


def _raise_if_failed(outputs: Sequence[RequestOutput]) -> None:
    """Ends the command with an error if a completion ended with one; whatever was generated is printed by then."""
    failed = [(i, c.error) for i, output in enumerate(outputs) for c in output.outputs if c.finish_reason == "error"]
    if failed:
        index, error = failed[0]
        more = f" ({len(failed)} completions failed)" if len(failed) > 1 else ""
        raise EngineError(f"prompt {index}: {error}{more}")


def _candidates(logprobs: TokenLogprobs, llm: LLM) -> list[dict[str, Any]]:
    return [
        {"token_id": token, "token": llm.tokenizer.decode([token], False), "logprob": lp.logprob, "rank": lp.rank}
        for token, lp in logprobs.items()
    ]


def _print_logprobs(completion: CompletionOutput, llm: LLM) -> None:
    if completion.logprobs is None:
        return
    table = Table("token", "id", "logprob", "rank", "most likely", title="log-probabilities")
    for token, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
        chosen = logprobs[token]
        others = "  ".join(f"{llm.tokenizer.decode([t], False)!r} {lp.logprob:.3f}" for t, lp in logprobs.items())
        text = repr(llm.tokenizer.decode([token], False))
        table.add_row(Text(text), str(token), f"{chosen.logprob:.4f}", str(chosen.rank), Text(others))
    stdout.print(table)


def _figures(output: RequestOutput, params: SamplingParams, started: float, first: float, ended: float) -> str:
    prompt, new = len(output.prompt_token_ids), sum(len(c.token_ids) for c in output.outputs)
    parts = [f"{prompt} prompt tokens in {first - started:.2f} s"]
    decoded = new - len(output.outputs)
    if decoded > 0 and ended > first:
        parts.append(f"{new} new tokens, {decoded / (ended - first):.1f} tokens/s")
    else:
        parts.append(f"{new} new tokens")
    parts.append("finished: " + ", ".join(str(c.finish_reason) for c in output.outputs))
    if params.temperature:
        parts.append(f"seed {params.seed}")
    return "; ".join(parts)
