"""Runs the engine on this rank for many cases and brings back what it did, for comparison with the reference."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stagdist.config import ModelConfig
from stagdist.decode.engine import Completion, Engine
from stagdist.decode.loading import EngineOptions, build_stage, place_model
from stagdist.decode.operations import operate
from stagdist.decode.request import Request
from stagdist.decode.stage import Stage
from stagdist.decode.transport import Transport
from stagdist.parallel.layout import ParameterSpec
from tests.reference import stagformer as reference
from tests.reference.variants import BASE


@dataclass
class Case:
    """One engine and the requests it serves.

    Attributes:
        keys: model keys added to the small base.
        requests: served together, in `options.num_slots` slots.
    """

    name: str
    keys: dict[str, Any]
    requests: list[Request]
    options: EngineOptions = field(default_factory=EngineOptions)
    seed: int = 0


@dataclass
class Ran:
    """What one rank saw: completions on rank 0, and the logits of its slice at every choice.

    Attributes:
        logits: (slots, positions of the chosen tokens, [rows, slice] logits) of every choice.
    """

    completions: list[Completion]
    logits: list[tuple[list[int], list[int], Tensor]]
    first_token: int
    smallest_margin: float
    steps: int


def config_of(keys: dict[str, Any]) -> dict[str, Any]:
    """The model keys of a case, whole."""
    return BASE | {"max_position_embeddings": 24} | keys


def parameters_of(case: Case) -> reference.Parameters:
    """The weights of a case, perturbed so that every one of them matters."""
    return reference.random_parameters(config_of(case.keys), case.seed, torch.float64, perturb=True)


def run_cases(cases: list[Case]) -> list[Ran]:
    """Called on every rank: one engine after the other over the same communicators."""
    world = int(__import__("os").environ["WORLD_SIZE"])
    if world > 1:
        dist.init_process_group("gloo")
    transports: dict[int, Transport] = {}
    results = []
    for case in cases:
        placement = place_model(ModelConfig(**config_of(case.keys)), case.options, world)
        transport = None
        if world > 1:
            tensor = placement.grid.tensor
            if tensor not in transports:
                transports[tensor] = Transport(placement.grid, "cpu", 60)
            transport = transports[tensor]
        parameters = parameters_of(case)

        def read(spec: ParameterSpec, dim: int, start: int, stop: int, values: Any = parameters) -> Tensor:
            return values[spec.name].narrow(dim, start, stop - start)

        stage = build_stage(placement, read, "cpu", transport)
        results.append(run_one(stage, transport, case))
    return results


def run_one(stage: Stage, transport: Transport | None, case: Case) -> Ran:
    """Serve the requests of a case."""
    logits: list[tuple[list[int], list[int], Tensor]] = []
    choose = stage.readout.choose

    def recording(slots: Any, positions: Any) -> None:
        assert stage.readout.logits is not None
        logits.append((list(slots), list(positions), stage.readout.logits.clone()))
        choose(slots, positions)

    stage.readout.choose = recording  # type: ignore[method-assign]
    engine = None
    if transport is None or transport.rank == 0:
        engine = Engine(stage, transport, heartbeat_s=20)
        completions = engine.generate(case.requests)
    else:
        operate(stage, transport, None)
        completions = []
    margin = float("inf") if engine is None else engine.smallest_margin
    steps = 0 if engine is None else engine.steps
    return Ran(completions, logits, stage.weights.first_token, margin, steps)
