"""The command line as a user sees it: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import anyfp4
from anyfp4 import LLM, SamplingParams
from anyfp4.entrypoints import cli


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of ``anyfp4 words…``."""
    monkeypatch.setattr(sys, "argv", ["anyfp4", *words])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        cli.main()
        sys.exit(0)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    return lambda *words: run(capsys, monkeypatch, *map(str, words))


def test_generate_streams_what_the_api_gives(call, tiny_model: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, err = call("generate", tiny_model, "hello", "--max-tokens", 8)
    assert code == 0
    expected = LLM(tiny_model).chat([{"role": "user", "content": "hello"}], SamplingParams(temperature=0, max_tokens=8))
    assert out == expected[0].outputs[0].text + "\n"
    assert "tokens/s" in err and "finished: " in err


def test_generate_json_and_options(call, tiny_model: Path) -> None:  # type: ignore[no-untyped-def]
    words = ["generate", tiny_model, "hello", "--raw", "--json", "--max-tokens", 4, "--temperature", 1, "--logprobs", 2]
    code, out, err = call(*words, "--seed", 7, "-n", 2, "--numerics", "blackwell")
    assert code == 0 and "seed 7" in err
    got = json.loads(out)
    params = SamplingParams(n=2, temperature=1, seed=7, max_tokens=4, logprobs=2)
    want = LLM(tiny_model, numerics="blackwell").generate("hello", params)[0]
    assert got["prompt_token_ids"] == list(want.prompt_token_ids)
    assert [o["token_ids"] for o in got["outputs"]] == [list(c.token_ids) for c in want.outputs]
    assert [len(lp) for lp in got["outputs"][0]["logprobs"]] == [len(lp) for lp in want.outputs[0].logprobs or ()]


def test_generate_logprobs_table(call, tiny_model: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = call("generate", tiny_model, "hello", "--max-tokens", 3, "--logprobs", 2)
    assert code == 0 and "log-probabilities" in out and "most likely" in out


def test_generate_from_a_file(call, tiny_model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    code, out, _ = call("generate", tiny_model, "--file", tmp_path / "prompts.txt", "--max-tokens", 3)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [line["index"] for line in lines] == [0, 1]
    (tmp_path / "p.jsonl").write_text('"one"\n{"prompt": [1, 2]}\n{"messages": [{"role": "user", "content": "two"}]}\n')
    code, out, _ = call("generate", tiny_model, "--file", tmp_path / "p.jsonl", "--max-tokens", 3)
    again = [json.loads(line) for line in out.splitlines()]
    assert again[0]["outputs"] == lines[0]["outputs"] and again[2]["outputs"] == lines[1]["outputs"]
    assert again[1]["prompt_token_ids"] == [1, 2]


def test_quantize_then_inspect(call, dense_model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out_folder = tmp_path / "out"
    code, out, err = call("quantize", dense_model, out_folder, "--format", "modelopt", "--ignore", "*.layers.1.mlp.*")
    assert code == 0 and "11 layers quantized, 3 left dense" in out and "built-in text" in err
    code, out, _ = call("inspect", out_folder, "--json")
    report = json.loads(out)
    assert code == 0 and report["layout"] == "modelopt" and report["refusals"] == []
    assert [k["layers"] for k in report["kinds"] if k["name"] == "NVFP4 W4A4"] == [11]
    code, out, _ = call("inspect", out_folder)
    assert code == 0 and "nothing refused" in out


def test_inspect_of_a_damaged_model_exits_with_1(call, tiny_model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: -100 if file.suffix == ".safetensors" else None])
    code, out, _ = call("inspect", tmp_path)
    assert code == 1 and "model.safetensors" in out


def test_backends(call) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = call("backends", "--json")
    rows = json.loads(out)
    assert code == 0 and sum(row["chosen"] for row in rows) == 1
    assert all(row["chosen"] or row["why_not"] for row in rows)
    code, out, _ = call("backends", "--backend", "reference")
    assert code == 0 and "chosen" in out


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "anyfp4", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == anyfp4.__version__ + "\n"


def test_version_and_help(call) -> None:  # type: ignore[no-untyped-def]
    assert call("--version")[:2] == (0, anyfp4.__version__ + "\n")
    code, out, _ = call("generate", "--help")
    assert code == 0 and "--numerics" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "MODEL"], "give either a PROMPT or --file"),
        (["generate", "MODEL", "x", "--file", "y"], "give either a PROMPT or --file"),
        (["generate", "/no/such/folder", "x"], "no such folder"),
        (["generate", "nonsense", "x"], "neither a folder"),
        (["generate", "no-such-owner/no-such-model", "x"], "no-such-owner/no-such-model"),
        (["generate", "MODEL", "x", "--top-p", "2"], "top_p must be in"),
        (["generate", "MODEL", "x", "--backend", "marlin"], "unknown backend 'marlin'"),
        (["generate", "MODEL", "--file", "/no/such/file"], "--file /no/such/file"),
        (["generate", "MODEL", "x", "--raw", "--system", "s"], "--system needs a chat template"),
        (["backends", "--device", "tpu"], "device 'tpu'"),
        (["quantize", "MODEL", "OUT"], "quantized already"),
    ],
)
def test_errors_are_one_line(call, tiny_model: Path, tmp_path: Path, words: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    places = {"MODEL": str(tiny_model), "OUT": str(tmp_path / "out")}
    code, out, err = call(*[places.get(w, w) for w in words])
    assert code == 1 and out == ""
    assert err.startswith("error: ") and message in err and "Traceback" not in err


def test_a_wrong_variable_is_reported(call, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("ANYFP4_NUMERICS", "fast")
    code, _, err = call("backends")
    assert code == 1 and "ANYFP4_NUMERICS='fast'" in err


def test_the_installed_command_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "anyfp4.entrypoints.cli", "backends"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "chosen" in done.stdout
