"""Paths beside completions: models, tokens, metrics, slots, the description, and how benchmark clients read streams."""

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.scripted_engine import CONTEXT, SLOTS, VOCABULARY, HttpServer, serving, stats

# ---- models and tokens ----


def test_the_openai_package_lists_the_models(server: HttpServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    first, second = client.models.list()
    assert (first.id, first.owned_by, second.id) == ("tiny", "stagdist", "alias")
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_the_limits_of_the_model_are_in_its_entry(http: httpx.Client) -> None:
    entry = http.get("/v1/models").json()["data"][0]
    assert (entry["max_model_len"], entry["root"]) == (CONTEXT, "tiny-model")
    assert entry["meta"]["sections"] == entry["meta"]["stages"] == 2
    assert "/models/" not in http.get("/v1/models").text, "no folder of the machine is shown"


def test_names_of_the_settings_replace_those_of_the_engine(tmp_path: Path) -> None:
    with serving(tmp_path, names=("org/served",), any_model=True) as server, server.client() as http:
        assert [entry["id"] for entry in http.get("/v1/models").json()["data"]] == ["org/served"]
        assert http.get("/v1/models/org/served").status_code == 200
        answer = http.post("/v1/completions", json={"model": "gpt-5", "prompt": "x", "max_tokens": 1})
        assert answer.json()["model"] == "org/served"


def test_tokens_of_a_text_and_back(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "é!", "return_token_strs": True}).json()
    assert answer == {
        "count": 3,
        "max_model_len": CONTEXT,
        "tokens": [195, 169, 33],
        "token_strs": ["bytes:\\xc3", "bytes:\\xa9", "!"],
    }
    assert http.post("/tokenize", json={"content": "é!", "add_special_tokens": False}).json()["tokens"] == [
        195,
        169,
        33,
    ]
    assert http.post("/detokenize", json={"tokens": [195, 169, 33, 256]}).json()["prompt"] == "é!<|endoftext|>"
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()
    assert bytes(chat["tokens"]).decode() == "<user>x<assistant>"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "give `prompt` or `messages`"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "give `prompt` or `messages`"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/detokenize", {"tokens": [VOCABULARY]}, f"the vocabulary has {VOCABULARY}"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_wrong_requests_for_tokens(http: httpx.Client, path: str, body: dict[str, Any], words: str) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_lm_evaluation_harness_learns_the_tokenizer(http: httpx.Client) -> None:
    answer = http.get("/tokenizer_info").json()
    assert (answer["eos_token"], answer["bos_token"]) == ("<|endoftext|>", None)
    assert "message.role" in answer["chat_template"]


# ---- state ----


def test_slots_and_the_wish_for_a_free_one(tmp_path: Path) -> None:
    with serving(tmp_path) as server, server.client() as http:
        state = http.get("/slots").json()
        assert state["state"] == "ready"
        assert [slot["phase"] for slot in state["stats"]["slots"]] == ["free", "free"]
        assert http.get("/slots?fail_on_no_slot=1").status_code == 200
        busy = {"request_id": "cmpl-1/0", "phase": "decode", "position": 7, "cached": 0}
        server.engine.send({"kind": "stats", **stats(slots=[busy, busy])})
        server.engine.send({"kind": "state", "state": "draining", "reason": ""})
        server.wait_for("draining")
        assert http.get("/slots?fail_on_no_slot=1").status_code == 503


