"""The order of a stage's work: complete, free of deadlock, and fast where transfers take time."""

from collections import defaultdict
from itertools import product

import pytest
from deepspeed.runtime.pipe import schedule

from stagdist.parallel.layout import micro_batches_in_flight
from stagdist.training.engine.train_schedule import InferenceSchedule, TrainSchedule

SHAPES = list(product((1, 2, 3, 4), (1, 2, 3, 5, 8)))
FORWARD_S, BACKWARD_S = 1.0, 2.0
# For each receive, the send it waits for and how far away the sender is.
SOURCES = {schedule.RecvActivation: (schedule.SendActivation, -1), schedule.RecvGrad: (schedule.SendGrad, 1)}


def instructions(kind: type, micro_batches: int, stages: int, stage: int) -> list[schedule.PipeInstruction]:
    return [instruction for step in kind(micro_batches, stages, stage).steps() for instruction in step]


def simulate(kind: type, micro_batches: int, stages: int, latency_s: float) -> float:
    """Time at which the last stage ends, if sends do not block and each transfer takes `latency_s`."""
    waiting = [instructions(kind, micro_batches, stages, stage) for stage in range(stages)]
    clocks = [0.0] * stages
    sent: dict[tuple[type, int], list[float]] = defaultdict(list)
    received: dict[tuple[type, int], int] = defaultdict(int)
    while any(waiting):
        moved = False
        for stage, queue in enumerate(waiting):
            while queue:
                done = type(queue[0])
                if done in SOURCES:
                    send, away = SOURCES[done]
                    arrivals, number = sent[send, stage + away], received[done, stage]
                    if number >= len(arrivals):
                        break
                    clocks[stage] = max(clocks[stage], arrivals[number] + latency_s)
                    received[done, stage] += 1
                clocks[stage] += {schedule.ForwardPass: FORWARD_S, schedule.BackwardPass: BACKWARD_S}.get(done, 0.0)
                sent[done, stage].append(clocks[stage])
                queue.pop(0)
                moved = True
        assert moved, f"deadlock: {[queue[:1] for queue in waiting]}"
    return max(clocks)


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_every_micro_batch_passes_every_stage_in_order_within_its_buffers(stages: int, micro_batches: int) -> None:
    for stage in range(stages):
        plan = TrainSchedule(micro_batches, stages, stage)
        held: list[int] = []
        most = forwards = backwards = 0
        for instruction in instructions(TrainSchedule, micro_batches, stages, stage):
            if isinstance(instruction, schedule.ForwardPass):
                assert instruction.buffer_id not in held, "a buffer in use was reused"
                held.append(instruction.buffer_id)
                forwards += 1
            elif isinstance(instruction, schedule.BackwardPass):
                assert instruction.buffer_id == held.pop(0), "backward passes follow the order of the forward passes"
                backwards += 1
            most = max(most, len(held))
        assert forwards == backwards == micro_batches
        assert most == plan.num_pipe_buffers() == micro_batches_in_flight(stages, stage, micro_batches)


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_instant_transfers_reach_the_bound(stages: int, micro_batches: int) -> None:
    bound = (micro_batches - 1 + stages) * (FORWARD_S + BACKWARD_S)
    assert simulate(TrainSchedule, micro_batches, stages, 0.0) == bound


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_transfer_time_counts_once_and_not_for_every_micro_batch(stages: int) -> None:
    latency_s = 0.4
    bound = (12 - 1 + stages) * (FORWARD_S + BACKWARD_S)
    assert simulate(TrainSchedule, 12, stages, latency_s) <= bound + 2 * (stages - 1) * latency_s + 1e-9
    # Plain 1F1B waits for a round trip in every period.
    assert simulate(schedule.TrainSchedule, 12, stages, latency_s) > bound + 12 * latency_s


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_an_evaluation_runs_forward_passes_only(stages: int, micro_batches: int) -> None:
    assert simulate(InferenceSchedule, micro_batches, stages, 0.0) == (micro_batches + stages - 1) * FORWARD_S
    for stage in range(stages):
        kinds = {type(one) for one in instructions(InferenceSchedule, micro_batches, stages, stage)}
        assert schedule.ForwardPass in kinds
        assert not kinds & {schedule.BackwardPass, schedule.SendGrad, schedule.OptimizerStep}


def test_only_the_ends_of_the_pipeline_read_data_and_the_update_comes_last() -> None:
    for stage in range(3):
        kinds = [type(one) for one in instructions(TrainSchedule, 4, 3, stage)]
        assert kinds.count(schedule.LoadMicroBatch) == (0 if stage == 1 else 4)
        assert kinds[-3:] == [schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep]
