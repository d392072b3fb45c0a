"""Ranks that are killed, frozen or unresponsive in the middle of a step. Each runs in a child process that reports."""

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule

from stagdist.decode.engine import Engine
from stagdist.decode.operations import operate
from stagdist.decode.runtime.build import build_stage
from stagdist.decode.runtime.transport import Transport
from stagdist.errors import TransportError
from stagdist.parallel.link import GLOO, NCCL
from stagdist.training.engine.section_engine import SectionEngine, build_engine
from stagdist.training.lost_peers import naming_lost_peers
from tests.decode.fake_cuda import FakeCuda
from tests.parallel.nccl_decoding import Layout, read_constant, request
from tests.parallel.nccl_double import like_nccl
from tests.training.parity_cases import Case
from tests.training.parity_worker import micro_batches
from tests.training.worlds import World

FAULTY_STEP = 3
PATIENCE_S = 0.5
LONG_PATIENCE_S = 30.0
REQUEST = request("0", 7, 8)
END_S = 60.0
START_S = 120.0
RANKS = 3
AT_ONCE = 4
"""Faults that are run concurrently: most of their time is waiting."""

DECODING = {
    "chunk": Layout(RANKS),
    "hand-off": Layout(RANKS),
    "sum": Layout(RANKS, head="sharded", combined=True),
    "graph": Layout(RANKS, captured=True, slots=1),
    "capture": Layout(RANKS, captured=True, slots=1),
}
"""Where a fault occurs while decoding: after a chunk of the prompt, after the hand-off of a step is sent, before the
outputs of sections are summed, in the middle of a captured step, after the first graph was captured."""
TRAINING = {
    "forward": schedule.ForwardPass,
    "tied gradients": schedule.ReduceTiedGrads,
    "update": schedule.OptimizerStep,
}
"""Where a fault occurs while training: after the second forward pass of a step, before gradients are summed over the
stages, before the update."""


@dataclass(frozen=True)
class Fault:
    """What happens to one rank in the middle of a run.

    Attributes:
        how: `killed`, `frozen`, `silent` (alive, but stuck), or `none`.
        rank: the rank that fails.
        where: a key of `DECODING` or `TRAINING`.
        nccl: with the NCCL double; otherwise plain gloo.
        port: of the store.
    """

    how: str
    rank: int
    where: str
    nccl: bool
    port: int
    timeout_s: float

    def strike(self) -> None:
        """Fail, if this is the rank."""
        if dist.get_rank() != self.rank:
            return
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.how == "silent":
            time.sleep(END_S)


def play(payload: tuple[list[Fault], Path]) -> list[dict[str, Any]]:
    """Run every fault in its own child process, `AT_ONCE` of them concurrently.

    Args:
        payload: the faults, and a folder through which the ranks synchronize.

    Returns:
        For each fault, what this rank reported and after how many seconds.
    """
    faults, folder = payload
    reports: list[dict[str, Any]] = []
    for first in range(0, len(faults), AT_ONCE):
        _arrive(folder, f"{first}.ready")
        while _arrived(folder, f"{first}.ready") < RANKS:
            time.sleep(0.01)
        numbers = range(first, min(first + AT_ONCE, len(faults)))
        children = {number: _start(faults[number]) for number in numbers}
        _wait(children, folder)
        reports += [children[number].report() for number in numbers]
    return reports


def _arrive(folder: Path, name: str) -> None:
    (folder / f"{name}.{os.environ['RANK']}").touch()


def _arrived(folder: Path, name: str) -> int:
    return len(list(folder.glob(f"{name}.*")))


@dataclass(frozen=True)
class Child:
    """A child process and the pipe with its report."""

    process: int
    pipe: int

    def report(self) -> dict[str, Any]:
        """The report of a child that has ended."""
        with os.fdopen(self.pipe) as stream:
            text = stream.read()
        found: dict[str, Any] = json.loads(text) if text else {"says": "nothing"}
        return found


def _start(fault: Fault) -> Child:
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        _report(fault, writing)
    os.close(writing)
    return Child(process, reading)


