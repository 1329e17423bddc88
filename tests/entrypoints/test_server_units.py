"""Parts of the server without HTTP: bytes of tokens, offsets, odd numbers, options."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from anyfp4 import envs
from anyfp4.engine.tokenizer import Tokenizer
from anyfp4.entrypoints import serve
from anyfp4.entrypoints.server.choices import number
from anyfp4.entrypoints.server.config import ServerConfig
from anyfp4.entrypoints.server.run import listen, url_of
from anyfp4.entrypoints.server.token_text import Offsets, TokenText
from anyfp4.errors import EnvironmentVariableError, InvalidArgumentError, UnsupportedError


def sentencepiece(folder: Path) -> Tokenizer:
    """A tokenizer in the manner of Llama 2: ▁ for spaces, <0xNN> for bytes, a leading space that text drops."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{i:02X}>" for i in range(256)],
        "▁",
        "▁hi",
        "▁you",
        "h",
        "i",
        "y",
        "o",
        "u",
    ]
    fast = Fast(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(["<s>", "</s>", "<unk>"])
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", bos_token="<s>").save_pretrained(folder)
    return Tokenizer(folder)


def test_byte_level_tokens(tiny_model: Path) -> None:
    tokenizer = Tokenizer(tiny_model)
    names = TokenText(tokenizer)
    every = [names.bytes_of(t) for t in range(256)]
    assert sorted(b for b in every if b is not None) == [bytes([b]) for b in range(256)]
    text = "naïve ☕ 𝄞\n"
    assert b"".join(names.bytes_of(t) or b"" for t in tokenizer.encode(text)) == text.encode()
    (first, second) = tokenizer.encode("é")
    assert (names.name_of(first), names.name_of(second)) == ("bytes:\\xc3", "bytes:\\xa9")
    assert names.text_of(first) == "\ufffd"
    assert names.bytes_of(257) == b"<|end|>" and 257 in names.special and 0 not in names.special
    assert names.bytes_of(5000) is None and names.name_of(5000) == "token_id:5000" and names.text_of(5000) == ""


def test_sentencepiece_tokens(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path)
    names = TokenText(tokenizer)
    assert names.bytes_of(260) == b" hi" and names.first_bytes(260) == b"hi"
    assert names.bytes_of(3 + 0xE2) == b"\xe2" and names.name_of(3 + 0xE2) == "bytes:\\xe2"
    assert names.bytes_of(1) == b"<s>" and 1 in names.special
    tokens = [260, 261, 3 + 0xC3, 3 + 0xA9, 262]
    assert tokenizer.decode(tokens) == "hi you" + "é" + "h"
    offsets = Offsets(names, 0, skip_special_tokens=True)
    assert [offsets.add(t) for t in tokens] == [0, 2, 6, 6, 7]


def test_offsets_of_random_bytes(tiny_model: Path) -> None:
    """Against Python's own decoder."""
    names = TokenText(Tokenizer(tiny_model))
    token_of = {names.bytes_of(t): t for t in range(256)}
    rng = random.Random(0)
    alphabet = [0x41, 0x7A, 0x80, 0xA9, 0xBF, 0xC3, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF, 0xED, 0xC0]
    for _ in range(2000):
        data = bytes(rng.choices(alphabet, k=rng.randrange(1, 12)))
        offsets = Offsets(names, 10, skip_special_tokens=True)
        got = [offsets.add(token_of[bytes([b])]) for b in data]
        # up to and with byte i, so many characters have begun; the last of them is the byte's
        want = [10 + len(data[: i + 1].decode(errors="replace")) - 1 for i in range(len(data))]
        assert got == want, data


def test_numbers_that_json_lacks() -> None:
    assert number(-0.1) == -0.1 and number(float("-inf")) == -9999.0 and number(float("nan")) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"port": 70000}, "--port"),
        ({"host": ""}, "--host"),
        ({"api_key": ""}, "--api-key"),
        ({"api_key": "two words"}, "--api-key"),
        ({"max_queue": -1}, "--max-queue"),
        ({"drain_timeout": -1}, "--drain-timeout"),
        ({"drain_timeout": float("inf")}, "--drain-timeout"),
        ({"served_model_name": ""}, "--served-model-name"),
    ],
)
def test_wrong_options(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ServerConfig(**change)  # type: ignore[arg-type]


def test_the_key_is_not_printed() -> None:
    assert "secret" not in repr(ServerConfig(api_key="secret"))


def test_a_port_in_use_is_told_before_loading() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidArgumentError, match=f"cannot listen on 127.0.0.1, port {port}"):
            listen(ServerConfig(port=port))


