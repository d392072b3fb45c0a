"""Rivals of the decode benchmark: each decodes our baseline, and what cannot be compared is refused."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.common.command import main
from benchmarks.decode import add_arguments, run
from benchmarks.decoding.contestants import SEED, EngineContestant, Load, Served
from benchmarks.decoding.measurement import row
from benchmarks.decoding.rivals import lineup
from benchmarks.decoding.rivals.baseline_llama import Baseline
from benchmarks.decoding.rivals.gguf_file import gguf_name, rotary_pairs
from benchmarks.decoding.rivals.lineup import RIVALS, Choice, Lineup, speedup
from benchmarks.decoding.rivals.rival import Decoded, wait_until_idle
from benchmarks.decoding.shapes import baseline
from benchmarks.decoding.site import DecodeSite
from stagdist.checkpoint.published.model_writer import stored_name
from stagdist.config.loading import load_config
from stagdist.config.parts import ModelConfig
from stagdist.decode.layers.weights import random_reader
from stagdist.decode.runtime.build import EngineOptions, build_stage, plan_decoding
from stagdist.errors import ConfigError, StagdistError
from stagdist.parallel.layout import model_parameters
from tests.benchmarks.tiny import write_tiny
from tests.decode.fake_cuda import FakeCuda
from tests.ranks import run_ranks

MODEL = """\
num_key_value_heads: 1
max_position_embeddings: 64
section_layers: [2, 1]
vocab_size: 320
hidden_size: 64
intermediate_size: 96
"""
RUN = """\
training: {steps: 1, global_batch_size: 4, micro_batch_size: 1}
data: {corpora: [{prefix: x}]}
"""
LOAD = Load(context=16, steps=4, batch=2)


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rivals") / "tiny.yaml"
    text = write_tiny(path, model=MODEL, rest=RUN).read_text()
    for line in ("  vocab_size: 300\n", "  hidden_size: 32\n", "  intermediate_size: 48\n"):
        text = text.replace(line, "", 1)  # Q8_0 needs rows of 32 weights
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def model(shape: str) -> ModelConfig:
    return baseline(load_config(shape).model, 2)


@pytest.fixture(scope="module")
def source(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    return Baseline(model, "cpu", tmp_path_factory.mktemp("formats"))


@pytest.fixture(scope="module")
def reference(model: ModelConfig) -> tuple[int, ...]:
    """Tokens of the first request, from our own engine."""
    options = EngineOptions(max_context=LOAD.length, num_slots=LOAD.batch, precision="fp32")
    return EngineContestant(DecodeSite(None, "cpu", 1, 60.0), model, options)(LOAD).token_ids


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def decode(title: str, precision: str, source: Baseline) -> Decoded:
    """Twice, since the second run must not depend on the first."""
    rival = RIVALS[title](source, precision, LOAD, 1)
    prompts = [LOAD.prompt(source.model.vocab_size, SEED + each) for each in range(LOAD.batch)]
    first, second = (rival.decode(prompts, LOAD.new_tokens) for _ in range(2))
    rival.close()
    assert first.token_ids == second.token_ids
    assert 2 <= len(second.times) <= LOAD.new_tokens and list(second.times) == sorted(second.times)
    assert [len(tokens) for tokens in second.token_ids] == [LOAD.new_tokens] * LOAD.batch
    return second


# --- the same model in every format -----------------------------------------------------------------------------


@pytest.mark.parametrize("title", ["llama.cpp", "openvino", "ctranslate2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_rival_decodes_our_baseline(title: str, precision: str, source: Baseline, reference: tuple[int, ...]) -> None:
    for package in RIVALS[title].packages:
        pytest.importorskip(package)
    if reason := RIVALS[title].obstacle(precision):
        pytest.skip(reason)
    tokens = decode(title, precision, source).token_ids
    if precision == "fp32":
        assert tokens[0] == reference
    else:
        assert tokens[0][0] == reference[0], "rounding changes tokens, but not the first of this prompt"
    assert tokens[0] != tokens[1], "each request has a prompt of its own"


def test_generate_decodes_our_baseline(source: Baseline, reference: tuple[int, ...]) -> None:
    assert decode("transformers", "fp32", source).token_ids[0] == reference


def test_a_static_cache_decodes_our_baseline(
    source: Baseline, reference: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)  # what it compiles is the same step
    assert decode("torch.compile", "fp32", source).token_ids[0] == reference


def test_a_cuda_graph_of_a_static_cache_decodes_our_baseline(
    source: Baseline, reference: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    assert decode("CUDA graph", "fp32", source).token_ids[0] == reference
    assert len(cuda.of("capture")) == 1 and len(cuda.of("replay")) == 2 * (LOAD.new_tokens - 1)


@pytest.mark.slow  # the test above checks the step, without compiling it
def test_a_compiled_static_cache_decodes_our_baseline(source: Baseline, reference: tuple[int, ...]) -> None:
    if reason := RIVALS["torch.compile"].obstacle("fp32"):
        pytest.skip(reason)
    assert decode("torch.compile", "fp32", source).token_ids[0] == reference


def test_llama_cpp_rotates_neighbors_where_transformers_rotates_halves() -> None:
    heads, width = 3, 8
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(heads * width, 5, generator=generator)
    hidden, angles = torch.randn(5, generator=generator), torch.rand(width // 2, generator=generator)

    def turned(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()

    halves = (weight @ hidden).view(heads, 2, width // 2)
    pairs = (rotary_pairs(weight, heads) @ hidden).view(heads, width // 2, 2)
    expected, found = turned(halves[:, 0], halves[:, 1]), turned(pairs[..., 0], pairs[..., 1])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(expected, found, strict=True))


def test_every_parameter_has_a_name_of_its_own_in_a_gguf_file(model: ModelConfig) -> None:
    names = [gguf_name(stored_name(spec.name, model)) for spec in model_parameters(model)]
    assert len(set(names)) == len(names) == 3 + 9 * model.num_layers
    assert {"token_embd.weight", "output.weight", "output_norm.weight", "blk.2.ffn_down.weight"} <= set(names)


def test_the_llama_has_the_weights_of_our_engine(source: Baseline) -> None:
    stage = build_stage(plan_decoding(source.model, EngineOptions(max_context=8), 1), random_reader(SEED), "cpu", None)
    embedding, head = stage.weights.embedding, stage.weights.head
    assert embedding is not None and isinstance(head, torch.Tensor)
    assert torch.equal(source.weights["model.embed_tokens.weight"], embedding)
    assert torch.equal(source.weights["lm_head.weight"], head)
    assert source.read_values == sum(each.numel() for each in stage.weights.tensors()) - embedding.numel()
    assert source.cache_values(LOAD) == 2 * 3 * 1 * 32 * 16 * 2


# --- what is refused, and what is reported ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("vllm", "fp32"), "--rivals vllm: give all, or some of llama.cpp, openvino"),
        (("all", "fp8"), "--rival-precisions fp8: give some of fp32, bf16, int8"),
        (
            ("llama.cpp,openvino", "fp32"),
            r"the rivals need xllamacpp, gguf, openvino; install with: pip install -e \.\[rivals\]",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused(
    given: tuple[str, str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=problem):
        Choice.parse(*given)
    assert Choice.parse("transformers,torch.compile", "fp32,bf16").titles == ("transformers", "torch.compile")


def test_a_model_that_formats_cannot_hold_is_refused(model: ModelConfig, tmp_path: Path) -> None:
    scaled = ModelConfig(**(model.model_dump() | {"rope_scaling": {"factor": 4.0}}))
    with pytest.raises(ConfigError, match="cannot export model.rope_scaling"):
        Baseline(scaled, "cpu", tmp_path)


def test_rivals_that_cannot_run_here_are_left_out_with_the_reason(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(RIVALS["torch.compile"], "obstacle", staticmethod(lambda precision: "no compiler"))
    choice = Choice(("CUDA graph", "torch.compile", "transformers"), ("fp32", "int8"))
    chosen = Lineup(DecodeSite(None, "cpu", 2, 60.0), model, choice)
    assert chosen.left_out == {
        "CUDA graph": "it runs on cuda only, this run is on cpu",
        "torch.compile fp32": "no compiler",
        "torch.compile int8": "it has no such weights here",
        "transformers int8": "it has no such weights here",
    }
    (name,) = contestants = chosen.build(LOAD)
    assert name == "transformers fp32"
    served = contestants[name](LOAD)
    assert torch.get_num_threads() == 2 and len(served.step_s) == LOAD.steps
    found = row(name, [served], LOAD.batch, chosen.facts(name, LOAD, [1e9]))
    assert found["read_per_step"][0]["cache_bytes"] == 4 * 2 * 3 * 32 * 16 * 2
    assert (
        found["threads"] == 2
        and found["efficiency"] > 0
        and found["bound_ms"] == pytest.approx(sum(found["read_per_step"][0].values()) / 1e6)
    )
    chosen.close()


def test_a_rival_in_fp32_must_choose_our_tokens_unless_two_are_close(
    model: ModelConfig, reference: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = DecodeSite(None, "cpu", 1, 60.0)
    chosen = Lineup(site, model, Choice(("transformers",), ("fp32", "bf16")))
    wrong = Served((1.0,), (*reference[:3], reference[3] + 1, *reference[4:]))
    assert chosen.same_tokens("transformers fp32", LOAD, Served((1.0,), reference), reference) == {
        "tokens_equal": len(reference), "tokens_compared": len(reference),
    }  # fmt: skip
    assert chosen.same_tokens("transformers bf16", LOAD, wrong, reference)["tokens_equal"] == 3
    with pytest.raises(StagdistError, match=f"token 3 is {reference[3] + 1} and not {reference[3]}, although"):
        chosen.same_tokens("transformers fp32", LOAD, wrong, reference)
    found = chosen.same_tokens("transformers fp32", LOAD, wrong, reference, refuse=False)
    assert found["tokens_equal"] == 3 and found["margin_at_first_difference"] >= lineup.CLOSE_MARGIN
    monkeypatch.setattr(lineup, "CLOSE_MARGIN", 1e9)
    assert chosen.same_tokens("transformers fp32", LOAD, wrong, reference)["margin_at_first_difference"] > 0
    chosen.close()


def test_speedups_are_taken_within_rounds() -> None:
    theirs, ours = [Served((2.0,)), Served((9.0,))], [Served((4.0,)), Served((6.0,))]
    assert speedup(theirs, ours)["staggered_speedup"] == pytest.approx(1.0)
    assert speedup([Served()], [Served()]) == {}


def test_threads_that_spin_after_a_run_are_waited_for_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter([0.0, 0.1, 0.2, 0.2])
    monkeypatch.setattr("benchmarks.decoding.rivals.rival.time.process_time", lambda: next(busy))
    wait_until_idle("idle after a while")
    assert next(busy, None) is None
    used = iter(range(1000))
    monkeypatch.setattr("benchmarks.decoding.rivals.rival.time.process_time", lambda: float(next(used)))
    monkeypatch.setattr("benchmarks.decoding.rivals.rival.PATIENCE_S", 0.1)
    with pytest.raises(StagdistError, match="threads of spinning still use cores"):
        wait_until_idle("spinning")


def test_a_wrong_name_is_answered_in_one_line(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--config", shape, "--context", "16", "--steps", "8", "--prefill", "0", "--device", "cpu"]
    assert main("", add_arguments, run, [*quick, "--rivals", "gpt"]) == 2
    assert capsys.readouterr().err.startswith("error: --rivals gpt: give all, or some of llama.cpp")


def run_benchmark(arguments: list[str]) -> int:
    """On every rank."""
    return main("", add_arguments, run, arguments)


@pytest.mark.slow  # the tests above check its parts
@pytest.mark.ranks
def test_rivals_join_the_rounds_and_the_sweeps_of_two_processes(shape: str, tmp_path: Path) -> None:
    path = tmp_path / "rivals.json"
    quick = [
        "--config",
        shape,
        "--rounds",
        "1",
        "--steps",
        "8",
        "--context",
        "16",
        "--prefill",
        "0",
        "--json",
        str(path),
    ]
    quick += ["--device", "cpu", "--splits", "2+1", "--heads", "last", "--sweep", "batches=1,2", "--precision", "bf16"]
    wanted = ["--rivals", "transformers", "--rival-precisions", "fp32"]
    run_ranks("tests.benchmarks.test_rivals:run_benchmark", 2, [*quick, *wanted])
    results = json.loads(path.read_text())
    (found,) = (row for row in results["contestants"] if row["name"] == "transformers fp32")
    assert found["tokens_equal"] == found["tokens_compared"] == 13, "compared with fp32, although we decode in bf16"
    assert found["threads"] == 2 and found["staggered_speedup"] > 0
    rows = [(row["batches"], row["name"]) for row in results["sweeps"]["batches"]]
    assert rows == [(batch, name) for batch in (1, 2) for name in ("staggered", "sequential", "transformers fp32")]
