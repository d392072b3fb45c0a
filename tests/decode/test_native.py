"""Compiled layers give what plain torch gives, are compiled once, and are replaced by torch where that cannot be."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stagdist.config.parts import ModelConfig
from stagdist.decode.native import library as compiled
from stagdist.decode.native.layer_math import NativeMath
from stagdist.decode.runtime import build
from stagdist.decode.runtime.build import EngineOptions, use_native
from stagdist.errors import ConfigError
from tests.decode.kernels.test_interpreted import PARTS, SHAPES, TOLERANCES
from tests.decode.kernels.twins import Layers, MathKind, Shape, differences
from tests.reference.variants import BASE

WIDE = {"hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 2, "head_dim": 72}
ALL_SHAPES = SHAPES | {
    "wide heads, fp32": Shape(WIDE, (0, 17, 39), "fp32"),
    "wide heads, bf16": Shape(WIDE, (39,), "bf16"),
    "wide heads, int8": Shape(WIDE, (5, 17, 39, 1, 2), "fp32", weights="int8"),
    "wide heads, int8 and bf16": Shape(WIDE, (5, 17), "bf16", weights="int8"),
    "wide heads, rows of two sections": Shape(WIDE, (4, 39, -1), "fp64", repeats=2),
}


@pytest.fixture
def recompiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for compiled files; the process forgets what it has loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled._library_or_error.cache_clear()
    build._warn_once.cache_clear()
    yield tmp_path
    compiled._library_or_error.cache_clear()


@pytest.fixture
def empty_source(recompiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions that do nothing, which compile fast."""
    names = (f"{function}_{precision}" for function in compiled.FUNCTIONS for precision in compiled.PRECISIONS)
    source = recompiled / "layers.cpp"
    source.write_text("".join(f'extern "C" void {name}(const void *) {{}}\n' for name in names))
    monkeypatch.setattr(compiled, "SOURCE", source)


@pytest.mark.parametrize("name", ALL_SHAPES)
def test_each_part_of_a_layer_is_that_of_plain_torch(name: str) -> None:
    shape = ALL_SHAPES[name]
    (found,) = differences({name: shape}, MathKind.NATIVE).values()
    assert set(found) == PARTS
    for part, difference in found.items():
        assert difference < TOLERANCES[shape.precision], part


@pytest.mark.parametrize("rows", [1, 8])
def test_an_empty_part_of_a_head_gives_no_logits(rows: int) -> None:
    math = NativeMath(ModelConfig(**BASE), 1, None, torch.float32)
    assert math.norm_linear(torch.ones(rows, 8), torch.ones(8), torch.empty(0, 8)).shape == (rows, 0)


def test_threads_give_the_same_bits() -> None:
    """Each thread computes complete sums."""
    shape = Shape(WIDE, (5, 17, 39, 1, 2), "fp32")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(differences({"threads": shape}, MathKind.NATIVE))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.parametrize("scale", [1e-3, 3.0, 30.0])
def test_attention_is_exact_for_small_and_large_scores(scale: float) -> None:
    """With a large scale all entries but one get a weight near zero; with a small one all get the same."""
    shape = Shape(WIDE, (39, 7), "fp32")
    exact, found = Layers(shape, "fp64"), Layers(shape, "fp32", by_rows=True)
    for layers in (exact, found):
        assert isinstance(layers.layer.qkv, torch.Tensor)
        layers.layer.qkv.mul_(scale)
    expected, native = exact.run(MathKind.TORCH)["self"], found.run(MathKind.NATIVE)["self"]
    assert float((native - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.usefixtures("empty_source")
def test_layers_are_compiled_once(recompiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.library()
    (file,) = (recompiled / "stagdist").glob("*.so")
    written = file.stat().st_mtime_ns
    compiled._library_or_error.cache_clear()
    compiled.library()
    assert file.stat().st_mtime_ns == written
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-DOTHER"))
    compiled._library_or_error.cache_clear()
    compiled.library()
    assert len(list((recompiled / "stagdist").glob("*.so"))) == 2
    (recompiled / "included.h").write_text("")
    compiled._library_or_error.cache_clear()
    compiled.library()
    assert len(list((recompiled / "stagdist").glob("*.so"))) == 3
    assert not list((recompiled / "stagdist").glob("*.partial"))


@pytest.mark.usefixtures("empty_source")
def test_without_a_folder_for_the_result_nothing_stays_behind(
    recompiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = recompiled / "file"
    blocked.write_text("no folder")
    before = set(recompiled.iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(compiled.tempfile, "tempdir", str(recompiled))
    assert compiled.library().mlp_fp32 is not None
    assert set(recompiled.iterdir()) == before


def test_without_a_compiler_torch_computes_and_says_so_once(
    recompiled: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(recompiled))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not use_native(EngineOptions(), "cpu")
    (record,) = caplog.records
    assert "there is no C++ compiler; install one of g++, clang++, c++, or set CXX" in record.getMessage()
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        use_native(EngineOptions(kernels=True), "cpu")
    assert not use_native(EngineOptions(kernels=False), "cpu")
    assert len(caplog.records) == 1


def test_a_compiler_that_fails_is_reported_and_not_run_again(recompiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, runs = recompiled / "compiler", recompiled / "runs"
    compiler.write_text(f"#!/bin/sh\necho run >> {runs}\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    for _ in range(2):
        with pytest.raises(ConfigError, match="compiler fails on layers.cpp"):
            compiled.library()
    assert runs.read_text() == "run\n"
    compiled._library_or_error.cache_clear()
    monkeypatch.setenv("CXX", str(recompiled / "missing"))
    with pytest.raises(ConfigError, match="cannot be run.*set CXX"):
        compiled.library()


def test_fp16_is_computed_by_torch(caplog: pytest.LogCaptureFixture) -> None:
    build._warn_once.cache_clear()
    options = EngineOptions(precision="fp16")
    assert not use_native(options, "cpu")
    assert "compiled layers have no fp16" in caplog.text
    with pytest.raises(ConfigError, match="give one of fp32, bf16, fp64"):
        use_native(replace(options, kernels=True), "cpu")
