"""One request at the level of text: its completions' text so far, stop strings, and the output that a caller sees."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from anyfp4.engine.engine import Engine
from anyfp4.engine.outputs import CompletionOutput, RequestOutput
from anyfp4.engine.sequence import Sequence
from anyfp4.engine.tokenizer import Detokenizer, Tokenizer


class Request:
    """A prompt and its completions in the making."""

    def __init__(self, prompt: str | None, sequences: SequenceOf[Sequence], tokenizer: Tokenizer) -> None:
        """Starts with the sequences as they are queued.

        Args:
            prompt: the text, if the prompt was text.
            sequences: as the engine made them.
            tokenizer: for the text of the completions.
        """
        first = sequences[0]
        self.request_id = first.request_id
        self.sequences = sequences
        self.prompt_token_ids = tuple(first.tokens[: first.prompt_length])
        self._prompt = prompt
        self._texts = [_Text(s, tokenizer) for s in sequences]

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(s.finished for s in self.sequences)

    def update(self, sequence: Sequence, engine: Engine) -> None:
        """Takes in a sequence's new token, if it has one; ends the sequence where its text reached a stop string."""
        found = self._texts[sequence.index].update()
        if found is None:
            return
        if sequence.finished:
            sequence.finish_reason, sequence.stop_reason = "stop", found
        else:
            engine.stop(sequence, found)

    def abort(self, engine: Engine) -> None:
        """Ends all completions that have not ended."""
        for sequence in self.sequences:
            engine.abort(sequence)

    def output(self) -> RequestOutput:
        """The request as it stands."""
        first = self.sequences[0]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=tuple(text.output() for text in self._texts),
            prompt_logprobs=None if first.params.prompt_logprobs is None else tuple(first.prompt_logprobs),
            cached_tokens=first.cached_tokens or 0,
        )


class _Text:
    """The text of one completion."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer) -> None:
        self._sequence = sequence
        self._detokenizer = Detokenizer(tokenizer, sequence.params.skip_special_tokens)
        self._seen = sequence.prompt_length
        self._final: str | None = None  # up to a stop string

    def update(self) -> str | None:
        """Takes in new tokens; the stop string that was reached, if one was."""
        s = self._sequence
        before = len(self._detokenizer.text)
        new, self._seen = s.tokens[self._seen :], len(s.tokens)
        # the token that ended a text belongs to it only where special tokens are shown
        if new and s.finish_reason == "stop" and s.params.skip_special_tokens:
            new = new[:-1]
        self._detokenizer.add(new)
        if s.finished:
            self._detokenizer.finish()
        return self._reached(self._detokenizer.text, before)

    def _reached(self, text: str, seen: int) -> str | None:
        """Cuts the text at the first stop string, which may have begun in earlier text."""
        s = self._sequence
        if not s.params.stop_strings or len(s.tokens) - s.prompt_length < s.params.min_tokens:
            return None
        found: tuple[int, str] | None = None
        for stop in s.params.stop_strings:
            at = text.find(stop, max(0, seen - len(stop) + 1))
            if at >= 0 and (found is None or at < found[0]):
                found = (at, stop)
        if found is None:
            return None
        at, stop = found
        self._final = text[: at + len(stop) if s.params.include_stop_str_in_output else at]
        return stop

    def _visible(self) -> str:
        """The text to show: while running, an end that may become a stop string is held back."""
        if self._final is not None:
            return self._final
        s, text = self._sequence, self._detokenizer.text
        if s.finished:
            return text
        for length in range(max((len(stop) - 1 for stop in s.params.stop_strings), default=0), 0, -1):
            if any(len(stop) > length and text.endswith(stop[:length]) for stop in s.params.stop_strings):
                return text[:-length]
        return text

    def output(self) -> CompletionOutput:
        """The completion as it stands."""
        s = self._sequence
        return CompletionOutput(
            index=s.index,
            text=self._visible(),
            token_ids=tuple(s.generated),
            finish_reason=s.finish_reason,
            stop_reason=s.stop_reason,
            logprobs=None if s.params.logprobs is None else tuple(s.logprobs),
            error=s.error,
        )
