"""Streaming text from tokens: whatever the cuts, what is shown adds up to the text of all tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from anyfp4.engine.tokenizer import Detokenizer, Tokenizer

TEXT = "Grüße, 世界! 👩‍👩‍👧 naïve  café\n\n\tx = {1: 'ß'}  " * 3


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


def test_a_token_at_a_time(tokenizer: Tokenizer) -> None:
    """The tiny tokenizer's tokens are bytes, so most characters take several."""
    tokens = tokenizer.encode(TEXT)
    assert len(tokens) == len(TEXT.encode())
    detokenizer, shown = Detokenizer(tokenizer), ""
    for token in tokens:
        shown += detokenizer.add([token])
        assert "�" not in shown and TEXT.startswith(shown) and detokenizer.text == shown
    assert shown + detokenizer.finish() == TEXT == detokenizer.text


def test_any_cuts_and_broken_characters(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(50):
        tokens = [rng.randrange(256) if rng.random() < 0.3 else t for t in tokenizer.encode(TEXT)][:150]
        detokenizer, i = Detokenizer(tokenizer), 0
        while i < len(tokens):
            j = i + rng.randint(0, 4)
            detokenizer.add(tokens[i:j])
            i = j
        detokenizer.finish()
        # a wrong byte becomes U+FFFD; how many of them stand for a run of wrong bytes is left open
        assert detokenizer.text.replace("�", "") == tokenizer.decode(tokens).replace("�", "")


def test_special_tokens(tokenizer: Tokenizer) -> None:
    tokens = [*tokenizer.encode("a"), 257, *tokenizer.encode("b")]
    for skip, text in ((True, "ab"), (False, "a<|end|>b")):
        detokenizer = Detokenizer(tokenizer, skip)
        for token in tokens:
            detokenizer.add([token])
        detokenizer.finish()
        assert detokenizer.text == text == tokenizer.decode(tokens, skip)


def test_a_copy_is_independent_and_alike(tokenizer: Tokenizer) -> None:
    other = tokenizer.copy()
    assert other._tokenizer is not tokenizer._tokenizer
    assert other.encode(TEXT) == tokenizer.encode(TEXT)
    assert other.decode(other.encode(TEXT)) == TEXT
    assert other.eos_token_ids == tokenizer.eos_token_ids
