"""Metrics for Prometheus: vLLM's names where they mean the same, so that its dashboards and routers work."""

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stagdist.serving.http.generation import TextGeneration
from stagdist.serving.protocol import FAILURES, FINISH_REASONS, Output, ServedModel, Stats

_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
_REQUEST_S = (
    *(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_STEP_TOKENS = (1, 2, 4, *range(8, 65, 8), *(128 * 2**power for power in range(8)))

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From the arrival of a request to its first token.", _FIRST_TOKEN_S),
    "inter_token_latency_seconds": ("Between tokens of a request.", _TOKEN_S),
    "request_time_per_output_token_seconds": ("Mean time between tokens of a request.", _TOKEN_S),
    "e2e_request_latency_seconds": ("From the arrival of a request to its last token.", _REQUEST_S),
    "request_queue_time_seconds": ("From the submission to a slot.", _REQUEST_S),
    "request_prefill_time_seconds": ("From the slot to the first token.", _REQUEST_S),
    "request_decode_time_seconds": ("From the first token to the last.", _REQUEST_S),
    "request_inference_time_seconds": ("From the slot to the last token.", _REQUEST_S),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens that a request generated.", _TOKENS),
    "request_max_num_generation_tokens": ("Most tokens of a choice of a request.", _TOKENS),
    "request_params_max_tokens": ("`max_tokens` of a request.", _TOKENS),
    "request_params_n": ("`n` of a request.", (1, 2, 5, 10, 20)),
    "iteration_tokens_total": ("Tokens that one operation of the engine generated.", _STEP_TOKENS),
}

_STAGE_KINDS = {"compute_s": "compute", "wait_memory_s": "memory", "wait_token_s": "token", "send_s": "send"}


class ServerMetrics:
    """Counts what passes through the HTTP process; the engine's own numbers are read when they are asked for.

    Args:
        prefix: of all names except those of HTTP requests and of the process, which have the usual ones.

    Attributes:
        model: the model that is served; None before the engine has said.
        stats: the engine's latest numbers.
        healthy: whether requests are served.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        disable_created_metrics()  # a time for each counter and histogram, which no dashboard reads
        self._registry = CollectorRegistry()
        self._registry.register(_EngineNumbers(self))
        ProcessCollector(registry=self._registry)  # of the HTTP process, with the usual names
        self.model: ServedModel | None = None
        self.stats: Stats | None = None
        self.healthy = False
        self._histograms = {
            name: Histogram(prefix + name, text, ("model_name", "engine"), buckets=buckets, registry=self._registry)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._observed: dict[str, Histogram] = {}
        self._success = self._counter("request_success", "Requests that ended.", "finished_reason")
        self._rejected = self._counter("requests_rejected", "Requests that were not taken.", "reason")
        self._failed = self._counter("requests_failed", "Requests that ended with an error.", "reason")
        self._gone = self._counter("http_requests_client_disconnected", "Clients that left before the answer.")
        # The names and labels of prometheus-fastapi-instrumentator, which dashboards know.
        labels = ("handler", "method", "status")
        self._requests = Counter("http_requests", "HTTP requests.", labels, registry=self._registry)
        self._durations = Histogram(
            "http_request_duration_seconds", "Of HTTP requests.", ("handler", "method"), registry=self._registry
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(self.prefix + name, text, ("model_name", "engine", *labels), registry=self._registry)

    @property
    def labels(self) -> tuple[str, str]:
        """Values of `model_name` and `engine`, which all metrics of the engine have."""
        return (self.model["names"][0] if self.model else "", "0")

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self, model: ServedModel) -> None:
        """The model whose requests are counted from now on."""
        self.model = model
        # Looked up once, as each token is observed.
        self._observed = {name: histogram.labels(*self.labels) for name, histogram in self._histograms.items()}
        reasons = {
            self._success: ("stop", "length", "abort"),
            self._rejected: ("queue_full", "too_large", "unauthorized"),
            self._failed: ("engine", *FAILURES),
        }
        for counter, names in reasons.items():  # a rate needs the zero before the first
            for reason in names:
                counter.labels(*self.labels, reason)

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram of the model."""
        self._observed[name].observe(value)

    # ---- HTTP ----

    def http_request(self, handler: str, method: str, status: int, seconds: float) -> None:
        """An HTTP request was answered."""
        self._requests.labels(handler, method, f"{status // 100}xx").inc()
        self._durations.labels(handler, method).observe(seconds)

    def client_left(self) -> None:
        """A client closed its connection before the end of the answer."""
        self._gone.labels(*self.labels).inc()

    def rejected(self, reason: str) -> None:
        """A request was not taken."""
        self._rejected.labels(*self.labels, reason).inc()

    def failed(self, reason: str) -> None:
        """A request that was taken ended with an error."""
        self._failed.labels(*self.labels, reason).inc()

    def submitted(self, generation: TextGeneration, n: int) -> None:
        """A request goes to the engine."""
        self.observe("request_params_n", n)
        self.observe("request_params_max_tokens", generation.submissions[0].params.max_new_tokens)

    # ---- outputs of the engine ----

    def output(self, generation: TextGeneration, index: int, output: Output) -> None:
        """Times of the tokens of one choice; call it before `TextGeneration.put`."""
        now = time.monotonic()
        if count := len(output["tokens"]):
            last = generation.last_token.get(index)
            if last is None:
                self.observe("time_to_first_token_seconds", now - generation.arrival)
            else:
                for _ in range(count):
                    self.observe("inter_token_latency_seconds", (now - last) / count)
            generation.last_token[index] = now
        if output["finish"] is not None:
            self._finished(generation, index, output, now)

    def _finished(self, generation: TextGeneration, index: int, output: Output, now: float) -> None:
        finish, times = output["finish"], output["times"]
        if finish in FAILURES:
            self.failed(finish)
            return
        self._success.labels(*self.labels, FINISH_REASONS.get(finish or "", finish)).inc()
        tokens = generation.tokens[index] + len(output["tokens"])
        self.observe("e2e_request_latency_seconds", now - generation.arrival)
        self.observe("request_prompt_tokens", output["prompt_tokens"])
        self.observe("request_generation_tokens", tokens)
        if len(generation.finished) + 1 == len(generation.submissions):
            self.observe("request_max_num_generation_tokens", max(tokens, *generation.tokens))
        admitted, first, last = times["admitted"], times["first_token"], times["finished"]
        if admitted is not None:
            self.observe("request_queue_time_seconds", admitted)
        if admitted is not None and last is not None:
            self.observe("request_inference_time_seconds", last - admitted)
        if admitted is not None and first is not None and last is not None:
            self.observe("request_prefill_time_seconds", first - admitted)
            self.observe("request_decode_time_seconds", last - first)
            if tokens > 1:
                self.observe("request_time_per_output_token_seconds", (last - first) / (tokens - 1))


class _EngineNumbers(Collector):
    """The engine's latest statistics as gauges and counters."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """All metrics that the latest statistics give."""
        model, stats = self._metrics.model, self._metrics.stats
        yield self._family(GaugeMetricFamily, "engine_healthy", "1 while requests are served.", self._metrics.healthy)
        if model is None:
            return
        keys = ("sections", "stages", "tensor", "slots", "max_context", "precision", "weights", "version", "connection")
        content: Any = model
        yield self._info("model_info", "What is served.", {key: content[key] for key in keys})
        positions = model["slots"] * model["max_context"]
        # Prefixes are shared by the position, so a position is a block to vLLM's dashboards and routers.
        cache = {"block_size": 1, "num_gpu_blocks": positions, "cache_dtype": model["precision"]}
        yield self._info("cache_config_info", "Positions of all slots.", cache)
        if stats is None:
            return
        busy = sum(slot["phase"] != "free" for slot in stats["slots"])
        gauges: dict[str, tuple[str, float]] = {
            "num_requests_running": ("Requests in a slot.", stats["running"]),
            "num_requests_waiting": ("Requests in the queue.", stats["waiting"]),
            "num_tokens_waiting": ("Prompt tokens in the queue.", stats["waiting_tokens"]),
            "kv_cache_usage_perc": (
                "Share of the positions of all slots that are held.",
                stats["positions_used"] / positions,
            ),
            "slots": ("Slots of the engine.", model["slots"]),
            "slots_busy": ("Slots with a request.", busy),
            "step_seconds": ("Moving mean of a step's time.", stats["step_s"]),
        }
        counters: dict[str, tuple[str, float]] = {
            "prompt_tokens": ("Prompt tokens that were processed.", stats["prompt_tokens_total"]),
            "generation_tokens": ("Tokens that were generated.", stats["generation_tokens_total"]),
            "prefix_cache_queries": ("Prompt tokens that were looked up.", stats["prefix_queries_total"]),
            "prefix_cache_hits": ("Prompt tokens that were not computed again.", stats["prefix_hits_total"]),
            "num_preemptions": ("Requests that lost their slot: never.", 0),
            "steps": ("Steps of the engine.", stats["steps"]),
            "operations": ("Operations of the engine.", stats["operations"]),
        }
        for kind, numbers in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in numbers.items():
                yield self._family(kind, name, text, value)
        yield self._stages(stats)

    def _name(self, name: str) -> str:
        return self._metrics.prefix + name

    def _family(self, kind: Any, name: str, text: str, value: float) -> Metric:
        family = kind(self._name(name), text, labels=("model_name", "engine"))
        family.add_metric(self._metrics.labels, value)
        return family

    def _info(self, name: str, text: str, content: dict[str, Any]) -> Metric:
        family = GaugeMetricFamily(self._name(name), text, labels=("model_name", "engine", *content))
        family.add_metric((*self._metrics.labels, *map(str, content.values())), 1)
        return family

    def _stages(self, stats: Stats) -> Metric:
        labels = ("model_name", "engine", "stage", "rank", "kind")
        text = "Time that a stage computed, sent, and waited for the memory or the token of another stage."
        family = CounterMetricFamily(self._name("stage_seconds"), text, labels=labels)
        for stage in stats["stages"]:
            content: Any = stage
            for key, kind in _STAGE_KINDS.items():
                family.add_metric((*self._metrics.labels, str(stage["stage"]), str(stage["rank"]), kind), content[key])
        return family
