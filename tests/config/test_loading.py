"""Configuration files: what is read, what is refused and in which words."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from stagdist.config.loading import differences, dump_config, load_config, read_config
from stagdist.config.parts import ModelConfig
from stagdist.config.run_config import RunConfig
from stagdist.errors import ConfigError

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "section_layers": [2, 1],
    },
    "training": {"steps": 10, "global_batch_size": 8},
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "pydantic" not in message and "http" not in message and "Value error" not in message
    return message


def test_a_file_and_overrides_give_a_frozen_configuration(small: Path) -> None:
    config = load_config(small, ["training.steps=20", "optimizer.betas=[0.8, 0.9]", "data.cache_directory="])
    assert config.model.section_layers == (2, 1)
    assert (config.training.steps, config.optimizer.betas, config.data.cache_directory) == (20, (0.8, 0.9), None)
    with pytest.raises(Exception, match="frozen"):
        config.training.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("text", ["3e-4", "3E-04", "+3e-4", "0.3e-3", ".3e-3", "3.0e-4", "0.0003"])
def test_numbers_with_an_exponent_are_numbers(small: Path, text: str) -> None:
    assert load_config(small, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == pytest.approx(3e-4)


def test_text_that_only_looks_like_a_number_stays_text(small: Path) -> None:
    assert load_config(small, ["logging.wandb.project=3e-4b", "runs_directory='3e-4'"]).runs_directory == "3e-4"


def test_overrides_reach_into_lists_and_make_what_is_missing(small: Path) -> None:
    overrides = ["data.corpora.0.prefix=a", "data.corpora.1={prefix: b, weight: 2}", "data.corpora.0.weight=3"]
    corpora = load_config(small, overrides).data.corpora
    assert [(corpus.prefix, corpus.weight) for corpus in corpora] == [("a", 3.0), ("b", 2.0)]
    assert load_config(small, ["model.section_layers.1=3"]).model.section_layers == (2, 3)
    assert load_config(small, ["model.rope_scaling.factor=4"]).model.rope_scaling is not None


@pytest.mark.parametrize(
    "override, words",
    [
        ("training.steps", ["training.steps", "key.path=value"]),
        ("training..steps=1", ["training..steps"]),
        ("data.corpora.1.prefix=a", ["data.corpora has 0 entries", "no entry 1"]),
        ("data.corpora.²=a", ["data.corpora is {'²': 'a'}, must be a list"]),
        ("model.section_layers.²=3", ["model.section_layers has 2 entries", "no entry ²"]),
        ("name.part=a", ["name is 'small'", "has no keys"]),
        ("model.section_layers=[1", ["not valid YAML"]),
        ("optimizer={eps: 1e-8, eps: 1e-9}", ["eps is given twice"]),
    ],
)
def test_an_override_without_a_place_is_refused(small: Path, override: str, words: list[str]) -> None:
    message = refused(small, override)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("model.hiden_size", "model.hidden_size"),
        ("trainig.steps", "training"),
        ("training.learning_rate", "optimizer.learning_rate"),
        ("logging.wandb.enable", "logging.wandb.enabled"),
        ("data.corpora.0.prefx", "data.corpora.0.prefix"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(small: Path, key: str, nearest: str) -> None:
    overrides = ["data.corpora.0.prefix=a"] if "corpora" in key else []
    message = refused(small, *overrides, f"{key}=1")
    assert f"unknown key {key.split('.')[0] if key.startswith('trainig') else key}" in message
    assert f"did you mean {nearest}?" in message


def test_an_unknown_key_like_none_is_refused_with_all_siblings(small: Path) -> None:
    assert "unknown key logging.zzz; logging has: interval_steps, progress_bar" in refused(small, "logging.zzz=1")


@pytest.mark.parametrize(
    "override, words",
    [
        ("training.steps=many", "training.steps is 'many', must be an integer (Optimizer steps of the run)"),
        ("training.steps=1.5", "training.steps is 1.5, must be an integer"),
        ("training.steps=true", "training.steps is true, must be a number"),
        ("training.steps=0", "training.steps is 0, must be at least 1"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate is 0, must be more than 0"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate is inf, must be a finite number"),
        ("scheduler.minimum_ratio=2", "scheduler.minimum_ratio is 2, must be at most 1"),
        ("training.precision=fp8", "training.precision is 'fp8', must be 'fp32', 'bf16' or 'fp16'"),
        ("model.section_layers=[]", "model.section_layers is [], must be a list of at least 1 entries"),
        ("model.section_layers=3", "model.section_layers is 3, must be a list"),
        ("data.split=[98, 2]", "data.split.2 is missing"),
        ("data.split=[1.0e-13, 1, 1]", "data.split [1e-13, 1.0, 1.0] must be 0 to 1e30 and needs a share for training"),
        ("data.split=[1, 1.0e+308, 1.0e+308]", "must be 0 to 1e30"),
        ("data.corpora=[{prefix: a, weight: 1.0e+308}]", "data.corpora.0.weight is 1e+308, must be at most 1e+30"),
        ("model=3", "model is 3, must be a mapping of keys"),
        ("runs_directory=3", "runs_directory is 3, must be text"),
        ("logging.progress_bar=maybe", "logging.progress_bar is 'maybe', must be true or false"),
        ("name=a/b", "name is 'a/b', a path"),
        ('name="a\\nb"', "name is 'a\\nb'; a path has no control characters"),
        (f"name={'ä' * 101}", "names of at most 200 bytes"),
        ('data.tokenizer="a\\0b"', "data.tokenizer is 'a\\x00b'; a path has"),
        (f"runs_directory=a/{'b' * 201}/c", "names of at most 200 bytes"),
        ("training.steps=010", "010 in line 1 is octal or of base 60 in YAML; write a decimal number"),
        ("parallel.timeout_s=10:00", "10:00 in line 1 is octal or of base 60"),
        ("optimizer.eps=1:30.5", "1:30.5 in line 1 is octal or of base 60"),
        ("data.split=[0, 1, 1]", "data.split [0.0, 1.0, 1.0] must be 0 to 1e30 and needs a share"),
        ("data.split=[1e308, 1e308, 1e308]", "needs a share for training"),
        ("deepspeed.when=2024-01-01", "deepspeed.when is datetime.date(2024, 1, 1): input was not a valid JSON value"),
        ("deepspeed={zero_optimization: {1: 2}}", "is 1, must be text"),
        ("deepspeed.a=[.nan]", "is nan, must be a finite number"),
        ("deepspeed.zero_optimization.reduce_bucket_size=x", "reduce_bucket_size is 'x'; give a number of elements"),
        ("deepspeed.zero_optimization.reduce_bucket_size=0", "reduce_bucket_size is 0; give a number of elements"),
        ("deepspeed.communication_data_type=fp8", "communication_data_type is 'fp8'; give fp16, bf16 or fp32"),
        ("parallel.device='cuda:٣'", "parallel.device is 'cuda:٣'; give auto"),
        ("deepspeed.optimizer.type=Adam", "deepspeed.optimizer (use optimizer.*)"),
        ("deepspeed.zero_optimization.stage=2", "deepspeed.zero_optimization.stage is 2, only 1 works"),
        ("model.num_attention_heads=3", "model.hidden_size 32 is not a multiple of model.num_attention_heads 3"),
        ("data.sequence_length=17", "data.sequence_length 17 is longer than model.max_position_embeddings 16"),
    ],
)
def test_a_wrong_value_is_refused_in_plain_words(small: Path, override: str, words: str) -> None:
    message = refused(small, override)
    assert words in message
    assert "\n" not in message, "a single problem is one line"


def test_heads_that_transformers_refuses_in_a_llama_are_refused_before_it_is_trained(small: Path) -> None:
    heads = ("model.num_attention_heads=3", "model.num_key_value_heads=3", "model.head_dim=8")
    load_config(small, heads)  # a StagFormer brings its own code along
    message = refused(small, *heads, "model.connection=sequential")
    assert "model.hidden_size 32 is not a multiple of model.num_attention_heads 3; a sequential model" in message
    assert "change one of them" in message and "\n" not in message


def test_a_missing_key_is_named_with_its_meaning(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    path.write_text("name: none\ntraining: {steps: 1}\n")
    message = refused(path)
    assert "model is missing (Shape of the model" in message
    assert "training.global_batch_size is missing (Sequences per optimizer step" in message


def test_all_problems_are_reported_together(small: Path) -> None:
    wrong_values = refused(small, "training.steps=x", "optimizer.eps=-1", "modle=1", "model.vocab_size=0")
    assert "4 problems" in wrong_values and wrong_values.count("\n  - ") == 4
    contradictions = refused(
        small,
        "model.num_key_value_heads=3",  # of the model
        "training.micro_batch_size=3",  # of the run
        "data.validation_corpora=[{prefix: a}]",  # of the data
        "parallel.pipeline_parallel_size=3",
    )
    assert "model.num_key_value_heads 3" in contradictions and "training.micro_batch_size 3" in contradictions
    assert "data.train_corpora is empty" in contradictions and "pipeline_parallel_size 3" in contradictions


def test_an_inconsistent_configuration_is_handed_back_with_its_problems(small: Path) -> None:
    config, problems = read_config(small, ["training.micro_batch_size=3"])
    assert config is not None and config.training.micro_batch_size == 3
    assert len(problems) == 1 and "training.global_batch_size 8 is not a multiple" in problems[0]
    assert read_config(small, ["training.steps=x"])[0] is None


def test_fp16_is_refused_on_a_cpu(small: Path) -> None:
    load_config(small, ["training.precision=fp16"])
    assert "use bf16" in refused(small, "training.precision=fp16", "parallel.device=cpu")


@pytest.mark.parametrize(
    "text, words",
    [
        ("name: a\nname: b\n", "key name is given twice, in line 1 and in line 2"),
        ("model:\n  vocab_size: 1\n  vocab_size: 2\n", "key vocab_size is given twice, in line 2 and in line 3"),
        ("name: [a\n", "not valid YAML"),
        pytest.param("name: " + "[" * 100_000, "nested too deeply", id="nested"),
        ("- a\n", "must hold keys"),
        ("", "must hold keys"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    message = refused(path)
    assert words in message and str(path) in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"there is no configuration file {tmp_path / 'absent.yaml'}" in refused(tmp_path / "absent.yaml")
    assert "cannot read the configuration file" in refused(tmp_path)


def test_the_written_configuration_reads_back_equal(small: Path, tmp_path: Path) -> None:
    overrides = [
        "optimizer.learning_rate=1e-5",
        "model.rope_scaling={}",
        "data.corpora.0.prefix=größe",
        "deepspeed.x=1",
    ]
    config = load_config(small, overrides)
    written = tmp_path / "resolved.yaml"
    written.write_text(dump_config(config), encoding="utf-8")
    assert load_config(written) == config
    assert yaml.safe_load(written.read_text(encoding="utf-8"))["optimizer"]["max_grad_norm"] == 1.0


def test_differences_name_the_keys_with_both_values(small: Path) -> None:
    first = load_config(small, ["data.corpora.0.prefix=a"])
    second = load_config(small, ["data.corpora.0.prefix=b", "model.hidden_size=64", "logging.wandb.enabled=true"])
    assert differences(first, first) == {}
    assert differences(first, second) == {
        "model.hidden_size": (32, 64),
        "model.head_dim": (8, 16),
        "data.corpora.0.prefix": ("a", "b"),
        "logging.wandb.enabled": (False, True),
    }
    assert differences(first.model, second.model) == {"hidden_size": (32, 64), "head_dim": (8, 16)}
    assert differences(first, load_config(small))["data.corpora.0.prefix"] == ("a", None)


def test_writing_a_default_of_the_model_out_is_no_difference(small: Path) -> None:
    written_out = ["model.num_key_value_heads=4", "model.head_dim=8", "model.cross_attention_key_value_heads=4"]
    assert differences(load_config(small), load_config(small, written_out)) == {}


def test_without_a_list_for_its_problems_a_model_raises_them() -> None:
    with pytest.raises(ValueError, match="num_key_value_heads 3"):
        ModelConfig.model_validate(SMALL["model"] | {"num_key_value_heads": 3})
    with pytest.raises(ValueError, match="micro_batch_size 3"):
        RunConfig.model_validate(SMALL | {"training": SMALL["training"] | {"micro_batch_size": 3}})
