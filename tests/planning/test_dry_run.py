"""What the dry run prints, and its exit code."""

from pathlib import Path

import pytest
import yaml

from stagdist.config.loading import load_config
from stagdist.config.run_config import RunConfig
from stagdist.errors import ConfigError
from stagdist.planning.dry_run import dry_run

TEXT = """
name: dry
model: {vocab_size: 1000, hidden_size: 64, intermediate_size: 128, num_attention_heads: 4,
        max_position_embeddings: 32, section_layers: [3, 2]}
data: {corpora: [{prefix: data/absent}], tokenizer: data/absent-tokenizer}
training: {steps: 5, global_batch_size: 8}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "dry.yaml"
    path.write_text(TEXT)
    return path


def test_a_run_that_would_start_is_described_completely(file: Path) -> None:
    text, code = dry_run(file, ["optimizer.eps=1e-7"], 4)
    assert code == 0 and text.endswith("This run would start.\n")
    assert "4 ranks = pipe 2 x data 2 x tensor 1" in text
    for words in ("parameters", "memory per rank", "weights", "gradients", "optimizer", "activations"):
        assert words in text
    assert "tokens per step" in text and "256" in text and "training FLOPs per token" in text


def test_the_printed_configuration_is_the_resolved_one(file: Path, tmp_path: Path) -> None:
    text, _ = dry_run(file, ["optimizer.eps=1e-7"], 2)
    block = text[text.index("name: dry") : text.index("\ngrid\n")]
    assert RunConfig.model_validate(yaml.safe_load(block)) == load_config(file, ["optimizer.eps=1e-7"])


def test_without_a_world_size_it_takes_the_fewest_ranks(file: Path) -> None:
    assert "2 ranks = pipe 2 x data 1 x tensor 1" in dry_run(file)[0]
    assert "4 ranks = pipe 2 x data 1 x tensor 2" in dry_run(file, ["parallel.tensor_parallel_size=2"])[0]


def test_missing_files_are_notes_not_reasons(file: Path) -> None:
    text, code = dry_run(file)
    assert code == 0
    assert "note: data/absent.bin is not on this machine" in text and "note: data/absent-tokenizer is not" in text


def test_every_reason_is_given_with_code_2(file: Path) -> None:
    text, code = dry_run(file, ["parallel.tensor_parallel_size=3", "training.micro_batch_size=3"], 7)
    assert code == 2
    assert "would not start, for 6 reasons" in text
    assert "model.num_attention_heads 4 is not a multiple of parallel.tensor_parallel_size 3" in text
    assert "world size 7 is not a multiple of pipeline 2 x tensor 3" in text
    assert "7 ranks do not fit" in text


def test_sections_that_cannot_be_divided_are_a_reason(file: Path) -> None:
    text, code = dry_run(file, ["parallel.pipeline_parallel_size=3"], 6)
    assert code == 2
    assert "parallel.pipeline_parallel_size 3 does not divide the 2 sections" in text
    assert "the sections cannot be divided among the stages" in text


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.hiden_size=3"], "unknown key model.hiden_size; did you mean model.hidden_size?"),
        (["training.steps=0", "optimizer.eps=x"], "for 2 reasons"),
        (["deepspeed.zero_optimization.stage=3"], "deepspeed.zero_optimization.stage is 3, only 1 works"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_reasons(file: Path, overrides: list[str], words: str) -> None:
    text, code = dry_run(file, overrides, 2)
    assert code == 2 and words in text


def test_a_missing_configuration_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no configuration file"):
        dry_run(tmp_path / "none.yaml")


def test_a_wrong_override_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="must look like key.path=value"):
        dry_run(file, ["training"])


def test_the_device_of_the_memory_is_named(file: Path) -> None:
    assert "estimated for cpu (parallel.device is auto)" in dry_run(file)[0]
    assert "estimated for cuda. " in dry_run(file, ["parallel.device=cuda"])[0]
    assert "estimated for cuda (parallel.device is auto)" in dry_run(file, device="cuda")[0]
