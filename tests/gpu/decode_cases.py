"""Decoding on a GPU: models with the kernels that real ones use, and what to compare, as functions of a device.

Every function takes `cpu` too, where graphs run without being captured and there is nothing to profile.
"""

import gc
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from stagdist.config.parts import ModelConfig
from stagdist.decode.engine import Engine
from stagdist.decode.request import Request, SamplingParams
from stagdist.decode.runtime.build import EngineOptions, build_stage, plan_decoding
from stagdist.decode.runtime.outcome import IN_FLIGHT, HostCopy
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.sampling.sampling_plan import Mode
from stagdist.model.precision import DTYPES
from stagdist.parallel.device import on_cuda
from tests.decode.decoding import Case, config_of, parameters_of, prompt, reader
from tests.reference import stagformer as reference
from tests.reference.variants import VARIANTS

CONTEXT = 1024
"""Positions of the wide models: 16 times `split_attention.SMALLEST_SPLIT`."""
_WIDE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "rope_theta": 10000.0,
    "max_position_embeddings": CONTEXT,
    "section_layers": [2, 2],
}
WIDE_MODELS: dict[str, dict[str, Any]] = {
    "head size 64": _WIDE,
    "head size 128": _WIDE | {"num_attention_heads": 4},
    "grouped heads": _WIDE | {"num_key_value_heads": 2},
    "window": _WIDE | {"cross_attention_window": 48},
    "shared": _WIDE | {"share_section_weights": True},
    "sequential": _WIDE | {"connection": "sequential"},
    "grouped heads of size 128 with everything": _WIDE
    | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_window": 48,
        "stagger": 2,
        "share_section_weights": True,
        "combine_sections": True,
        "tie_word_embeddings": True,
    },
}


def _request(length: int, new: int, temperature: float = 0.0) -> Request:
    params = SamplingParams(max_new_tokens=new, temperature=temperature, seed=length)
    return Request(str(length), prompt(length), params)


WAYS: dict[str, dict[str, bool | None]] = {
    "eager": {"graphs": False},
    "graphs": {"graphs": True, "kernels": False},
    "kernels": {"graphs": True, "kernels": None},
}
"""How steps run: launched one by one, as graphs, and as graphs with Triton kernels, which are left out on a CPU."""
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7},
    "truncated": {"temperature": 0.7, "top_p": 0.9, "top_k": 5},
    "other": {"temperature": 0.0, "logprobs": 2},
}
"""Parameters of requests for each `Mode`, by its value."""
WIDE_REQUESTS = [_request(760, 20), _request(250, 30), _request(5, 10)]
"""With 3 rows of 8 heads there are 11 splits of attention, which have 64 entries each, and 128 after 704 positions. The
first request crosses from 6 to 7 splits, the second from 4 to 5; as the others end, the rows go from 3 to 2."""
SMALL_REQUESTS = [
    _request(1, 8),
    _request(2, 3, 1.0),
    _request(4, 9),
    _request(6, 2, 0.7),
    _request(13, 11),
    _request(24, 4, 1.0),
]
"""More than there are slots, so that slots are used again."""


def wide_case(model: str, precision: str = "bf16", way: str = "kernels") -> Case:
    """A model with real head sizes, all requests at once."""
    options = EngineOptions(precision=precision, num_slots=len(WIDE_REQUESTS), chunk_size=128)
    return Case(model, WIDE_MODELS[model], WIDE_REQUESTS, running(options, way))


def many_case(model: str) -> Case:
    """A model whose products have more than 8 rows, those of all its sections together: cuBLAS computes them."""
    rows = 5 if WIDE_MODELS[model].get("share_section_weights") else 9
    requests = [_request(3 + length, 12) for length in range(rows)]
    return Case(model, WIDE_MODELS[model], requests, EngineOptions(precision="bf16", num_slots=len(requests)))


def small_case(variant: str, way: str = "kernels") -> Case:
    """One of all variants in fp64, where every device must give the same tokens."""
    options = EngineOptions(precision="fp64", chunk_size=5, num_slots=2)
    return Case(variant, VARIANTS[variant], SMALL_REQUESTS, running(options, way))


def running(options: EngineOptions, way: str) -> EngineOptions:
    """The options with steps that run in one of `WAYS`."""
    return replace(options, **WAYS[way])  # type: ignore[arg-type]


def build(case: Case, device: str) -> Stage:
    """The stage of a case, with all graphs captured."""
    plan = plan_decoding(ModelConfig(**config_of(case.keys)), case.options, 1)
    stage = build_stage(plan, reader(case), device, None)
    wanted = bool(case.options.graphs) and case.options.kernels is None and on_cuda(device)
    assert stage.setup.kernels == wanted, f"{case.name}: Triton kernels {wanted} wanted"
    return stage


# --- tokens and logits ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoded:
    """What an engine made of the requests of a case, in their order.

    Attributes:
        tokens: of each request.
        logits: float32 [tokens, V] of each request, on the CPU.
    """

    tokens: list[tuple[int, ...]]
    logits: list[Tensor]


def tokens(case: Case, device: str) -> list[tuple[int, ...]]:
    """Tokens of each request; those of captured steps are chosen inside the graph."""
    stage = build(case, device)
    done = [each.token_ids for each in Engine(stage).generate(case.requests)]
    stage.close()
    return done


@cache
def cpu_tokens(variant: str) -> list[tuple[int, ...]]:
    """Tokens of a small case from plain steps on the CPU."""
    return tokens(small_case(variant, "eager"), "cpu")


