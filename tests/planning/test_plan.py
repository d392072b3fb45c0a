"""Plans: exact counts, what a rank holds, reasons and warnings."""

from typing import Any

import pytest

from stagdist.config.run_config import RunConfig
from stagdist.planning.plan import Plan, plan

RUN: dict[str, Any] = {
    "name": "plan",
    "model": {
        "vocab_size": 100,
        "hidden_size": 8,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 10,
        "section_layers": [2, 2],
    },
    "training": {"steps": 5, "global_batch_size": 8},
    "data": {"corpora": [{"prefix": "data/none"}]},
}
# By hand: q and o 8 x 8, k and v 4 x 8, MLP three times 24 x 8, a norm of 8 before each part.
LAYER = (2 * 64 + 2 * 32) + 3 * 192 + 2 * 8
CROSS = (2 * 64 + 2 * 32) + 8
MEMORY = 8 + 8  # its norm and the null vector
MATRIX = 100 * 8


def planned(world_size: int = 2, **changes: dict[str, Any]) -> Plan:
    keys = {part: RUN[part] | changes.get(part, {}) for part in ("model", "training", "data")}
    rest = {part: value for part, value in changes.items() if part not in keys}
    return plan(RunConfig.model_validate({"name": "plan", **keys, **rest}), world_size)


def counts(result: Plan) -> tuple[int, list[int], list[int], list[int]]:
    """Parameters of the model, of the sections, of the stages, and the stages' copies."""
    stages = result.stages
    sections = list(result.section_parameters)
    return result.parameters, sections, [stage.parameters for stage in stages], [stage.copies for stage in stages]


def test_an_untied_staggered_model_is_counted_exactly() -> None:
    first, second = 2 * LAYER, 2 * (LAYER + CROSS) + MEMORY
    model, sections, stages, copies = counts(planned())
    assert sections == [first, second]
    assert model == MATRIX + first + second + 8 + MATRIX
    assert stages == [MATRIX + first, MATRIX + second + 8 + MATRIX]
    assert copies == [0, MATRIX], "every section starts from the embedding, so the second stage has a copy"


def test_a_tied_head_needs_no_matrix_of_its_own() -> None:
    untied, tied = counts(planned()), counts(planned(model={"tie_word_embeddings": True}))
    assert untied[0] - tied[0] == MATRIX
    assert untied[2][1] - tied[2][1] == MATRIX
    assert tied[3] == [0, MATRIX]


def test_a_sequential_model_has_the_embedding_on_its_first_stage_alone() -> None:
    model, sections, stages, copies = counts(planned(model={"connection": "sequential"}))
    assert sections == [2 * LAYER, 2 * LAYER]
    assert stages == [MATRIX + 2 * LAYER, 2 * LAYER + 8 + MATRIX]
    assert copies == [0, 0] and model == sum(stages)
    tied = {"connection": "sequential", "tie_word_embeddings": True}
    assert counts(planned(model=tied))[3] == [0, MATRIX]


def test_shared_weights_are_counted_once_but_lie_on_every_stage() -> None:
    model, sections, stages, copies = counts(planned(model={"share_section_weights": True}))
    own = 2 * CROSS + MEMORY
    assert sections == [2 * LAYER, own]
    assert model == 2 * MATRIX + 8 + 2 * LAYER + own
    assert stages == [MATRIX + 2 * LAYER, MATRIX + 2 * LAYER + own + 8 + MATRIX]
    assert copies == [0, MATRIX + 2 * LAYER]


def test_a_combined_model_has_one_share_per_section_on_its_stage() -> None:
    plain, combined = counts(planned()), counts(planned(model={"combine_sections": True}))
    assert combined[0] - plain[0] == 2
    assert [after - before for after, before in zip(combined[2], plain[2], strict=True)] == [1, 1]
    assert combined[3] == plain[3]


def test_one_stage_holds_every_parameter_once() -> None:
    for model in ({}, {"share_section_weights": True}, {"tie_word_embeddings": True, "combine_sections": True}):
        result = planned(1, model=model, parallel={"pipeline_parallel_size": 1})
        assert result.stages[0].parameters == result.parameters
        assert result.stages[0].copies == 0
        assert list(result.stages[0].sections) == [0, 1]


def test_tensor_ranks_split_matrices_and_pad_the_vocabulary() -> None:
    model = {"vocab_size": 99, "connection": "sequential"}
    stage = planned(4, model=model, parallel={"tensor_parallel_size": 2}).stages[0]
    matrices = 2 * LAYER - 2 * 2 * 8
    assert stage.parameters == 99 * 8 + 2 * LAYER
    assert stage.parameters_per_rank == 50 * 8 + matrices // 2 + 2 * 2 * 8


def test_work_of_a_step() -> None:
    result = planned(4, training={"global_batch_size": 16})
    assert str(result.grid) == "pipe 2 x data 2 x tensor 1"
    assert result.tokens_per_step == 16 * 10
    assert result.micro_batches == 8
    first, second = (stage.flops for stage in result.stages)
    assert result.flops_per_token == pytest.approx(first + second)
    bound = 8 * (first + second) / (7 * second + first + second)
    assert result.speedup_bound == pytest.approx(bound)
    assert result.bubble_bound == pytest.approx(1 - bound / 2)


def test_equal_stages_have_the_bubble_of_the_textbook() -> None:
    shape = {"connection": "sequential", "section_layers": [1] * 4, "vocab_size": 1}
    result = planned(4, model=shape, training={"global_batch_size": 12})
    assert result.bubble_bound == pytest.approx(3 / 15, abs=0.02)


@pytest.mark.parametrize("world_size", [3, 10, 32])
def test_a_world_that_does_not_fit_is_a_reason_not_an_exception(world_size: int) -> None:
    result = planned(world_size)
    assert result.grid is None and result.micro_batches is None and result.bubble_bound is None
    assert len(result.problems) == 1 and str(world_size // 2 if world_size > 3 else 3) in result.problems[0]
    assert result.stages[1].parameters > 0 and result.stages[1].memory is None


@pytest.mark.parametrize("world_size", [0, -2])
def test_no_ranks_are_a_reason(world_size: int) -> None:
    assert f"world size {world_size} is not a number of ranks" in planned(world_size).problems[0]


def test_a_run_without_a_corpus_would_not_start() -> None:
    result = planned(data={"corpora": []})
    assert "data.corpora is empty" in result.problems[0] and "tools/prepare_data.py" in result.problems[0]


def test_settings_that_are_probably_not_intended_have_a_warning() -> None:
    def warned(world_size: int = 2, **changes: dict[str, Any]) -> str:
        return " | ".join(planned(world_size, **changes).warnings)

    assert "1 micro-batch cannot keep 2 stages busy" in warned(training={"micro_batch_size": 8})
    assert "stages are unequal" in warned(model={"section_layers": [1, 4]})
    assert "stages are unequal" not in warned(model={"section_layers": [4, 3], "vocab_size": 20})
    assert "padded to 102" in warned(8, model={"vocab_size": 101}, parallel={"tensor_parallel_size": 2})
    assert "sections cannot decode in parallel" in warned(model={"stagger": 0})
    assert "validation share" in warned(evaluation={"interval_steps": 1}, data={"split": [1, 0, 0]})
    assert "validation share" not in warned(evaluation={"interval_steps": 1})