def _wait(children: dict[int, Child], folder: Path) -> None:
    """Wait until all children have ended. One that is stuck is killed when the same child of all other ranks has."""
    deadline_s = time.monotonic() + END_S
    running = dict(children)
    while running:
        for number, child in list(running.items()):
            if os.waitpid(child.process, os.WNOHANG) == (0, 0):
                if time.monotonic() < deadline_s and _arrived(folder, f"{number}.done") < RANKS - 1:
                    continue
                os.kill(child.process, signal.SIGKILL)
                os.waitpid(child.process, 0)
            del running[number]
            _arrive(folder, f"{number}.done")
        time.sleep(0.02)


def _report(fault: Fault, writing: int) -> None:
    """In the child: run, and write what this rank reports."""
    code = 1
    try:
        os.environ["MASTER_PORT"] = str(fault.port)
        patience_s = LONG_PATIENCE_S if fault.how == "none" else PATIENCE_S
        with like_nccl(patience_s) if fault.nccl else nullcontext():
            run = _train(fault) if fault.where in TRAINING else _decode(fault)
            began_s = time.monotonic()
            try:
                says = run()
            except TransportError as error:
                says = str(error)
        os.write(writing, json.dumps({"says": says, "seconds": time.monotonic() - began_s}).encode())
        time.sleep(0.5)  # the other ranks must not mistake this exit for the fault
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def _decode(fault: Fault) -> Callable[[], str]:
    """Prepare to decode one request."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=START_S))
    plan = DECODING[fault.where].plan()
    combined, rules = plan.topology.combined, NCCL if fault.nccl else GLOO
    cuda = FakeCuda()
    if plan.options.graphs:
        cuda.install(pytest.MonkeyPatch())  # for the life of this process
    transport = Transport(plan.grid, "cpu", fault.timeout_s, combined=combined, rules=rules)
    if fault.where == "capture":
        return lambda: str(build_stage(plan, read_constant, "cpu", transport, progress=lambda *_: fault.strike()))
    stage = build_stage(plan, read_constant, "cpu", transport)

    def in_faulty_step() -> None:
        if transport.step == FAULTY_STEP:
            fault.strike()

    if fault.where == "graph":
        cuda.amid_replay = in_faulty_step
    elif fault.where == "chunk":
        _after(stage._sections, "run_chunk", fault.strike)
    elif fault.where == "hand-off":
        if transport.stage < plan.topology.last_stage:
            _after(transport.hand_offs_out, "send", in_faulty_step)
    else:
        _before(transport, "sum_over_stages", in_faulty_step)

    def run() -> str:
        says = "no error"
        if transport.rank:
            operate(stage, transport, None)
        else:
            says = str([each.token_ids for each in Engine(stage, transport).generate([REQUEST])])
        transport.close()
        assert len(cuda.of("reset")) == len(cuda.of("capture")), "a communicator ends before graphs that use it"
        return says

    return run


def _after(owner: Any, name: str, then: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def called(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        then()
        return result

    setattr(owner, name, called)


def _before(owner: Any, name: str, first: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def called(*arguments: Any, **options: Any) -> Any:
        first()
        return original(*arguments, **options)

    setattr(owner, name, called)


def _train(fault: Fault) -> Callable[[], str]:
    """Prepare to train three steps."""
    case = Case("fault", {"section_layers": [1] * RANKS}, (RANKS, 1, 1))
    groups = World(max(START_S, fault.timeout_s)).groups(case.grid)
    config = case.config()
    parallel = config.parallel.model_copy(update={"timeout_s": fault.timeout_s})
    engine = build_engine(config.model_copy(update={"parallel": parallel}), groups)

    def run() -> str:
        losses = []
        for number, (tokens, labels) in enumerate(case.batches(), start=1):
            if number == FAULTY_STEP:
                _strike_in_step(engine, fault)
            with naming_lost_peers(groups, fault.timeout_s, f"step {number}"):
                losses.append(float(engine.train_batch(micro_batches(case, groups, tokens, labels))))
        dist.barrier(group=groups.control)
        engine.exchange.close()
        return str(losses)

    return run


def _strike_in_step(engine: SectionEngine, fault: Fault) -> None:
    kind = TRAINING[fault.where]
    original, runs = engine._INSTRUCTION_MAP[kind], 0

    def instruction(self: SectionEngine, **options: Any) -> None:
        nonlocal runs
        runs += 1
        if fault.where != "forward":
            fault.strike()
        original(self, **options)
        if runs == 2:
            fault.strike()

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, kind: instruction}
