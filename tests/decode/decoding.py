"""Runs the engine on this rank for many cases and brings back what it did, for comparison with the reference."""

import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stagdist.checkpoint.published.model_reader import ReadSlice
from stagdist.config.parts import ModelConfig
from stagdist.decode.engine import Engine
from stagdist.decode.operations import operate
from stagdist.decode.request import Request, RequestOutput, join_outputs
from stagdist.decode.runtime.build import DecodePlan, EngineOptions, build_stage, plan_decoding
from stagdist.decode.runtime.graphs import CaptureProgress
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.runtime.transport import Transport
from stagdist.decode.sampling.sampling_plan import Mode
from stagdist.parallel.layout import ParameterSpec
from tests.decode.fake_cuda import FakeCuda
from tests.ranks import GUARD_S
from tests.reference import stagformer as reference
from tests.reference.variants import BASE

CONTEXT = 24


class Letters:
    """A tokenizer whose tokens are letters: 0 is A."""

    def decode(self, ids: Iterable[int]) -> str:
        """One letter for each token."""
        return "".join(chr(ord("A") + token) for token in ids)


@dataclass
class Case:
    """One engine and the requests it serves.

    Attributes:
        keys: model keys added to the small base.
        requests: served together, in `options.num_slots` slots.
        seed: of the weights.
        letters: outputs have text.
        end_of_document: token that ends requests.
    """

    name: str
    keys: dict[str, Any]
    requests: list[Request]
    options: EngineOptions = field(default_factory=EngineOptions)
    seed: int = 0
    letters: bool = False
    end_of_document: int | None = None


@dataclass
class Ran:
    """What one rank saw: completions on rank 0, and the logits of its slice at every choice.

    Attributes:
        logits: (slots, positions of the chosen tokens, [rows, slice] logits) of every choice.
        seconds: from the first request to the last token.
    """

    completions: list[RequestOutput]
    logits: list[tuple[list[int], list[int], Tensor]]
    first_token: int
    smallest_margin: float
    steps: int
    seconds: float = 0.0


def config_of(keys: dict[str, Any]) -> dict[str, Any]:
    """The model keys of a case, whole."""
    return BASE | {"max_position_embeddings": CONTEXT} | keys


def parameters_of(case: Case) -> reference.Parameters:
    """The weights of a case, perturbed so that every one of them matters."""
    return reference.random_parameters(config_of(case.keys), case.seed, torch.float64, perturb=True)


def reader(case: Case) -> ReadSlice:
    """Slices of the weights of a case."""
    parameters = parameters_of(case)

    def read(spec: ParameterSpec, dim: int, start: int, stop: int) -> Tensor:
        return parameters[spec.name].narrow(dim, start, stop - start)

    return read


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random tokens that every vocabulary here has."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(0, 36, (length,), generator=generator).tolist())


class World:
    """The ranks of a launch, or this process alone; communicators are made once for many cases."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        self._transports: dict[tuple[int, bool, float], Transport] = {}

    def transport(self, plan: DecodePlan) -> Transport | None:
        """Communicators of a case; None in a world of one."""
        if self.size == 1:
            return None
        key = plan.grid.tensor, plan.topology.combined, plan.options.link_delay_s
        if key not in self._transports:
            _, combined, delay_s = key
            self._transports[key] = Transport(plan.grid, "cpu", GUARD_S, combined=combined, link_delay_s=delay_s)
        return self._transports[key]

    def stage(self, case: Case, progress: CaptureProgress | None = None) -> tuple[Stage, Transport | None]:
        """This rank's share of the model of a case."""
        plan = plan_decoding(ModelConfig(**config_of(case.keys)), case.options, self.size)
        transport = self.transport(plan)
        return build_stage(plan, reader(case), "cpu", transport, progress=progress), transport


def engine_of(case: Case, stage: Stage, transport: Transport | None, heartbeat_s: float = 20.0) -> Engine:
    """The engine of a case, for rank 0."""
    tokenizer: Any = Letters() if case.letters else None
    ends = () if case.end_of_document is None else (case.end_of_document,)
    return Engine(stage, transport, tokenizer=tokenizer, end_tokens=ends, heartbeat_s=heartbeat_s)