def test_the_default_address_is_this_machine_alone() -> None:
    bound = listen(ServerConfig(port=0))
    with bound:
        assert url_of(bound).startswith("http://127.0.0.1:")
    assert (ServerConfig().host, ServerConfig().port) == ("127.0.0.1", 8000)


def options(**change: object) -> serve.Options:
    given: dict[str, object] = {
        "model": "/no/such/folder",
        "revision": None,
        "numerics": None,
        "backend": None,
        "device": None,
        "dtype": "auto",
        "max_model_len": None,
        "max_num_seqs": 64,
        "max_step_tokens": None,
        "block_size": 16,
        "kv_cache_gib": None,
        "memory_fraction": None,
        "prefix_caching": True,
        "cuda_graphs": None,
        "async_scheduling": None,
        "host": "127.0.0.1",
        "port": 0,
        "served_model_name": None,
        "api_key": None,
        "max_queue": 256,
        "max_body_mb": 8.0,
        "drain_timeout": 30.0,
        "log_requests": True,
    }
    return serve.Options(**(given | change))  # type: ignore[arg-type]


def test_options_reach_both_configurations() -> None:
    given = options(
        kv_cache_gib=0.5,
        memory_fraction=0.7,
        prefix_caching=False,
        block_size=32,
        max_body_mb=0.25,
        max_queue=3,
        api_key="k",
    )
    engine, server = given.engine(), given.server()
    assert engine.memory_fraction == 0.7 and engine.cuda_graphs is None
    assert options(cuda_graphs=False).engine().cuda_graphs is False
    assert [options(async_scheduling=on).engine().async_scheduling for on in (None, True, False)] == [None, True, False]
    assert [options(device="cpu", max_step_tokens=n).engine().max_step_tokens for n in (None, 7)] == [512, 7]
    with pytest.raises(InvalidArgumentError, match="max_step_tokens must be 1 or more"):
        options(max_step_tokens=0).engine()
    assert (engine.kv_cache_bytes, engine.enable_prefix_caching, engine.block_size) == (2**29, False, 32)
    assert (server.max_body_bytes, server.max_queue, server.api_key) == (250_000, 3, "k")
    for change, flag in (({"kv_cache_gib": 0.0}, "--kv-cache-gib"), ({"max_body_mb": 0.0}, "--max-body-mb")):
        with pytest.raises(InvalidArgumentError, match=flag):
            serve.run(options(**change))
    for fraction in (0.0, 1.1, float("nan")):
        with pytest.raises(InvalidArgumentError, match=r"memory_fraction must be in \(0, 1\]"):
            options(memory_fraction=fraction).engine()


def test_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYFP4_API_KEY", "outer")
    assert options().server().api_key == "outer" and options(api_key="inner").server().api_key == "inner"
    assert "outer" not in repr(envs.read())
    for wrong in ("", "two words", "schlüssel"):
        with pytest.raises(EnvironmentVariableError, match="ANYFP4_API_KEY"):
            envs.read({"ANYFP4_API_KEY": wrong})


def test_without_the_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "prometheus_client" else object())
    with pytest.raises(UnsupportedError, match=r"needs prometheus-client: pip install 'anyfp4\[serve\]'"):
        serve.run(options())
