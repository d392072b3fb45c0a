"""One of two ranks that is killed in the middle of a captured step: the other one names stage and step."""

import multiprocessing
import os
import re
import signal
import time
from multiprocessing.connection import Connection

from stagdist.config.parts import ModelConfig
from stagdist.decode.engine import Engine
from stagdist.decode.operations import operate
from stagdist.decode.runtime.build import build_stage, joined_world, plan_decoding
from stagdist.decode.runtime.graphs import StepGraphs
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.sampling.sampling_plan import Mode
from stagdist.errors import TransportError
from stagdist.parallel.world import choose_device
from tests.decode.decoding import config_of, reader
from tests.gpu.checks.setting import Numbers, Setting
from tests.gpu.checks.two_ranks import TIMEOUT_S, case_of, check_ranks_can_meet

FAULTY_STEP = 3
VICTIM = 1
CHILD_S = 50.0
ERROR = re.compile(r"stage 0 \(rank 0\) lost (its peers|stage 1 \(rank 1\)) in step (\d+) while .*")


def killed(setting: Setting) -> Numbers:
    """Each rank decodes in a process of its own, since one of them dies."""
    check_ranks_can_meet(setting)
    context, rank = multiprocessing.get_context("fork"), int(os.environ["RANK"])  # CUDA has not started here
    theirs, ours = context.Pipe()
    child = context.Process(target=_child, args=(setting, rank, ours))
    child.start()
    ours.close()
    try:
        if rank == VICTIM:
            child.join(CHILD_S)
            assert child.exitcode == -signal.SIGKILL, f"the victim ended with {child.exitcode}"
            return {}
        assert theirs.poll(CHILD_S), f"no report after {CHILD_S:g} s"
        says, seconds = theirs.recv()
    finally:
        child.kill()
        child.join()
    numbers: Numbers = {"says": says, "seconds": seconds}
    setting.keep(numbers)
    named = ERROR.fullmatch(says)
    assert named is not None, f"rank 0 says: {says}"
    # The ranks are at most one step apart.
    assert abs(int(named[2]) - FAULTY_STEP) <= 1, f"rank {VICTIM} died in step {FAULTY_STEP}; rank 0 says: {says}"
    assert seconds < TIMEOUT_S, "it was noticed by the time limit only"
    return numbers


def _child(setting: Setting, rank: int, result: Connection) -> None:
    case = case_of(setting, "last", combined=False, graphs=True)
    plan = plan_decoding(ModelConfig(**config_of(case.keys)), case.options, 2)
    device = choose_device(setting.rank_device)
    began, says = time.monotonic(), "no error"
    try:
        with joined_world(plan, device) as transport:
            assert transport is not None
            stage = build_stage(plan, reader(case), device, transport)
            if rank == VICTIM:
                _die_in_step(setting, stage)
                operate(stage, transport, None)
            began = time.monotonic()
            Engine(stage, transport).generate(case.requests)
    except TransportError as error:
        says = str(error)
    result.send((says, time.monotonic() - began))
    os._exit(0)  # kernels of the step may wait for the victim for ever


def _die_in_step(setting: Setting, stage: Stage) -> None:
    """Kill this process in a step: on a GPU, which runs it on its own, after the launch; on a CPU in place of it."""
    run = StepGraphs.run

    def deadly(graphs: StepGraphs, count: int, mode: Mode) -> None:
        if stage.step_number < FAULTY_STEP:
            run(graphs, count, mode)
            return
        if setting.on_gpu:
            run(graphs, count, mode)
        os.kill(os.getpid(), signal.SIGKILL)

    StepGraphs.run = deadly  # type: ignore[method-assign, assignment]
