"""Text to tokens and back, through transformers' tokenizers; streaming text from tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyfp4.errors import CheckpointFileError, InvalidArgumentError

Message = dict[str, str]
_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class Tokenizer:
    """A model's tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        """Loads it from a checkpoint folder; never from the network.

        Raises:
            CheckpointFileError: there is none, or it cannot be read.
        """
        if not any((folder / name).is_file() for name in _FILES):
            raise CheckpointFileError(f"no tokenizer here: expected one of {', '.join(_FILES)}", file=folder)
        from transformers import AutoTokenizer  # noqa: PLC0415  (takes seconds to import)

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointFileError(f"the tokenizer cannot be read: {error}", file=folder) from error

        self.eos_token_ids = _eos_token_ids(folder, self._tokenizer.eos_token_id)

    def copy(self) -> Tokenizer:
        """One for another thread: a tokenizer must not be used by two threads at a time."""
        return copy.deepcopy(self)

    @property
    def inner(self) -> Any:
        """The tokenizer of transformers, for what this class does not offer."""
        return self._tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether this is a chat model's tokenizer."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with whatever special tokens the tokenizer adds by itself."""
        return [int(i) for i in self._tokenizer(text)["input_ids"]]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Raises:
            InvalidArgumentError: there is no chat template, or it rejects the messages.
        """
        if not self.has_chat_template:
            raise InvalidArgumentError("this model has no chat template: pass plain text (--raw)")
        import jinja2  # noqa: PLC0415

        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, KeyError, TypeError) as error:
            raise InvalidArgumentError(f"the chat template rejects the messages: {error}") from error
        return [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids, spaces left as they are."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:  # what the call below ends in, at a third of its time
            return str(backend.decode(list(tokens), skip_special_tokens=skip_special_tokens))
        return str(
            self._tokenizer.decode(
                list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )


def _eos_token_ids(folder: Path, own: int | None) -> tuple[int, ...]:
    """The tokenizer's end-of-sequence token and those of generation_config.json: chat models often name more there."""
    found = [] if own is None else [int(own)]
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
            raise CheckpointFileError(f"not a JSON object: {error}", file=file) from error
        found += value if isinstance(value, list) else [] if value is None else [int(value)]
    return tuple(dict.fromkeys(found))


class Detokenizer:
    """Text of a growing list of tokens, without ever showing half a character.

    A token's text can depend on the token before it, so each addition is decoded together with a few tokens of
    context, whose text is known and is taken off.
    """

    #: tokens of context after which it starts anew
    _MOST_CONTEXT = 16

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self.text = ""
        self._tokens: list[int] = []
        self._context = 0  # first token of the context
        self._read = 0  # tokens whose text is in ``text``
        self._before = ""  # text of the tokens from ``_context`` to ``_read``

    def add(self, tokens: Sequence[int]) -> str:
        """Takes new tokens and returns the new text, empty while a character is incomplete."""
        self._tokens += tokens
        after = self._decode(self._context, len(self._tokens))
        if after.endswith("�") or len(after) <= len(self._before):
            return ""
        new = after[len(self._before) :]
        last, self._read, self._before = self._read, len(self._tokens), after
        if self._read - self._context > self._MOST_CONTEXT:
            self._context, self._before = last, self._decode(last, self._read)
        self.text += new
        return new

    def finish(self) -> str:
        """The text still held back, incomplete characters as U+FFFD."""
        after = self._decode(self._context, len(self._tokens))
        new = after[len(self._before) :]
        self._read, self._before = len(self._tokens), after
        self.text += new
        return new

    def _decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self._tokens[start:end], self.skip_special_tokens)
