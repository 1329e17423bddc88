"""What /metrics exports is what docs/metrics.md lists, and it counts right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
parser = pytest.importorskip("prometheus_client.parser")

from tests.entrypoints.serving import MODEL, Running, serving  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


@pytest.fixture
def server(tiny_model: Path) -> Iterator[Running]:
    with serving(tiny_model) as running:
        yield running


def test_the_page_lists_what_is_exported(server: Running) -> None:
    server.post("/v1/completions", {"model": MODEL, "prompt": "x"})
    exported = {}
    for family in parser.text_string_to_metric_families(server.get("/metrics").text):
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        name = family.name + ("_total" if family.type == "counter" else "")
        exported[name] = (family.type, frozenset(labels))
    listed = {}
    for line in PAGE.read_text().splitlines():
        if match := re.match(r"\| `(anyfp4_\w+)` \| (\w+) \| (.*?) ?\| (.+) \|$", line):
            listed[match[1]] = (match[2], frozenset(re.findall(r"`(\w+)`", match[3])))
    assert listed == exported


def test_the_expressions_name_what_there_is(server: Running) -> None:
    text = server.get("/metrics").text
    known = set(re.findall(r"^(anyfp4_\w+)", text, flags=re.MULTILINE)) | {"anyfp4_completions_finished_total"}
    known |= {"anyfp4_http_responses_total"}
    families = set(re.findall(r"^# TYPE (\w+)", text, flags=re.MULTILINE))
    assert set(re.findall(r"anyfp4_\w+", PAGE.read_text())) <= known | families


def test_figures(server: Running) -> None:
    body = {"model": MODEL, "prompt": ["a" * 40, "b"], "n": 3, "max_tokens": 5, "ignore_eos": True}
    server.post("/v1/completions", body)
    server.post("/v1/completions", body | {"n": 1, "stream": True})
    server.post("/v1/completions", body | {"n": 0})
    server.get("/nowhere")
    figures = {
        "anyfp4_up": 1,
        "anyfp4_sequences_running": 0,
        "anyfp4_sequences_waiting": 0,
        "anyfp4_kv_blocks_used": 0,
        "anyfp4_prompt_tokens_total": 82,
        "anyfp4_generated_tokens_total": 40,
        "anyfp4_preemptions_total": 0,
        "anyfp4_completions_finished_total": 8,
        "anyfp4_time_to_first_token_seconds_count": 2,
        "anyfp4_request_duration_seconds_count": 2,
    }
    # fewer where the server saw the first tokens of a completion all at once
    assert 0 < server.metric("anyfp4_inter_token_latency_seconds_count") <= 8 * 4
    assert {name: server.metric(name) for name in figures} == figures
    hits = server.metric("anyfp4_prefix_cache_hit_tokens_total")
    assert hits == 32 * 3  # two blocks of the long prompt: two more completions of the first request, then the second
    assert server.metric("anyfp4_prompt_tokens_computed_total") == 41 * 4 - hits
    text = server.get("/metrics").text
    assert 'anyfp4_completions_finished_total{reason="length"} 8.0' in text
    assert 'anyfp4_http_responses_total{code="200",method="POST",path="/v1/completions"} 2.0' in text
    assert 'anyfp4_http_responses_total{code="400",method="POST",path="/v1/completions"} 1.0' in text
    assert 'anyfp4_http_responses_total{code="404",method="GET",path="other"} 1.0' in text
    blocks = server.stats()
    assert server.metric("anyfp4_kv_blocks_capacity") == blocks.kv_blocks_total
    assert server.metric("anyfp4_kv_blocks_cached") == blocks.kv_blocks_cached > 0
