"""OpenVINO: the baseline as a graph that keeps its caches, run step by step."""

import time
from typing import Any

import numpy as np

from benchmarks.decoding.contestants import Load
from benchmarks.decoding.rivals.baseline_llama import Baseline
from benchmarks.decoding.rivals.openvino_graph import openvino_graph
from benchmarks.decoding.rivals.rival import Decoded, Prompts, Rival

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
CACHES = HINTS | {"int8": "u8"}


class OpenVino(Rival):
    """OpenVINO's runtime. On CPUs with bf16 it would round silently, so the precision of products is forced."""

    title, packages, kinds = "openvino", ("openvino",), ("cpu",)
    weight_bytes = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}
    cache_bytes = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}
    timed_by = "clock after each step"

    def __init__(self, baseline: Baseline, precision: str, load: Load, threads: int):
        import openvino

        properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        properties |= {"INFERENCE_PRECISION_HINT": HINTS[precision], "KV_CACHE_PRECISION": CACHES[precision]}
        if precision != "int8":
            properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
        graph = openvino_graph(baseline.model, baseline.on_cpu(), int8=precision == "int8")
        self._request: Any = openvino.Core().compile_model(graph, "CPU", properties).create_infer_request()

    @staticmethod
    def obstacle(precision: str) -> str | None:
        """It has bf16 on processors that compute in it."""
        import openvino

        able = precision != "bf16" or "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return None if able else "OpenVINO has no bf16 on this processor"

    def decode(self, prompts: Prompts, new_tokens: int) -> Decoded:
        """One call of the graph for the prompts, then one for each step."""
        self._request.reset_state()
        batch, length = len(prompts), len(prompts[0])
        tokens, positions = np.array(prompts, np.int64), np.tile(np.arange(length, dtype=np.int64), (batch, 1))
        order, times, steps = np.arange(batch, dtype=np.int32), [], []
        for step in range(new_tokens):
            mask = np.ones((batch, length + step), np.int64)
            given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "beam_idx": order}
            tokens = self._request.infer(given, share_inputs=True, share_outputs=True)["logits"].argmax(-1)
            positions = np.full((batch, 1), length + step, np.int64)
            times.append(time.perf_counter())
            steps.append(tokens[:, 0].tolist())
        return Decoded(tuple(times), tuple(zip(*steps, strict=True)))

    def close(self) -> None:
        """End its threads."""
        self._request = None