def decode(case: Case, device: str) -> Decoded:
    """Serve all requests, with captured steps that end with the logits. Their prompts must differ."""
    stage = build(case, device)
    readout = stage.readout
    admit, choose = readout.sampler.admit, readout.choose
    in_slot: dict[int, list[Tensor]] = {}
    of_prompt: dict[tuple[int, ...], list[Tensor]] = {}

    def noting_admission(slot: int, params: SamplingParams, prompt_ids: Any) -> None:
        in_slot[slot] = of_prompt[tuple(prompt_ids)] = []
        admit(slot, params, prompt_ids)

    def noting_logits(slots: Any, positions: Any) -> None:
        assert readout.logits is not None
        for row, slot in enumerate(slots):
            in_slot.setdefault(slot, []).append(readout.logits[row].clone())
        choose(slots, positions)

    readout.sampler.admit, readout.choose = noting_admission, noting_logits  # type: ignore[method-assign]
    with mock.patch.object(readout.sampler, "mode", return_value=Mode.OTHER):
        done = Engine(stage).generate(case.requests)
    found = [each.token_ids for each in done]
    # An ended request may have been in one step more.
    logits = [
        torch.stack(of_prompt[request.prompt_ids][: len(ids)]).float().cpu()
        for request, ids in zip(case.requests, found, strict=True)
    ]
    readout.sampler.admit, readout.choose = admit, choose  # type: ignore[method-assign]
    stage.close()
    return Decoded(found, logits)


@dataclass(frozen=True)
class Errors:
    """Logits of an engine against fp32 on the CPU, over the engine's own tokens.

    Attributes:
        max_abs: largest difference.
        rms: root mean square of the differences.
        scale: root mean square of the fp32 logits.
        top1: share of positions where both have the same likeliest token.
        positions: number of positions compared.
    """

    max_abs: float
    rms: float
    scale: float
    top1: float
    positions: int


def errors(case: Case, device: str) -> Errors:
    """Compare with a full recomputation by the reference, whose weights are rounded to the case's precision.

    The reference reads the tokens that the engine chose, so one flipped token does not spoil the positions after it.
    """
    decoded = decode(case, device)
    assert case.options.precision is not None
    dtype = DTYPES[case.options.precision]
    parameters = {name: value.to(dtype).float() for name, value in parameters_of(case).items()}
    expected = []
    for request, chosen in zip(case.requests, decoded.tokens, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *chosen[:-1]]])
        expected.append(reference.forward(parameters, config_of(case.keys), ids)[0, len(request.prompt_ids) - 1 :])
    right, found = torch.cat(expected), torch.cat(decoded.logits)
    difference = found - right
    return Errors(
        max_abs=float(difference.abs().max()),
        rms=float(difference.square().mean().sqrt()),
        scale=float(right.square().mean().sqrt()),
        top1=float((found.argmax(-1) == right.argmax(-1)).double().mean()),
        positions=len(right),
    )


# --- kernels and memory -----------------------------------------------------------------------------------------


def kernels(case: Case, device: str) -> set[str]:
    """Names of all operations and GPU kernels that ran from the first prefill to the last token."""
    stage = build(case, device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_cuda(device):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        Engine(stage).generate(case.requests)
    stage.close()
    return {event.key for event in profile.key_averages()}


@dataclass(frozen=True)
class Turn:
    """One of several engines that a process built one after the other.

    Attributes:
        tokens: of each request.
        kept_bytes: GPU memory that was allocated after the engine was closed and not before the first was built.
    """

    tokens: list[tuple[int, ...]]
    kept_bytes: int


def engines_in_turn(cases: list[Case], device: str) -> list[Turn]:
    """Build, use and close an engine for each case, in this process."""
    turns = []
    before = _allocated_bytes(device)
    for case in cases:
        stage = build(case, device)
        found = [done.token_ids for done in Engine(stage).generate(case.requests)]
        stage.close()
        del stage
        turns.append(Turn(found, _allocated_bytes(device) - before))
    return turns


def _allocated_bytes(device: str) -> int:
    """Memory of tensors, after what the process may give back at any time has been given back."""
    gc.collect()
    if not on_cuda(device):
        return 0
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated(device)


@contextmanager
def _no_waiting(device: str) -> Iterator[None]:
    """Inside, torch raises if an operation makes the host wait for the GPU."""
    if not on_cuda(device):
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _tokens(copy: HostCopy) -> list[int]:
    step = copy.wait().step
    assert step is not None
    return step.tokens.tolist()


@torch.inference_mode()
def tokens_without_waiting(case: Case, device: str, steps: int = 6) -> dict[str, list[list[int]]]:
    """Tokens of each step after the prefills, for each of `MODES`; each is read after the next step was launched.

    Raises:
        RuntimeError: an operation waited for the GPU.
    """
    stage = build(case, device)
    slots = range(case.options.num_slots)
    found: dict[str, list[list[int]]] = {}
    for mode, params in MODES.items():
        copies, found[mode] = deque[HostCopy](), []
        with _no_waiting(device):
            for slot, request in zip(slots, case.requests, strict=False):
                stage.prefill(slot, request.prompt_ids, replace(SamplingParams(max_new_tokens=64), **params))
            assert stage.readout.sampler.mode(slots) is Mode(mode)
            for _ in range(steps):
                copies.append(stage.to_host(stage.run(step=True)))
                if len(copies) == IN_FLIGHT:
                    found[mode].append(_tokens(copies.popleft()))
            stage.retire(slots)
        found[mode] += [_tokens(copy) for copy in copies]
    stage.close()
    return found
