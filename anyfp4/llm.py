"""``LLM``: load a model, generate text; the offline interface, in the manner that vLLM's users know."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from anyfp4 import device as devices
from anyfp4 import envs
from anyfp4.checkpoint.locate import locate
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.engine.config import EngineConfig, SamplingParams
from anyfp4.engine.engine import Engine
from anyfp4.engine.sequence import FinishReason, TokenLogprobs
from anyfp4.engine.sequence import Sequence as EngineSequence
from anyfp4.engine.tokenizer import Detokenizer, Message, Tokenizer
from anyfp4.errors import InvalidArgumentError
from anyfp4.models.loader import load_decoder

#: plain text, token ids, or a conversation
Prompt = str | Sequence[int] | Sequence[Message]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class CompletionOutput:
    """One completion.

    Attributes:
        finish_reason: ``stop`` (end of sequence, stop string or stop token), ``length``, ``abort``; None while running.
        stop_reason: the stop string or stop token that ended it, if one did.
        logprobs: of each new token, if asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of the chosen tokens' log-probabilities, if they were asked for."""
        if self.logprobs is None:
            return None
        return sum(lp[token].logprob for lp, token in zip(self.logprobs, self.token_ids, strict=True))


@dataclass(frozen=True)
class RequestOutput:
    """What became of one prompt.

    Attributes:
        prompt: the text, if the prompt was text.
        prompt_logprobs: of each prompt token (None for the first), if asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(o.finish_reason is not None for o in self.outputs)


@dataclass(eq=False)
class _Request:
    prompt: str | None
    sequences: list[EngineSequence]
    texts: list[Detokenizer]
    final: dict[int, str] = field(default_factory=dict)


class LLM:
    """A model, ready to generate.

    The tokens and log-probabilities of a prompt are the same bits whatever else is generated beside it.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        numerics: str | None = None,
        backend: str | None = None,
        device: str | torch.device | None = None,
        dtype: str = "auto",
        config: EngineConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Loads the model.

        Args:
            model: a folder, or a Hugging Face id.
            revision: branch, tag or commit, with an id.
            numerics: ``native`` or ``blackwell``; by default $ANYFP4_NUMERICS, else native.
            backend: ``auto`` or a backend's name; by default $ANYFP4_BACKEND, else auto.
            device: ``cpu``, ``cuda`` or ``cuda:N``; by default a GPU if there is one.
            dtype: of activations: ``auto`` (the checkpoint's), ``bfloat16``, ``float16`` or ``float32``.
            config: of the engine.
            progress: called with (bytes loaded, bytes in all) while loading.

        Raises:
            CheckpointError: the checkpoint cannot be read as it stands.
            UnsupportedError: the architecture, the quantization or an option is not supported.
            BackendError: the backend that was asked for cannot run here.
            InvalidArgumentError: a wrong argument.
        """
        environment = envs.read()
        numerics = numerics or environment.numerics
        if numerics not in envs.NUMERICS:
            raise InvalidArgumentError(f"numerics must be one of {', '.join(envs.NUMERICS)}, got {numerics!r}")
        if dtype != "auto" and dtype not in _DTYPES:
            raise InvalidArgumentError(f"dtype must be auto or one of {', '.join(_DTYPES)}, got {dtype!r}")
        config = config or EngineConfig()
        folder = locate(model, revision)
        with Checkpoint(folder) as checkpoint:
            self.tokenizer = Tokenizer(folder)
            decoder = load_decoder(
                checkpoint,
                device=devices.resolve(device),
                dtype=_DTYPES.get(dtype),
                numerics=numerics,
                backend=backend or environment.backend,
                max_positions=config.max_model_len,
                progress=progress,
            )
        self.model = str(model)
        self.engine = Engine(decoder, config, self.tokenizer.eos_token_ids)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts, all of them in one batch.

        Args:
            prompts: one prompt or several; each is text, token ids, or a list of chat messages.
            sampling_params: one for all prompts, or one for each; ``SamplingParams()`` by default.

        Returns:
            One output per prompt, in order.

        Raises:
            InvalidArgumentError: a wrong prompt or parameter. Nothing was generated then.
        """
        batch = _as_batch(prompts)
        params = _broadcast(sampling_params, len(batch))
        latest: dict[str, RequestOutput] = {}
        order: list[str] = []
        for output in self._run([self._encode(p) for p in batch], params, order):
            latest[output.request_id] = output
        return [latest[request_id] for request_id in order]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answers conversations through the model's chat template; as :meth:`generate`."""
        return self.generate(messages, sampling_params)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Completes one prompt and yields the output so far after every step; the last one is finished.

        Closing the iterator ends the request.
        """
        yield from self._run([self._encode(prompt)], [sampling_params or SamplingParams()], [])

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        items = list(prompt)
        if items and all(isinstance(i, Mapping) for i in items):
            return None, self.tokenizer.encode_chat([dict(i) for i in items if isinstance(i, Mapping)])
        tokens = [i for i in items if isinstance(i, int) and not isinstance(i, bool)]
        if len(tokens) != len(items):
            raise InvalidArgumentError("a prompt is text, a list of token ids, or a list of chat messages")
        return None, tokens

    def _run(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        params: Sequence[SamplingParams],
        order: list[str],
    ) -> Iterator[RequestOutput]:
        requests: dict[str, _Request] = {}
        try:
            for (text, tokens), p in zip(prompts, params, strict=True):
                request_id = str(next(self._ids))
                order.append(request_id)
                sequences = self.engine.add(request_id, tokens, p)
                texts = [Detokenizer(self.tokenizer, p.skip_special_tokens) for _ in sequences]
                requests[request_id] = _Request(text, sequences, texts)
            while any(not s.finished for r in requests.values() for s in r.sequences):
                touched = {s.request_id: None for s in self._step(requests)}
                for request_id in touched:
                    if request_id in requests:
                        yield self._output(request_id, requests[request_id])
        finally:
            for request in requests.values():
                for sequence in request.sequences:
                    self.engine.abort(sequence)

    def _step(self, requests: Mapping[str, _Request]) -> list[EngineSequence]:
        changed = self.engine.step()
        for sequence in changed:
            request = requests.get(sequence.request_id)
            if request is None:
                continue
            detokenizer = request.texts[sequence.index]
            seen = len(detokenizer.text)
            tokens = sequence.tokens[-1:]
            ended_by_token = sequence.finish_reason == "stop"
            if not ended_by_token or not sequence.params.skip_special_tokens:
                detokenizer.add(tokens)
            if sequence.finished:
                detokenizer.finish()
            self._check_stop_strings(request, sequence, detokenizer.text, seen)
        return changed

    def _check_stop_strings(self, request: _Request, s: EngineSequence, text: str, seen: int) -> None:
        """Ends the sequence at the first stop string, which may have begun in earlier text."""
        found: tuple[int, str] | None = None
        for stop in s.params.stop_strings:
            at = text.find(stop, max(0, seen - len(stop) + 1))
            if at >= 0 and (found is None or at < found[0]):
                found = (at, stop)
        if found is None:
            return
        at, stop = found
        end = at + len(stop) if s.params.include_stop_str_in_output else at
        request.final[s.index] = text[:end]
        if s.finished:
            s.finish_reason, s.stop_reason = "stop", stop
        else:
            self.engine.stop(s, stop)

    @staticmethod
    def _output(request_id: str, request: _Request) -> RequestOutput:
        outputs = []
        for s, detokenizer in zip(request.sequences, request.texts, strict=True):
            outputs.append(
                CompletionOutput(
                    index=s.index,
                    text=request.final.get(s.index, _visible(detokenizer.text, s)),
                    token_ids=tuple(s.generated),
                    finish_reason=s.finish_reason,
                    stop_reason=s.stop_reason,
                    logprobs=None if s.params.logprobs is None else tuple(s.logprobs),
                )
            )
        first = request.sequences[0]
        return RequestOutput(
            request_id=request_id,
            prompt=request.prompt,
            prompt_token_ids=tuple(first.tokens[: first.prompt_length]),
            outputs=tuple(outputs),
            prompt_logprobs=None if first.params.prompt_logprobs is None else tuple(first.prompt_logprobs),
        )


def _visible(text: str, s: EngineSequence) -> str:
    """The text to show while running: an end that may become a stop string is held back."""
    if s.finished:
        return text
    for length in range(max((len(stop) - 1 for stop in s.params.stop_strings), default=0), 0, -1):
        if any(len(stop) > length and text.endswith(stop[:length]) for stop in s.params.stop_strings):
            return text[:-length]
    return text


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if not items:
        raise InvalidArgumentError("no prompts")
    if isinstance(items[0], int | Mapping):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


def _broadcast(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidArgumentError(f"{len(params)} sampling_params for {count} prompts")
    return list(params)
