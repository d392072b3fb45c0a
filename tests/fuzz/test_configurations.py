"""Damaged and unusual run configurations through `launch/pretrain.py --dry-run`."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import pretrain
from stagdist.config.loading import dump_config, load_config
from stagdist.config.run_config import RunConfig
from tests.fuzz.mutations import Outcome, mutations, run_main
from tests.launch.runs import tiny_config

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 12)
)
MERGES = "m0: &m0 {x: 1}\n" + "".join(
    f"m{level}: &m{level} {{<<: [{', '.join([f'*m{level - 1}'] * 10)}]}}\n" for level in range(1, 12)
)


@pytest.fixture(scope="module")
def text() -> str:
    """A configuration with every key."""
    further = {"a": [1, 2.5, True, None, "text"], "b c": "größe"}
    return "# A comment.\n" + dump_config(RunConfig.model_validate(tiny_config(Path("c"), "run", deepspeed=further)))


def dry_run(path: Path, *overrides: str) -> Outcome:
    """A dry run; it has to end with a plan, with problems, or with one line of error."""
    words = [word for one in overrides for word in ("--set", one)]
    outcome = run_main(pretrain.main, "--config", path, "--dry-run", *words)
    assert "Traceback" not in outcome.errors, outcome
    if outcome.errors:
        outcome.assert_refused()
    elif outcome.code == 2:
        assert "This run would not start, for" in outcome.output, outcome
    else:
        assert outcome.code == 0 and outcome.output.endswith("This run would start.\n"), outcome
    assert len(outcome.errors) < 1500, "long values are cut"
    return outcome


def assert_same(plain: Any, ours: Any) -> None:
    """A configuration holds what PyYAML reads; we alone read 1e-3 as a number, and numbers in quotes are numbers."""
    if isinstance(plain, dict) and isinstance(ours, dict):
        for key, value in plain.items():
            assert_same(value, ours[key])
    elif isinstance(plain, list) and isinstance(ours, list):
        assert len(plain) == len(ours)
        for one, other in zip(plain, ours, strict=True):
            assert_same(one, other)
    elif isinstance(plain, str) and isinstance(ours, bool):
        assert plain.lower() in ("true", "t", "yes", "y", "on", "1", "false", "f", "no", "n", "off", "0")
    elif isinstance(plain, str) and not isinstance(ours, str):
        assert math.isclose(float(plain), ours, rel_tol=1e-15)
    else:
        assert plain == ours, (plain, ours)


def test_every_mutated_configuration_is_refused_in_one_line_or_means_what_it_says(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    for mutation in mutations(text.encode(), others=[LAUGHS.encode(), b"\x89PNG\r\n\x1a\n\0\0"]):
        path.write_bytes(mutation.content)
        outcome = dry_run(path)
        if outcome.errors:
            outcome.assert_refused(str(path))
        elif "=== " in outcome.output or outcome.code == 0:
            assert_same(yaml.safe_load(mutation.content) or {}, load_config(path).model_dump(mode="json"))
    assert [one.name for one in tmp_path.iterdir()] == ["run.yaml"]


def test_values_of_the_command_line_are_refused_in_one_line_or_mean_what_they_say(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    overrides = b"data.corpora.0={prefix: 'a b', weight: 2.5}", b"training.steps=8", b"optimizer.betas=[0.9, 0.95]"
    for number, override in enumerate(overrides):
        for mutation in mutations(override, seed=number):
            words = mutation.content.decode(errors="surrogateescape")
            dry_run(path, words)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(LAUGHS, "100000 keys and values", id="laughs"),
        pytest.param(MERGES, "100000 keys and values", id="merges"),
        ("a: &a [*a]", "100000 keys and values"),
        ("a: &a\n  b: *a", "100000 keys and values"),
        ("name: \0", "not valid YAML"),
        ("name: \x07", "not valid YAML"),
        ("name: [a\n  b: c", "not valid YAML"),
        ("name:\n\t- a", "not valid YAML"),
        ("name: a\nname: b", "given twice"),
        ("---\nname: a\n---\nname: b", "not valid YAML"),
        ("name: *nowhere", "not valid YAML"),
        ("name: !!python/object/apply:os.system [id]", "not valid YAML"),
        ("name: !!bool maybe", "a value cannot be read"),
        ("name: !!int text", "a value cannot be read"),
        ("name: !!int ''", "a value cannot be read"),
        ("steps: 010", "010 in line 1 is octal"),
        ("name: !!timestamp text", "a value cannot be read"),
        ("name: 2024-13-45", "a value cannot be read"),
        ("name: 2024-01-01T00:00:00+99:99999", ""),
        ("name: !!binary é", "not valid YAML"),
        ("name: !!map [a]", "a value cannot be read"),
        ("name: !!omap [a]", "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("? {a: b}\n: c", "not valid YAML"),
        ("steps: " + "9" * 5000, "a value cannot be read"),
        ("%YAML 9.9\n---\na: b", "not valid YAML"),
        ("text", "must hold keys"),
        ("- a", "must hold keys"),
        ("2024-01-01", "must hold keys"),
        ("~", "must hold keys"),
        ("{" * 1000, "nested too deeply"),
        ("a: " * 5000, "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_at_once(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    began = time.monotonic()
    outcome = dry_run(path)
    assert time.monotonic() - began < 5
    if complaint:
        outcome.assert_refused(str(path), complaint)
    else:
        assert outcome.code == 2


VALUES = ("9" * 4000, "x" * 9999, "{a: {1: 2}}")


@pytest.mark.parametrize("value", VALUES)
def test_no_value_of_any_key_ends_in_a_traceback(tmp_path: Path, text: str, value: str) -> None:
    """Every key of the configuration, with values of other types and sizes."""
    path = tmp_path / "run.yaml"
    path.write_text(text)

    def paths(tree: Any, here: str = "") -> list[str]:
        entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
        below = [one for key, inner in entries for one in paths(inner, f"{here}.{key}" if here else str(key))]
        return below or [here]

    for key in paths(yaml.safe_load(text)):
        dry_run(path, f"{key}={value}")


@pytest.mark.parametrize("keys", ["1: a", "null: a", "true: a", "1.5: a", "model: {1: a}", "data: {corpora: [{2: 3}]}",
                                  "model: {section_layers: {1: 1}}", "deepspeed: {1: 2}", "2024-01-01: a"])  # fmt: skip
def test_keys_that_are_no_text_are_refused(tmp_path: Path, keys: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(keys)
    assert dry_run(path).code == 2


def test_a_byte_order_mark_and_other_ends_of_lines_change_nothing(tmp_path: Path, text: str) -> None:
    plain = tmp_path / "plain.yaml"
    plain.write_text(text)
    for number, content in enumerate(("\ufeff" + text, text.replace("\n", "\r\n"), "\ufeff---\n" + text)):
        path = tmp_path / f"{number}.yaml"
        path.write_bytes(content.encode())
        assert load_config(path) == load_config(plain)


def test_other_encodings_are_named(tmp_path: Path, text: str) -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-32", "latin-1"):
        path = tmp_path / "run.yaml"
        path.write_bytes(("# größe\n" + text).encode(encoding))
        dry_run(path).assert_refused(str(path), "is not UTF-8" if encoding[-2:] not in ("le", "32") else "")