def run_cases(cases: list[Case]) -> list[Ran]:
    """Called on every rank: one engine after the other over the same communicators."""
    world = World()
    return [run_one(*world.stage(case), case) for case in cases]


def run_captured(cases: list[Case]) -> list[Ran]:
    """As `run_cases`; steps are captured on each rank, and replays alone send and receive."""
    with pytest.MonkeyPatch.context() as patch:
        FakeCuda().install(patch)
        return run_cases(cases)


def run_one(stage: Stage, transport: Transport | None, case: Case) -> Ran:
    """Serve the requests of a case."""
    logits: list[tuple[list[int], list[int], Tensor]] = []
    choose = stage.readout.choose

    def recording(slots: Any, positions: Any) -> None:
        assert stage.readout.logits is not None
        logits.append((list(slots), list(positions), stage.readout.logits.clone()))
        choose(slots, positions)

    choose_in_graph = stage.readout.choose_in_graph

    def recording_fixed(mode: Mode, positions: Tensor) -> None:
        served = (positions > 0).nonzero()[:, 0]  # other rows have no request
        assert stage.readout.logits is not None
        logits.append((served.tolist(), positions[served].tolist(), stage.readout.logits[served]))
        choose_in_graph(mode, positions)

    stage.readout.choose = recording  # type: ignore[method-assign]
    stage.readout.choose_in_graph = recording_fixed  # type: ignore[method-assign]
    if transport is not None and transport.rank > 0:
        operate(stage, transport, None)
        return Ran([], logits, stage.weights.first_token, float("inf"), 0)
    engine = engine_of(case, stage, transport)
    began = time.perf_counter()
    completions = engine.generate(case.requests)
    seconds = time.perf_counter() - began
    return Ran(completions, logits, stage.weights.first_token, engine.smallest_margin, engine.steps, seconds)


# --- an engine that is idle between requests --------------------------------------------------------------------


@dataclass
class Served:
    """What happened while an engine stood idle between requests.

    Attributes:
        rests: times that this rank came to rest.
        completions: on rank 0, by name.
        steps: on rank 0.
    """

    rests: int
    completions: dict[str, RequestOutput]
    steps: int


class Outbox:
    """Collects outputs of an engine for other threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._outputs: dict[str, list[RequestOutput]] = {}

    def __call__(self, outputs: Sequence[RequestOutput]) -> None:
        """The engine's sink."""
        with self._changed:
            for output in outputs:
                self._outputs.setdefault(output.request_id, []).append(output)
            self._changed.notify_all()

    def wait_for(self, request_id: str, num_tokens: int | None = None) -> RequestOutput | None:
        """Until a request has ended, or has so many tokens."""

        def there() -> bool:
            outputs = self._outputs.get(request_id, [])
            if num_tokens is not None and sum(len(output.token_ids) for output in outputs) >= num_tokens:
                return True
            return any(output.finish_reason is not None for output in outputs)

        with self._changed:
            assert self._changed.wait_for(there, GUARD_S), f"request {request_id} does not end"
            outputs = self._outputs[request_id]
            return join_outputs(outputs) if outputs[-1].finish_reason is not None else None

    @property
    def completions(self) -> dict[str, RequestOutput]:
        """All that ended."""
        return {request_id: join_outputs(outputs) for request_id, outputs in self._outputs.items()}


def serve_with_pauses(case: Case) -> Served:
    """Called on every rank: requests come from another thread, one after the other, with pauses of several rests."""
    stage, transport = World().stage(case)
    rest, rests = stage.rest, 0

    def counting() -> None:
        nonlocal rests
        rests += 1
        rest()

    stage.rest = counting  # type: ignore[method-assign]
    if transport is not None and transport.rank > 0:
        operate(stage, transport, None)
        return Served(rests, {}, 0)
    engine, outbox = engine_of(case, stage, transport, heartbeat_s=0.02), Outbox()

    def submit() -> None:
        for request in case.requests:
            time.sleep(0.15)
            engine.submit(request)
            outbox.wait_for(request.request_id)
        time.sleep(0.15)
        engine.close()

    client = threading.Thread(target=submit)
    client.start()
    engine.run(outbox)
    client.join()
    return Served(rests, outbox.completions, engine.steps)
