"""DeepSpeed's JSON follows from ours, and other keys pass through."""

from typing import Any

import pytest

from stagdist.config.run_config import RunConfig
from stagdist.parallel.grid import Grid
from stagdist.training.engine.deepspeed_config import deepspeed_config


def run_config(**sections: Any) -> RunConfig:
    model = {
        "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
        "max_position_embeddings": 8, "section_layers": [1, 1],
    }  # fmt: skip
    training = {"steps": 1, "global_batch_size": 48, "micro_batch_size": 2}
    return RunConfig(name="x", model=model, **{"training": training} | sections)


def derived_config(config: RunConfig, grid: Grid) -> dict[str, Any]:
    return deepspeed_config(config.training, config.optimizer, config.deepspeed, grid)


def test_batch_sizes_agree_on_every_grid() -> None:
    for data in (1, 2, 4, 8):
        derived = derived_config(run_config(), Grid(2, data, 1))
        product = derived["train_micro_batch_size_per_gpu"] * derived["gradient_accumulation_steps"] * data
        assert product == derived["train_batch_size"] == 48


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_decides_one_block(precision: str) -> None:
    training = {"steps": 1, "global_batch_size": 2, "precision": precision}
    derived = derived_config(run_config(training=training), Grid(2, 1, 1))
    assert ("bf16" in derived, "fp16" in derived) == (precision == "bf16", precision == "fp16")
    assert derived.get("data_types") == ({"grad_accum_dtype": "fp32"} if precision == "bf16" else None)
    assert derived.get("communication_data_type") == ("fp32" if precision == "bf16" else None)
    assert derived["zero_optimization"]["stage"] == 1


def test_further_keys_pass_through_and_ours_stay() -> None:
    extra = {"comms_logger": {"enabled": True}, "zero_optimization": {"reduce_bucket_size": 123}}
    derived = derived_config(run_config(deepspeed=extra), Grid(1, 1, 1))
    assert derived["comms_logger"] == {"enabled": True}
    assert derived["zero_optimization"]["reduce_bucket_size"] == 123 and derived["zero_optimization"]["stage"] == 1
