"""Memory of a rank: states by arithmetic, activations by their terms, and peaks of real runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from stagdist.config.run_config import RunConfig
from stagdist.parallel.grid import grid_for
from stagdist.planning.memory import Device, StageMemory, copied_elements, stage_memory
from stagdist.planning.plan import plan

RECORD = json.loads((Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "memory.json").read_text())


def config(model: dict[str, Any] | None = None, training: dict[str, Any] | None = None, **rest: Any) -> RunConfig:
    shape = {
        "vocab_size": 16000,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_attention_heads": 8,
        "max_position_embeddings": 512,
        "section_layers": [6, 5],
    }
    run = {"steps": 3, "global_batch_size": 8, "micro_batch_size": 2}
    keys = {"name": "memory", "model": shape | (model or {}), "training": run | (training or {}), **rest}
    return RunConfig.model_validate(keys)


def memory(run: RunConfig, world_size: int, stage: int = 0, device: Device = "cpu") -> StageMemory:
    return stage_memory(run, grid_for(run, world_size), stage, device)


def test_states_of_an_fp32_run_by_hand() -> None:
    stage = plan(config(), 2).stages[0]
    assert stage.memory is not None
    count = stage.parameters_per_rank
    assert (stage.memory.weights, stage.memory.gradients) == (4 * count, 4 * count)
    assert stage.memory.optimizer == 12 * count, "fp32 copy and two moments"
    assert memory(config(), 4).optimizer == 6 * count, "two replicas have half of it each"


def test_states_of_a_bf16_run_by_hand() -> None:
    run = config(training={"precision": "bf16"})
    count = plan(run, 2).stages[0].parameters_per_rank
    held = memory(run, 2)
    assert held.weights == 2 * count
    assert held.gradients == 2 * count + 4 * count, "bf16 of one backward pass, fp32 over the step"
    assert held.optimizer == 12 * count
    assert held.reduction_buffers == 0, "reduced where they lie"
    narrow = config(training={"precision": "bf16"}, deepspeed={"communication_data_type": "bf16"})
    assert 0 < memory(narrow, 2).reduction_buffers < 2 * count, "the larger group is rounded at once"


def test_earlier_stages_hold_more_micro_batches() -> None:
    equal = config(model={"section_layers": [3, 3, 3], "connection": "sequential"}, training={"micro_batch_size": 1})
    first, second = (memory(equal, 3, stage).activations for stage in (0, 1))
    assert first / second == pytest.approx(5 / 3, rel=0.05), "each runs two ahead of the next"
    one = memory(config(training={"micro_batch_size": 8}), 2)
    two = memory(config(training={"micro_batch_size": 8, "global_batch_size": 16}), 2)
    assert two.activations == pytest.approx(2 * one.activations, rel=0.03), "one micro-batch cannot be in flight twice"


def test_the_first_backward_pass_begins_without_gradients() -> None:
    whole = {"pipeline_parallel_size": 1}
    alone = memory(config(training={"global_batch_size": 2}, parallel=whole), 1)
    several = memory(config(training={"global_batch_size": 4}, parallel=whole), 1)
    assert alone.activations == several.activations
    head = 16000 * 512 * 4  # created and added immediately in a later pass, so that it counts for both
    assert several.backward_buffers - alone.backward_buffers == pytest.approx(alone.gradients, abs=head)


def test_layer_checkpointing_trades_activations_for_a_layer_run_again() -> None:
    kept, again = memory(config(), 2), memory(config(training={"activation_checkpointing": "layer"}), 2)
    assert again.activations < kept.activations / 5
    assert again.backward_buffers > 2 * kept.backward_buffers
    assert again.total < kept.total


def test_every_part_of_a_layer_has_its_activations() -> None:
    def per_layer(model: dict[str, Any], stage: int, device: Device = "cpu") -> int:
        """Activations of one more layer for one token, one micro-batch in flight."""
        run = {"global_batch_size": 2, "micro_batch_size": 2}
        deep = memory(config(model | {"section_layers": [4, 4]}, run), 2, stage, device)
        flat = memory(config(model | {"section_layers": [3, 3]}, run), 2, stage, device)
        return (deep.activations - flat.activations) // (2 * 512)

    heads = 4 * 512 * 4 + 8 * 4  # queries, keys, values, output; log-sum-exp
    norm = 3 * 512 * 4 + 4  # input, normalised, scaled; reciprocal root
    mlp = 4 * 1376 * 4
    assert per_layer({}, 0) == 2 * norm + heads + mlp
    assert per_layer({}, 1) == 3 * norm + 2 * heads + mlp
    assert per_layer({"connection": "sequential"}, 1) == 2 * norm + heads + mlp
    assert per_layer({}, 0, "cuda") == 2 * (norm - 512 * 4) + heads + mlp, "one kernel keeps no fp32 intermediate"
    fewer = per_layer({}, 1) - per_layer({"cross_attention_key_value_heads": 2}, 1)
    assert fewer == 2 * (512 - 128) * 4


def test_tensor_ranks_share_what_is_split_and_repeat_what_is_not() -> None:
    alone = memory(config(parallel={"pipeline_parallel_size": 1}), 1)
    split = memory(config(parallel={"pipeline_parallel_size": 1, "tensor_parallel_size": 2}), 2)
    assert split.weights == pytest.approx(alone.weights / 2, rel=0.01)
    assert alone.activations / 2 < split.activations < alone.activations


def test_gradients_are_copied_for_their_reduction_bucket_by_bucket() -> None:
    small = config(deepspeed={"zero_optimization": {"reduce_bucket_size": 1_000_000}})
    assert memory(small, 2).reduction_buffers < 4 * 1_000_000
    assert memory(small, 2).reduction_buffers < memory(config(), 2).reduction_buffers
    assert copied_elements([6, 3, 2, 9, 1], bucket=9) == 9, "6 + 3; 2; 9; 1"
    assert copied_elements([20, 30], bucket=9) == 0, "one gradient by itself is not copied, and none is cut"


def test_the_peak_is_the_largest_of_its_moments() -> None:
    held = memory(config(), 2)
    assert held.total == max(held.moments.values()) == held.moments[held.peak_moment]


def recorded_cases() -> list[Any]:
    """Runs of `benchmarks/memory.py`, with the peaks that were measured."""
    return [pytest.param(case, id=case["name"]) for case in RECORD["cases"]]


@pytest.mark.parametrize("case", recorded_cases())
def test_predicted_peaks_are_those_of_real_runs(case: dict[str, Any]) -> None:
    described = RunConfig.model_validate({"name": "recorded", **case["config"]})
    grid = grid_for(described, case["world_size"])
    predicted = [stage_memory(described, grid, rank["stage"], RECORD["device"]).total for rank in case["ranks"]]
    assert predicted == pytest.approx([rank["measured_bytes"] for rank in case["ranks"]], rel=0.05)


@pytest.mark.parametrize("case", recorded_cases())
def test_planned_parameters_are_those_of_real_runs(case: dict[str, Any]) -> None:
    stages = plan(RunConfig.model_validate({"name": "recorded", **case["config"]}), case["world_size"]).stages
    for rank in case["ranks"]:
        assert stages[rank["stage"]].parameters_per_rank == rank["engine_parameters"]


def test_real_runs_of_three_large_shapes_are_on_record() -> None:
    large = [case for case in RECORD["cases"] if min(rank["measured_bytes"] for rank in case["ranks"]) >= 1e9]
    assert len(large) >= 3
    assert len({case["config"]["training"].get("precision", "fp32") for case in large}) > 1