def test_the_version_is_that_of_the_engine(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": "0.1.0"}


def test_prometheus_reads_the_metrics(http: httpx.Client) -> None:
    http.post("/v1/completions", json={"prompt": ["abc", "d"], "n": 2, "max_tokens": 3})
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    kinds = {name: family.type for name, family in families.items()}
    assert kinds["stagdist:num_requests_running"] == kinds["stagdist:kv_cache_usage_perc"] == "gauge"
    assert kinds["stagdist:prompt_tokens"] == kinds["stagdist:request_success"] == "counter"
    assert kinds["stagdist:time_to_first_token_seconds"] == "histogram"
    for family in families.values():
        names = {"model_name", "engine"} if family.name.startswith("stagdist:") else {"handler", "method"}
        names = set() if family.name.startswith("process_") else names
        assert all(names <= set(sample.labels) for sample in family.samples), family.name
    (memory,) = families["process_resident_memory_bytes"].samples
    assert 10 << 20 < memory.value < 1 << 30
    (info,) = families["stagdist:model_info"].samples
    assert (info.labels["sections"], info.labels["precision"], info.value) == ("2", "fp32", 1)
    (cache,) = families["stagdist:cache_config_info"].samples
    assert (cache.labels["block_size"], cache.labels["num_gpu_blocks"], cache.value) == ("1", str(SLOTS * CONTEXT), 1)
    ended = {sample.labels["finished_reason"] for sample in families["stagdist:request_success"].samples}
    assert ended >= {"stop", "length", "abort"}
    stages = {sample.labels["kind"]: sample.value for sample in families["stagdist:stage_seconds"].samples}
    assert stages == {"compute": 1.5, "memory": 0.25, "token": 0.5, "send": 0.125}


def test_metrics_count_what_passed(tmp_path: Path) -> None:
    with serving(tmp_path, metrics_prefix="vllm:") as server, server.client() as http:
        http.post("/v1/completions", json={"prompt": "abc", "n": 2, "max_tokens": 3})
        http.post("/v1/completions", json={"prompt": "abc", "max_tokens": -1})
        server.engine.send({"kind": "stats", **stats(running=1, waiting=2)})
        server.engine.send({"kind": "state", "state": "draining", "reason": ""})
        server.wait_for("draining")
        found = server.metrics()
    expected = {
        "request_success_total": 2,
        "time_to_first_token_seconds_count": 2,
        "inter_token_latency_seconds_count": 4,
        "e2e_request_latency_seconds_count": 2,
        "request_generation_tokens_sum": 6,
        "request_max_num_generation_tokens_sum": 3,
        "request_prompt_tokens_sum": 6,
        "request_params_n_sum": 2,
        "request_params_max_tokens_sum": 3,
        "iteration_tokens_total_sum": 6,
        "num_requests_running": 1,
        "num_requests_waiting": 2,
        "kv_cache_usage_perc": 0.1,
        "prefix_cache_hits_total": 30,
        "step_seconds": 0.008,
        "slots_busy": 0,
        "engine_healthy": 0,
    }
    assert {name: found["vllm:" + name] for name in expected} == expected
    assert found["vllm:request_queue_time_seconds_sum"] == pytest.approx(0.2)
    assert found["vllm:request_prefill_time_seconds_sum"] == pytest.approx(0.2)
    assert found["http_requests_total"] >= 2


def test_paths_that_do_not_exist_make_no_metrics_of_their_own(server: HttpServer, http: httpx.Client) -> None:
    """Otherwise a scanner would fill the memory."""
    for number in range(20):
        http.get(f"/random-{number}")
    text = http.get("/metrics").text
    assert "random" not in text
    assert 'handler="none"' in text


# ---- the description ----


def references(part: Any) -> set[str]:
    if isinstance(part, dict):
        own = {part["$ref"]} if isinstance(part.get("$ref"), str) else set()
        return own.union(*(references(value) for value in part.values()))
    return set().union(*(references(value) for value in part)) if isinstance(part, list) else set()


def test_the_description_is_complete(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert references(document) == {f"#/components/schemas/{name}" for name in references_names(document)}
    assert references_names(document) <= set(schemas)
    for path, operations in document["paths"].items():
        for method in operations:
            answer = http.request(method.upper(), path.replace("{model}", "tiny"), json={})
            assert answer.status_code in map(int, operations[method]["responses"]), path
    completion = schemas["CompletionRequest"]
    assert completion["required"] == ["prompt"]
    assert {"echo", "logprobs", "stop", "logit_bias", "top_k", "stream_options"} <= set(completion["properties"])


def references_names(document: Any) -> set[str]:
    return {reference.removeprefix("#/components/schemas/") for reference in references(document)}


# ---- how benchmark clients read streams ----


def test_vllm_bench_reads_a_stream(http: httpx.Client) -> None:
    """As `async_request_openai_completions` of vLLM does."""
    body = {
        "model": "tiny",
        "prompt": "Hi",
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 5,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    text, output_tokens, chunks = "", 0, 0
    with http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "bench-0"}) as answer:
        for message in answer.iter_raw():
            for line in message.decode().split("\n\n"):
                if not line.strip() or line.startswith(":"):
                    continue
                chunk = line.removeprefix("data: ")
                if chunk == "[DONE]":
                    continue
                data = json.loads(chunk)
                if choices := data.get("choices"):
                    chunks += 1
                    text += choices[0].get("text") or ""
                elif usage := data.get("usage"):
                    output_tokens = usage.get("completion_tokens")
    assert (text, output_tokens, chunks) == ("abcde", 5, 5)


def test_ray_s_llmperf_reads_a_stream(http: httpx.Client) -> None:
    """As `OpenAIChatCompletionsClient` of llmperf does: six bytes are cut off every line."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 4}
    text = ""
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        for chunk in answer.iter_lines():
            chunk = chunk.strip()
            if not chunk:
                continue
            chunk = chunk[len("data: ") :]
            if chunk == "[DONE]":
                continue
            data = json.loads(chunk)
            assert "error" not in data
            delta = data["choices"][0]["delta"]
            text += delta.get("content", "")
    assert text == "abcd"
