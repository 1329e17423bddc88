"""The bytes of single tokens: a token may be half a character, which text alone cannot show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from anyfp4.engine.tokenizer import Tokenizer

#: what may follow the first byte of a UTF-8 character: any continuation, except after four of them
_ANY = (0x80, 0xBF)
_SECOND = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}


class TokenText:
    """Bytes and names of a tokenizer's tokens.

    Attributes:
        special: tokens that ``skip_special_tokens`` leaves out of the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer: Any = tokenizer.inner
        self._kinds = frozenset(_decoders(self._tokenizer))
        self._literal = frozenset(self._tokenizer.get_added_vocab().values())
        self.special = frozenset(t for t, added in self._tokenizer.added_tokens_decoder.items() if added.special)
        self._of_character = {c: b for b, c in _byte_characters().items()}
        self._cache: dict[int, bytes | None] = {}

    def bytes_of(self, token: int) -> bytes | None:
        """What the token adds to the text; None if the tokenizer does not know it."""
        if token not in self._cache:
            self._cache[token] = self._find(token)
        return self._cache[token]

    def text_of(self, token: int) -> str:
        """The token's text, with U+FFFD for bytes that are no character by themselves."""
        return (self.bytes_of(token) or b"").decode(errors="replace")

    def name_of(self, token: int) -> str:
        r"""The token's text, or ``bytes:\xe2\x82`` if that is no text, or ``token_id:7`` if it has none."""
        data = self.bytes_of(token)
        if data is None:
            return f"token_id:{token}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def first_bytes(self, token: int) -> bytes:
        """What the token adds at the beginning of a text, where some tokenizers drop a leading space."""
        data = self.bytes_of(token) or b""
        if data.startswith(b" ") and not str(self._tokenizer.decode([token])).startswith(" "):
            return data[1:]
        return data

    def _find(self, token: int) -> bytes | None:
        piece = self._tokenizer.convert_ids_to_tokens(token) if token < len(self._tokenizer) else None
        if piece is None:
            return None
        if token in self._literal:
            return str(piece).encode()
        if "ByteLevel" in self._kinds:
            return b"".join(
                bytes([self._of_character[c]]) if c in self._of_character else c.encode() for c in str(piece)
            )
        if "ByteFallback" in self._kinds and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        if self._kinds & {"Metaspace", "ByteFallback", "Replace"}:
            return str(piece).replace("▁", " ").encode()
        return str(self._tokenizer.decode([token])).encode()


class Offsets:
    """Where tokens begin in a text, in characters; a token that begins inside a character has its offset."""

    def __init__(self, names: TokenText, start: int, *, skip_special_tokens: bool) -> None:
        """Starts at a place.

        Args:
            names: for the tokens' bytes.
            start: characters before the first token.
            skip_special_tokens: they are no part of the text.
        """
        self._names, self._skip = names, skip_special_tokens
        self._characters = start  # that have begun
        self._left = 0  # bytes that the open character still wants
        self._range = _ANY  # in which the next of them must lie
        self._begun = False

    def add(self, token: int) -> int:
        """The offset of the next token."""
        data = b""
        if not (self._skip and token in self._names.special):
            data = (self._names.bytes_of(token) or b"") if self._begun else self._names.first_bytes(token)
            self._begun = True
        if not data:
            return self._characters - bool(self._left)
        self._take(data[0])
        offset = self._characters - 1
        for byte in data[1:]:
            self._take(byte)
        return offset

    def _take(self, byte: int) -> None:
        """Goes on with the open character if the byte fits, or begins one; a byte that fits nowhere is one U+FFFD."""
        if self._left and self._range[0] <= byte <= self._range[1]:
            self._left, self._range = self._left - 1, _ANY
            return
        self._characters += 1
        self._left = (0xC2 <= byte <= 0xDF) + 2 * (0xE0 <= byte <= 0xEF) + 3 * (0xF0 <= byte <= 0xF4)
        self._range = _SECOND.get(byte, _ANY)


def _decoders(tokenizer: Any) -> Iterator[str]:
    """The types in the tokenizer's chain of decoders."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return
    pending = [json.loads(backend.to_str())["decoder"]]
    while pending:
        decoder = pending.pop()
        yield decoder["type"]
        pending += decoder.get("decoders", ())


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level vocabularies.

    Printable Latin-1 characters stand for themselves, the other bytes in turn for those from U+0100 on.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
