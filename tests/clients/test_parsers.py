"""What programs that are not installable here read: the metrics, and streams as benchmark clients parse them."""

import json
import re
import time
import urllib.request
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.clients.conftest import Served
from tests.launch.runs import ROOT


def lines_of(served: Served, path: str, body: dict[str, Any]) -> list[bytes]:
    """The raw lines of a streamed answer."""
    data = json.dumps(body | {"model": "tiny", "stream": True}).encode()
    request = urllib.request.Request(f"{served.url}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        return list(answer)


def test_vllm_bench_counts_a_chunk_per_token(served: Served) -> None:
    """The loop of vllm/benchmarks/lib/endpoint_request_func.py: the first chunk with choices is the first token."""
    body = {
        "prompt": "ab", "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 9, "logprobs": None,
        "ignore_eos": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    tokens, text, usage = 0, "", 0
    for line in lines_of(served, "v1/completions", body):
        if not (chunk := line.strip()) or chunk.startswith(b":"):
            continue
        content = chunk.decode().removeprefix("data: ")
        if content == "[DONE]":
            break
        data = json.loads(content)
        if choices := data.get("choices"):
            tokens += 1
            text += choices[0]["text"] or ""
        elif data.get("usage"):
            usage = data["usage"]["completion_tokens"]
    assert tokens == usage == 9


def test_llmperf_reads_every_line(served: Served) -> None:
    """ray's llmperf cuts six bytes off every line that is not empty and reads the rest as JSON."""
    text, first = "", None
    body = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 7}
    for line in lines_of(served, "v1/chat/completions", body):
        if not line.strip():
            continue
        content = line.strip()[len(b"data: ") :]
        if content == b"[DONE]":
            continue
        data = json.loads(content)
        assert "error" not in data
        delta = data["choices"][0]["delta"]
        first = first or delta
        text += delta.get("content") or ""
    assert first == {"role": "assistant", "content": ""}


def metrics_of(served: Served) -> dict[str, Any]:
    """All metrics by name."""
    text = served.get("metrics").decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_metrics_are_what_prometheus_reads_and_count_requests(served: Served) -> None:
    def total(name: str) -> float:
        samples = metrics_of(served)[name].samples
        return sum(sample.value for sample in samples if not sample.name.endswith("_created"))

    before = total("stagdist:generation_tokens")
    served.post("v1/completions", {"prompt": "ab", "max_tokens": 6, "ignore_eos": True})
    deadline = time.monotonic() + 5  # the engine sends its numbers once a second when it has nothing else to send
    while total("stagdist:generation_tokens") < before + 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert total("stagdist:generation_tokens") >= before + 6  # those of the test before may be counted only now
    assert total("stagdist:engine_healthy") == 1
    labels = metrics_of(served)["stagdist:model_info"].samples[0].labels
    assert (labels["model_name"], labels["sections"], labels["stages"]) == ("tiny", "2", "2")


def test_a_page_that_is_closed_is_no_lost_client(served: Served) -> None:
    def count(name: str, **labels: str) -> float:
        samples = metrics_of(served)[name].samples
        return sum(one.value for one in samples if one.name == f"{name}_total" and labels.items() <= one.labels.items())

    lost, closed = (
        count("stagdist:http_requests_client_disconnected"),
        count("http_requests", handler="/live/events"),
    )
    with urllib.request.urlopen(f"{served.url}/live/events", timeout=10) as events:
        assert events.readline().startswith(b"retry:") and events.readline() == b"\n"
        state = json.loads(events.readline().removeprefix(b"data: "))
    assert state["state"] == "ready" and len(state["stats"]["slots"]) == 4
    deadline = time.monotonic() + 10
    while count("http_requests", handler="/live/events") == closed:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert count("stagdist:http_requests_client_disconnected") == lost


def test_the_dashboard_asks_for_metrics_that_exist(served: Served) -> None:
    served.post("v1/completions", {"prompt": "ab", "max_tokens": 3})
    dashboard = json.loads((ROOT / "docs" / "serving" / "grafana.json").read_text())
    asked = set(re.findall(r"\b((?:stagdist:|http_)\w+)\{?", json.dumps(dashboard["panels"])))
    families = metrics_of(served)
    known = {sample.name for family in families.values() for sample in family.samples}
    known |= {f"{name}_total" for name in families}  # counters that have not counted yet have no sample
    assert len(asked) > 20 and asked <= known, asked - known
