"""eval: perplexity, divergence, agreement and layer errors against independent computations."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from anyfp4 import LLM, EngineConfig, SamplingParams
from anyfp4.errors import InvalidArgumentError
from anyfp4.models.decoder import Decoder
from anyfp4.testing.bitwise import assert_same_bits
from anyfp4.testing.models import all_logits
from anyfp4.tools.evaluate import compare, evaluate
from anyfp4.tools.evaluate_score import Reader, divergence, windows
from anyfp4.tools.perplexity import perplexity

TEXT = (
    "It was the best of times, it was the worst of times.\nIt was the age of wisdom — it was the age of foolishness.\n"
)
CONTEXT = 40


def load(folder: Path, **options: Any) -> LLM:
    return LLM(folder, config=EngineConfig(max_num_seqs=1), **options)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return load(tiny_model)


@pytest.fixture(scope="module")
def tokens(llm: LLM) -> list[int]:
    return llm.tokenizer.encode(TEXT)


@pytest.fixture(scope="module")
def other_model(dense_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model with one weight of each layer changed a little."""
    folder = tmp_path_factory.mktemp("perturbed")
    for file in dense_model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(dense_model / "model.safetensors")
    noise = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("down_proj.weight"):
            tensors[name] = (tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=noise)).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def log_probs(model: Decoder, tokens: list[int], context: int) -> npt.NDArray[np.float64]:
    """Log-probabilities at every prediction, in float64 from the model's own logits: [predictions, vocab]."""
    rows = []
    for start in range(0, len(tokens), context):
        piece = tokens[start : start + context]
        if len(piece) > 1:
            z = all_logits(model, piece)[:-1].double().numpy()
            z = z - z.max(axis=1, keepdims=True)
            rows.append(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))
    return np.concatenate(rows)


def test_windows() -> None:
    assert windows(10, 4) == [range(4), range(4, 8), range(8, 10)]
    assert windows(9, 4) == [range(4), range(4, 8)]  # one token left: nothing predicts it
    assert windows(4, 4) == [range(4)]
    assert windows(2, 100) == [range(2)]


def test_losses_are_those_of_the_engine(llm: LLM, tokens: list[int]) -> None:
    """The engine scores a prompt on its own path, with its own cache and sampler; the bits are the same."""
    score = evaluate(llm.engine.model, tokens, context=CONTEXT)
    expected = []
    for window in windows(len(tokens), CONTEXT):
        piece = tokens[window.start : window.stop]
        output = llm.generate(piece, SamplingParams(max_tokens=0, prompt_logprobs=0))[0]
        assert output.prompt_logprobs is not None
        expected += [-lp[t].logprob for t, lp in zip(piece, output.prompt_logprobs, strict=True) if lp is not None]
    assert score.losses.tolist() == expected
    assert score.perplexity == math.exp(math.fsum(expected) / len(expected))
    got = perplexity(llm, tokens, window=CONTEXT)
    assert (got.perplexity, got.predictions, got.tokens) == (score.perplexity, len(expected), len(tokens))


