"""``LLM``: load a model, generate text; the offline interface, in the manner that vLLM's users know."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from anyfp4 import device as devices
from anyfp4 import envs
from anyfp4.checkpoint.locate import locate
from anyfp4.checkpoint.reader import Checkpoint
from anyfp4.engine import kv_cache
from anyfp4.engine.config import EngineConfig, SamplingParams
from anyfp4.engine.engine import Engine
from anyfp4.engine.outputs import CompletionOutput, RequestOutput
from anyfp4.engine.requests import Request
from anyfp4.engine.tokenizer import Message, Tokenizer
from anyfp4.errors import EngineError, InvalidArgumentError
from anyfp4.models.loader import load_decoder

__all__ = ["LLM", "CompletionOutput", "Prompt", "RequestOutput"]

#: plain text, token ids, or a conversation
Prompt = str | Sequence[int] | Sequence[Message]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
            InsufficientMemoryError: the model does not fit its device.
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
                beside=partial(kv_cache.needed, config),
                memory_fraction=config.memory_fraction,
            )
        self.model = str(model)
        self.config = config
        self.engine = Engine(decoder, config, self.tokenizer.eos_token_ids)
        self._ids = itertools.count()
        self._open: dict[str, Request] = {}
        self._changed: set[str] = set()
        self._lent_to: str | None = None

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
            One output per prompt, in order. A prompt that could not be computed has ``error`` set; the others are
            complete.

        Raises:
            InvalidArgumentError: a wrong prompt or parameter. Nothing was generated then.
        """
        batch = _as_batch(prompts)
        params = _broadcast(sampling_params, len(batch))
        latest: dict[str, RequestOutput] = {}
        order: list[str] = []
        for output in self._run([self.encode(p) for p in batch], params, order, every_step=False):
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
        yield from self._run([self.encode(prompt)], [sampling_params or SamplingParams()], [], every_step=True)

    def encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt's text, if it is text, and its token ids.

        Raises:
            InvalidArgumentError: it is neither text, token ids nor messages; or the chat template rejects it.
        """
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        items = list(prompt)
        if items and all(isinstance(i, Mapping) for i in items):
            return None, self.tokenizer.encode_chat([dict(i) for i in items if isinstance(i, Mapping)])
        tokens = [i for i in items if isinstance(i, int) and not isinstance(i, bool)]
        if len(tokens) != len(items):
            raise InvalidArgumentError("a prompt is text, a list of token ids, or a list of chat messages")
        return None, tokens

    def lend(self, owner: str | None) -> None:
        """Gives the engine into other hands, or takes it back (None): meanwhile this object generates nothing.

        Raises:
            EngineError: it is at work or lent already.
        """
        if owner is not None and (self._lent_to is not None or self._open):
            raise EngineError(f"the engine is in use by {self._lent_to or 'a running generate or stream'}")
        self._lent_to = owner

    def _run(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        params: Sequence[SamplingParams],
        order: list[str],
        *,
        every_step: bool,
    ) -> Iterator[RequestOutput]:
        """Runs prompts to their end, and yields outputs after every step or only finished ones.

        Steps may serve the requests of other streams too, and theirs may serve these.
        """
        if self._lent_to is not None:
            raise EngineError(f"the engine is in use by {self._lent_to}")
        mine: dict[str, Request] = {}
        try:
            for (text, tokens), p in zip(prompts, params, strict=True):
                request_id = str(next(self._ids))
                order.append(request_id)
                mine[request_id] = Request(text, self.engine.add(request_id, tokens, p), self.tokenizer)
                self._open[request_id] = mine[request_id]
            while mine:
                if not self._changed.intersection(mine):
                    self._step()
                for request_id in [i for i in mine if i in self._changed]:
                    self._changed.discard(request_id)
                    request = mine[request_id]
                    if request.finished:
                        del mine[request_id], self._open[request_id]
                    if every_step or request.finished:
                        yield request.output()
        finally:
            for request_id, request in mine.items():
                request.abort(self.engine)
                self._open.pop(request_id, None)
                self._changed.discard(request_id)

    def _step(self) -> None:
        for sequence in self.engine.step():
            request = self._open.get(sequence.request_id)
            if request is not None:
                request.update(sequence, self.engine)
                self._changed.add(sequence.request_id)


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
