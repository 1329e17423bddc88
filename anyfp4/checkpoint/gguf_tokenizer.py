"""A Hugging Face tokenizer from the metadata of a GGUF file.

Two kinds of vocabulary: byte-level BPE (``gpt2``), cut into words by a rule that the file only names
(``tokenizer.ggml.pre``), and SentencePiece BPE (``llama``), whose merges follow from the scores. The rules are
those that llama.cpp applies under each name; a name that is not known is refused, because a wrong rule gives
text that looks right and tokens that the model has never seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from anyfp4.errors import CheckpointConfigError, UnsupportedError

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_AND_SPACE: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3: Final = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SPACE}"
_QWEN2: Final = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_PUNCTUATION_AND_SPACE}"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: rules that cut with one regular expression, by name
_SPLITS: Final = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
#: rules that cut off each digit first and then follow GPT-2
_DIGITS: Final = ("smollm", "starcoder", "refact", "codeshell")
#: GPT-2's own rule
_GPT2: Final = ("gpt-2", "olmo")
#: rules under which a word that is in the vocabulary is one token, whatever the merges say
_WHOLE_WORDS: Final = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")
#: rules under which text starts with the BOS token even if the file does not say so
_ADDS_BOS: Final = ("llama3", "llama-v3", "llama-bpe", "pixtral", "tekken")
#: rules whose tokenizers bring text into normal form C first
_NORMALIZED: Final = ("qwen2", "deepseek-r1-qwen")

#: token types
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_SPECIAL: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def write_tokenizer(path: Path, metadata: Mapping[str, Any], folder: Path) -> list[str]:
    """Writes ``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json`` and the chat template.

    Args:
        path: the GGUF file, for messages.
        metadata: of the file.
        folder: where to write.

    Returns:
        The names of the files written; none if the file has no vocabulary.

    Raises:
        CheckpointConfigError: the vocabulary contradicts itself.
        UnsupportedError: a kind of vocabulary, or a way to cut text into words, that is not known.
    """
    if metadata.get("tokenizer.ggml.model", "no_vocab") in ("no_vocab", "none"):
        return []
    tokenizer = build_tokenizer(path, metadata)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = _special_ids(path, metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {f"{name}_token": tokens[i] for name, i in ids.items()}
    config["clean_up_tokenization_spaces"] = False
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(folder / "tokenizer_config.json", config)
    generation: dict[str, Any] = {f"{name}_token_id": i for name, i in ids.items() if name != "unk"}
    ends = [ids.get("eos"), *(metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))]
    stops = list(dict.fromkeys(int(i) for i in ends if i is not None))
    if len(stops) > 1:
        generation["eos_token_id"] = stops
    _write_json(folder / "generation_config.json", generation)
    written = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    template = metadata.get("tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        written.append("chat_template.jinja")
    return written


def build_tokenizer(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the metadata describe; arguments and errors as in :func:`write_tokenizer`."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointConfigError("metadata key tokenizer.ggml.tokens is missing", file=path)
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise CheckpointConfigError(f"{len(tokens)} tokens, but {len(types)} token types", file=path)
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    rule = str(metadata.get("tokenizer.ggml.pre", ""))
    if kind == "gpt2":
        tokenizer = _byte_level(path, rule, vocabulary, metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece(path, vocabulary, types, metadata)
    else:
        raise UnsupportedError(
            f"{path}: tokenizer.ggml.model {kind!r} is not supported; supported: gpt2 (byte-level BPE) and "
            "llama (SentencePiece BPE)"
        )
    # both kinds are matched whole, before the text is cut; only control tokens vanish from decoded text
    for kind_of_token, special in ((_UNKNOWN, True), (_CONTROL, True), (_USER_DEFINED, False)):
        added = [t for i, t in enumerate(tokens) if types[i] == kind_of_token]
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=special) for t in added])
    ids = _special_ids(path, metadata)
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or rule in _ADDS_BOS)
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    around = [name for name, wanted in (("bos", add_bos), ("eos", add_eos)) if wanted and name in ids]
    before = [f"{tokens[ids['bos']]}:0"] if "bos" in around else []
    after = [f"{tokens[ids['eos']]}:0"] if "eos" in around else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=[*before, "$A:0", "$B:1", *after],
        special_tokens=[(tokens[ids[name]], ids[name]) for name in around],
    )
    return tokenizer


def _byte_level(path: Path, rule: str, vocabulary: dict[str, int], metadata: Mapping[str, Any]) -> Tokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in _SPLITS)
    if rule in _SPLITS:
        steps = [pre_tokenizers.Split(Regex(_SPLITS[rule]), behavior="isolated"), byte_level]
    elif rule in _DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    elif rule in _GPT2:
        steps = [byte_level]
    else:
        known = ", ".join(sorted((*_SPLITS, *_DIGITS, *_GPT2)))
        raise UnsupportedError(f"{path}: tokenizer.ggml.pre {rule!r} is not supported; supported: {known}")
    pairs = metadata.get("tokenizer.ggml.merges")
    if not isinstance(pairs, list):
        raise CheckpointConfigError("metadata key tokenizer.ggml.merges is missing", file=path)
    merges = [tuple(pair.split(" ")) for pair in pairs]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise CheckpointConfigError(f"the merge {' '.join(merge)!r} does not join two tokens to one", file=path)
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=rule in _WHOLE_WORDS))
    if rule in _NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    path: Path, vocabulary: dict[str, int], types: Sequence[int], metadata: Mapping[str, Any]
) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(metadata["tokenizer.ggml.tokens"]):
        raise CheckpointConfigError("metadata key tokenizer.ggml.scores is missing or too short", file=path)
    # every way to join two tokens to a third, the best-scored result first
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(vocabulary, key=lambda t: (-scores[vocabulary[t]], vocabulary[t]))
        for cut in range(1, len(token))
        if types[vocabulary[token]] in (_NORMAL, _USER_DEFINED)
        and token[:cut] in vocabulary
        and token[cut:] in vocabulary
    ]
    unknown = _special_ids(path, metadata).get("unk")
    unknown_token = None if unknown is None else metadata["tokenizer.ggml.tokens"][unknown]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _special_ids(path: Path, metadata: Mapping[str, Any]) -> dict[str, int]:
    """Token ids of bos, eos, unk and pad, those that the file names."""
    count = len(metadata["tokenizer.ggml.tokens"])
    ids: dict[str, int] = {}
    for ours, theirs in _SPECIAL.items():
        value = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if value is None:
            continue
        if not 0 <= int(value) < count:
            raise CheckpointConfigError(f"{theirs}_token_id is {value}, there are {count} tokens", file=path)
        ids[ours] = int(value)
    return ids


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