def test_perplexity_is_that_of_transformers_in_float64(dense_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    llm = load(dense_model, dtype="float32")
    tokens = llm.tokenizer.encode(TEXT)
    model = AutoModelForCausalLM.from_pretrained(dense_model, dtype=torch.float64, local_files_only=True)
    losses: list[float] = []
    with torch.no_grad():
        for start in range(0, len(tokens), CONTEXT):
            piece = torch.tensor(tokens[start : start + CONTEXT])
            logprobs = torch.log_softmax(model(piece[None]).logits[0, :-1].double(), dim=-1)
            losses += (-logprobs.gather(1, piece[1:, None]).squeeze(1)).tolist()
    score = evaluate(llm.engine.model, tokens, context=CONTEXT)
    # some 30 roundings to float32 on the way to a logit of up to 2⁵, each grown at most 2⁴ times: 30·2⁻²⁴·2⁹ < 10⁻³
    assert np.abs(score.losses - np.array(losses)).max() < 1e-3
    assert abs(math.log(score.perplexity) - sum(losses) / len(losses)) < 1e-4


@pytest.mark.parametrize("chunk", [7, 512])
def test_chunks_and_tiles_do_not_matter(
    llm: LLM, tokens: list[int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(llm.engine.model, tokens, context=CONTEXT).losses
    monkeypatch.setattr("anyfp4.tools.evaluate_score._CHUNK", chunk)
    monkeypatch.setattr("anyfp4.tools.evaluate_score._TILE_LOGITS", 3 * 261)
    assert evaluate(llm.engine.model, tokens, context=CONTEXT).losses.tolist() == expected.tolist()


def test_a_model_against_itself(llm: LLM, tokens: list[int]) -> None:
    score, comparison = compare(llm.engine.model, llm.engine.model, tokens, context=CONTEXT)
    assert comparison.kl_mean == comparison.kl_p99 == comparison.kl_max == 0.0 and not comparison.kl.any()
    assert comparison.agreement == 1.0
    assert comparison.layer_errors == (0.0, 0.0, 0.0)
    assert score.losses.tolist() == comparison.reference.losses.tolist()


def test_against_a_perturbed_model(dense_model: Path, other_model: Path) -> None:
    model, reference = (load(f).engine.model for f in (other_model, dense_model))
    tokens = load(dense_model).tokenizer.encode(TEXT)
    score, comparison = compare(model, reference, tokens, context=CONTEXT)
    q, p = log_probs(model, tokens, CONTEXT), log_probs(reference, tokens, CONTEXT)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    assert len(comparison.kl) == len(kl) == len(score.losses)
    # sums of 261 float64 terms of up to 2⁵
    assert np.abs(comparison.kl - kl).max() < 1e-12
    assert kl.max() > 1e-3
    assert comparison.kl_mean == pytest.approx(kl.mean(), abs=1e-13)
    assert comparison.kl_max == comparison.kl.max()
    ordered = sorted(comparison.kl)
    place = 0.99 * (len(ordered) - 1)
    low, share = int(place), place - int(place)
    assert comparison.kl_p99 == pytest.approx(ordered[low] + share * (ordered[low + 1] - ordered[low]), rel=1e-12)
    assert comparison.agreement == (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    assert 0.3 < comparison.agreement < 1
    assert (comparison.kl > 0).all()


def test_layer_errors_are_those_of_transformers(dense_model: Path, other_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    llms = [load(f, dtype="float32") for f in (other_model, dense_model)]
    tokens = llms[0].tokenizer.encode(TEXT)[:CONTEXT]
    _, comparison = compare(llms[0].engine.model, llms[1].engine.model, tokens, context=CONTEXT)
    states = []
    for folder in (other_model, dense_model):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, local_files_only=True)
        # the last one that transformers keeps has passed the final norm, so it is taken at the layer itself
        last: list[Any] = []
        model.model.layers[-1].register_forward_hook(lambda *a, keep=last: keep.append(a[2]))
        with torch.no_grad():
            found = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        state = last[0][0] if isinstance(last[0], tuple) else last[0]
        states.append([*(h[0] for h in found[:-1]), state.reshape(len(tokens), -1)])
    expected = [float((a - b).norm() / b.norm()) for a, b in zip(*states, strict=True)]
    assert comparison.layer_errors is not None and len(comparison.layer_errors) == len(expected) == 3
    assert comparison.layer_errors[0] == expected[0] == 0
    for got, want in zip(comparison.layer_errors[1:], expected[1:], strict=True):
        assert want > 0.01 and abs(got - want) < 1e-5  # float32 against float64


def test_the_last_state_is_the_one_the_model_uses(llm: LLM, tokens: list[int]) -> None:
    model = llm.engine.model
    reader = Reader(model, CONTEXT)
    piece = tokens[:CONTEXT]
    *_, last = reader.states(piece)
    normed = model.ops.rms_norm(last, model.norm, model.config.rms_norm_eps)
    assert_same_bits(normed, reader.hidden(piece))


def test_models_of_other_shapes_have_no_layer_errors(llm: LLM, tokens: list[int]) -> None:
    from dataclasses import replace

    model = llm.engine.model
    shallow = replace(model, blocks=model.blocks[:1], config=replace(model.config, num_layers=1))
    _, comparison = compare(model, shallow, tokens, context=CONTEXT)
    assert comparison.layer_errors is None and comparison.kl_mean > 0


def test_divergence_of_impossible_tokens() -> None:
    p = torch.tensor([[0.0, -torch.inf, 0.0], [0.0, 0.0, 0.0]])
    q = torch.tensor([[0.0, 0.0, 0.0], [0.0, -torch.inf, 0.0]])
    kl, same = divergence(p, q)
    # P = (½, 0, ½) against Q = (⅓, ⅓, ⅓); then P gives weight to what Q excludes
    assert kl[0].item() == pytest.approx(math.log(1.5), abs=1e-15) and kl[1].item() == math.inf
    assert same.tolist() == [True, True]


def test_a_nan_is_an_error(llm: LLM, tokens: list[int]) -> None:
    from dataclasses import replace

    broken = replace(llm.engine.model, norm=torch.full_like(llm.engine.model.norm, torch.nan))
    with pytest.raises(InvalidArgumentError, match="NaN"):
        evaluate(broken, tokens, context=CONTEXT)


# --- the command


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_the_command(call: Any, tiny_model: Path, text: Path, llm: LLM, tokens: list[int]) -> None:
    code, out, _ = call("eval", tiny_model, "--text", text, "--context", CONTEXT, "--json")
    found = json.loads(out)
    score = evaluate(llm.engine.model, tokens, context=CONTEXT)
    assert code == 0 and found["against"] is None and found["comparison"] is None
    assert found["model"]["perplexity"] == score.perplexity
    assert found["model"]["predictions"] == len(score.losses)
    # bits per byte: mean bits of a token × tokens per byte
    assert found["model"]["bits_per_byte"] == pytest.approx(
        score.losses.mean() / math.log(2) * len(tokens) / len(TEXT.encode()), rel=1e-12
    )
    assert found["text"]["all_bytes"] == len(TEXT.encode()) > len(TEXT)
    code, out, _ = call("eval", tiny_model, "--text", text, "--context", CONTEXT)
    assert code == 0 and f"{score.perplexity:.4f}" in out and "tokens/s" in out


def test_max_tokens_and_default_context(call: Any, tiny_model: Path, text: Path, llm: LLM, tokens: list[int]) -> None:
    code, out, _ = call("eval", tiny_model, "--text", text, "--max-tokens", 50, "--json")
    found = json.loads(out)
    assert code == 0 and found["text"]["tokens"] == 50 and found["text"]["context"] == 256
    assert found["model"]["perplexity"] == evaluate(llm.engine.model, tokens[:50], context=256).perplexity


def test_comparing_numerics_is_exact_on_a_cpu(call: Any, tiny_model: Path, text: Path) -> None:
    words = ["eval", tiny_model, "--text", text, "--context", CONTEXT]
    code, out, _ = call(*words, "--against-numerics", "blackwell", "--json")
    found = json.loads(out)
    assert code == 0 and (found["model"]["numerics"], found["against"]["numerics"]) == ("native", "blackwell")
    assert found["comparison"]["kl_max"] == 0 and found["comparison"]["top1_agreement"] == 1


def test_comparing_models_with_plots(call: Any, tiny_model: Path, dense_model: Path, text: Path) -> None:
    plot, page = text.with_name("p.svg"), text.with_name("p.html")
    words = ["eval", tiny_model, "--text", text, "--context", CONTEXT, "--against", dense_model]
    code, out, err = call(*words, "--plot", plot, "--report", page)
    assert code == 0 and "KL divergence, mean" in out and "same most likely token" in out and "reference: " in out
    assert str(plot) in err and str(page) in err
    root = ET.fromstring(plot.read_text())
    assert len(root.findall("{http://www.w3.org/2000/svg}svg")) == 3
    html = page.read_text()
    assert "Relative error of the hidden states" in html and "layer 1" in html
    assert not any(w in html.replace('xmlns="http://www.w3.org/2000/svg"', "") for w in ("http", "src=", "url("))


def test_another_dtype(call: Any, tiny_model: Path, text: Path) -> None:
    words = ["eval", tiny_model, "--text", text, "--context", CONTEXT, "--json", "--against-dtype", "float32"]
    code, out, _ = call(*words)
    found = json.loads(out)
    assert code == 0 and (found["model"]["dtype"], found["against"]["dtype"]) == ("bfloat16", "float32")
    assert 0 < found["comparison"]["kl_mean"] < 1 and len(found["comparison"]["layer_errors"]) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "/no/such/file"], "--text /no/such/file: No such file or directory"),
        (["--text", "."], "--text .: Is a directory"),
        (["--text", "EMPTY"], "the file is empty"),
        (["--text", "SHORT"], "1 tokens; at least 2 are needed"),
        (["--text", "LATIN"], "not UTF-8"),
        (["--text", "TEXT", "--context", "1"], "--context must be 2 or more"),
        (["--text", "TEXT", "--context", "1000"], "--context 1000: the model has 256 positions"),
        (["--text", "TEXT", "--max-tokens", "1"], "--max-tokens must be 2 or more"),
        (["--text", "TEXT", "--layer-tokens", "0"], "--layer-tokens must be 1 or more"),
        (["--text", "TEXT", "--plot", "p.png"], "--plot p.png: the name must end in .svg"),
        (["--text", "TEXT", "--report", "r.pdf"], "--report r.pdf: the name must end in .html"),
        (["--text", "TEXT", "--plot", "/no/such/p.svg"], "no folder /no/such"),
        (["--text", "TEXT", "--against", "/no/such/model"], "no such folder"),
        (["--text", "TEXT", "--against-dtype", "int8"], "dtype must be auto or one of"),
        (["--text", "TEXT", "--against-backend", "marlin"], "unknown backend 'marlin'"),
    ],
)
def test_errors_are_one_line(call: Any, tiny_model: Path, text: Path, words: list[str], message: str) -> None:
    places = {"TEXT": text}
    for name, content in {"EMPTY": b"", "SHORT": b"x", "LATIN": b"caf\xe9 au lait"}.items():
        places[name] = text.with_name(name)
        places[name].write_bytes(content)
    code, out, err = call("eval", tiny_model, *[places.get(w, w) for w in words])
    assert code == 1 and out == "" and err.startswith("error: ") and message in err and "Traceback" not in err


def test_another_tokenizer_is_refused(call: Any, tiny_model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyfp4.engine.tokenizer import Tokenizer

    original, calls = Tokenizer.encode, iter(range(10))
    monkeypatch.setattr(Tokenizer, "encode", lambda self, t: original(self, t) if next(calls) == 0 else [1, 2, 3])
    code, out, err = call("eval", tiny_model, "--text", text, "--against", tiny_model)
    assert code == 1 and out == "" and "its tokenizer reads the text differently (token 0 is 1, not" in err
