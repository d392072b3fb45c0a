"""Which keys may change between a checkpoint and the run that resumes from it, and which are refused."""

from pathlib import Path
from typing import Any

import pytest

from stagdist.checkpoint.training.directory import CONFIG, TrainingState
from stagdist.config.loading import dump_config
from stagdist.config.run_config import RunConfig
from stagdist.errors import ConfigError
from stagdist.training.saving.resumed_config import resumed_config
from tests.launch.runs import tiny_config

CORPORA, TOKENIZER = "identity of the corpora", "fingerprint of the tokenizer"


def config(**sections: dict[str, Any]) -> RunConfig:
    """A run of 12 steps of 8 samples."""
    return RunConfig.model_validate(tiny_config(Path("corpus"), "run", **sections))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The files of a checkpoint that are read, after 8 steps of a run that was started with 96 samples."""
    (tmp_path / CONFIG).write_text(dump_config(config()))
    TrainingState(8, 64, 96, (2, 1, 1), data_identity=CORPORA, tokenizer=TOKENIZER).write(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"training": {"steps": 8}},
        {"training": {"steps": 9}},
        {"training": {"steps": 13}},
        {"training": {"steps": 1300}, "data": {"num_samples": 96}},
        {"training": {"micro_batch_size": 4}},
        {"training": {"deterministic": True}},
        {"training": {"precision": "bf16"}},
        {"parallel": {"tensor_parallel_size": 2}},
        {"optimizer": {"learning_rate": 0.1}},
        {"data": {"num_samples": 96}},
        {"data": {"corpora": [{"prefix": "elsewhere/corpus"}]}},
    ],
)
def test_what_keeps_the_samples_may_change(checkpoint: Path, sections: dict[str, dict[str, Any]]) -> None:
    found = resumed_config(config(**sections), checkpoint, CORPORA, TOKENIZER)
    expected = config(**{**sections, "data": {**sections.get("data", {}), "num_samples": 96}})
    assert found == expected, "the order of the samples is that of the checkpoint"


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"model": {"hidden_size": 64}}, "another model: model.hidden_size was 32, is 64"),
        ({"model": {"tie_word_embeddings": True}}, "model.tie_word_embeddings was False, is True"),
        ({"data": {"sequence_length": 16}}, "data.sequence_length was None, is 16; restore it"),
        ({"data": {"split": [80, 10, 10]}}, "data.split was"),
        ({"data": {"num_samples": 104}}, "data.num_samples was 96, is 104"),
        ({"training": {"global_batch_size": 4}}, "training.global_batch_size was 8, is 4"),
        ({"training": {"steps": 7}}, "is of step 8, but training.steps is 7; set it to 8 or more"),
    ],
)
def test_what_would_change_model_or_samples_is_refused_by_name(
    checkpoint: Path, sections: dict[str, dict[str, Any]], complaint: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        resumed_config(config(**sections), checkpoint, CORPORA, TOKENIZER)
    assert str(checkpoint) in str(refused.value) and complaint in str(refused.value), refused.value
    assert refused.value.everywhere, "every rank comes to the same"


def test_other_corpora_or_another_tokenizer_under_the_same_path_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="trained on other corpora, or with another tokenizer"):
        resumed_config(config(), checkpoint, "others", TOKENIZER)


@pytest.mark.parametrize(
    ("steps", "scheduler", "expected"),
    [
        (12, {}, ""),
        (24, {"kind": "constant"}, ""),
        (24, {"decay_steps": 12}, ""),
        (24, {"kind": "cosine"}, "learning rate of step 9 is 0.000775 instead of 0.000325"),
        (24, {"kind": "linear"}, "learning rate of step 9 is 0.0007 instead of 0.0004"),
        (24, {"kind": "warmup_stable_decay", "decay_steps": 6}, "learning rate of step 9 is 0.001 instead of 0.0007"),
    ],
)
def test_a_schedule_that_moves_with_the_number_of_steps_is_reported(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, steps: int, scheduler: dict[str, Any], expected: str
) -> None:
    with caplog.at_level("INFO"):
        resumed_config(config(training={"steps": steps}, scheduler=scheduler), checkpoint, CORPORA, TOKENIZER)
    assert len(caplog.messages) == bool(expected)
    assert all(expected in line and line.startswith("training.steps was 12, is 24") for line in caplog.messages)
