"""lm-eval's ``local-completions`` scores through the server; its figures are those of the model by itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("lm_eval")
pytest.importorskip("tenacity", reason="lm-eval's API models need it")

from anyfp4 import LLM, SamplingParams
from tests.entrypoints.serving import MODEL, serving

CHOICES = [
    {"text": f"{first} and {second}", "choices": [" one", " another", " thé"], "answer": (first + second) % 3}
    for first in range(3)
    for second in range(4)
]
TEXTS = [{"text": "a line of text\nand another"}, {"text": "something else: naïve ☕"}, {"text": "short"}]
GENERATE = [{"text": f"count {n}"} for n in range(4)]


def write_tasks(folder: Path) -> None:
    """Three kinds of task on local text: choice by likelihood, perplexity, generation."""
    for name, rows in (("choices", CHOICES), ("texts", TEXTS), ("generate", GENERATE)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {}\ntest_split: test\n"
    (folder / "choices.yaml").write_text(
        "task: local_choices\n" + common.format(folder / "choices.jsonl") + "output_type: multiple_choice\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: choices\ndoc_to_target: answer\ntarget_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (folder / "texts.yaml").write_text(
        "task: local_texts\n" + common.format(folder / "texts.jsonl") + "output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    (folder / "generate.yaml").write_text(
        "task: local_generate\n" + common.format(folder / "generate.jsonl") + "output_type: generate_until\n"
        'doc_to_text: "{{text}}"\ndoc_to_target: "x"\n'
        'generation_kwargs:\n  until: ["never seen"]\n  max_gen_toks: 8\n  do_sample: false\n'
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )


def score(llm: LLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether every token of it is the likeliest."""
    tokens = context + continuation
    output = llm.generate(tokens, SamplingParams(max_tokens=0, prompt_logprobs=1))[0]
    scores = output.prompt_logprobs or ()
    own = [scores[i][tokens[i]] for i in range(len(context), len(tokens))]  # type: ignore[index]
    return sum(e.logprob for e in own), all(e.rank == 1 for e in own)


def test_lm_eval(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    write_tasks(tmp_path)
    llm = LLM(tiny_model)
    with serving(tiny_model) as server:
        results: Any = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": MODEL,
                "base_url": server.url + "/v1/completions",
                "tokenizer": str(tiny_model),
                "tokenizer_backend": "huggingface",
                "num_concurrent": 8,
                "max_length": 256,
                "max_retries": 1,
            },
            tasks=["local_choices", "local_texts", "local_generate"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    encode = llm.tokenizer.encode
    right = 0
    for sample in results["samples"]["local_choices"]:
        doc = sample["doc"]
        want = [score(llm, encode(doc["text"]), encode(choice)) for choice in doc["choices"]]
        assert [tuple(r[0]) for r in sample["resps"]] == want
        right += max(range(3), key=lambda i: want[i][0]) == doc["answer"]
    assert results["results"]["local_choices"]["acc,none"] == right / len(CHOICES)
    end = list(llm.tokenizer.eos_token_ids)
    total = sum(score(llm, end, encode(row["text"]))[0] for row in TEXTS)
    size = sum(len(row["text"].encode()) for row in TEXTS)
    bits = results["results"]["local_texts"]["bits_per_byte,none"]
    assert math.isclose(bits, -total / size / math.log(2), rel_tol=1e-12)  # lm-eval adds in an order of its own
    for sample in results["samples"]["local_generate"]:
        want_text = llm.generate(sample["doc"]["text"], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text
        assert sample["resps"][0][0] == want_text
