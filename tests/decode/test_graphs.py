"""Steps of fixed shape give the tokens of plain steps, here without a GPU; what graphs are captured, where and when."""

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stagdist.decode.control import Control
from stagdist.decode.engine_stats import StageReport
from stagdist.decode.frontend.deployment import show_captures
from stagdist.decode.layers.weights import Device
from stagdist.decode.request import Request, RequestOutput, SamplingParams
from stagdist.decode.runtime import graphs
from stagdist.decode.runtime.build import EngineOptions
from stagdist.decode.runtime.graphs import row_buckets
from stagdist.decode.runtime.stage import Stage
from stagdist.decode.sampling.sampling_plan import Mode
from stagdist.decode.scheduler import Scheduler
from stagdist.errors import ConfigError
from tests.decode.decoding import Case, World, engine_of, prompt, run_cases, run_one
from tests.decode.fake_cuda import FakeCuda
from tests.reference.variants import VARIANTS

REQUESTS = [
    Request(str(length), prompt(length), SamplingParams(max_new_tokens=new, temperature=temperature, seed=length))
    for length, new, temperature in ((1, 8, 0.0), (2, 3, 1.0), (4, 9, 0.0), (6, 2, 0.7), (13, 11, 0.0), (24, 4, 1.0))
]
PLAIN = EngineOptions(precision="fp64", chunk_size=5, num_slots=3, graphs=False)
FIXED = replace(PLAIN, graphs=True)
CAPTURED_VARIANTS = (
    "one section", "stagger 0", "stagger 2", "window", "shared", "combined", "grouped queries", "sequential",
    "three sections with everything",
)  # fmt: skip


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Rows of all fixed steps that were run."""
    seen: set[int] = set()
    step = graphs.FixedStep.__call__

    def noting(self: graphs.FixedStep, positions: Tensor, mode: Mode) -> None:
        seen.add(len(positions))
        step(self, positions, mode)

    monkeypatch.setattr(graphs.FixedStep, "__call__", noting)
    yield seen


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Graphs are captured and replayed, on the CPU."""
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def serve_in_two_waves(case: Case) -> dict[str, list[int]]:
    """Tokens by request. The second wave comes when the first has left slots that ran as filling."""
    stage, transport = World().stage(case)
    engine = engine_of(case, stage, transport)
    tokens: dict[str, list[int]] = {}
    waves = [
        [replace(each, request_id=f"{each.request_id} again") for each in REQUESTS],
        [Request("long", prompt(2), SamplingParams(max_new_tokens=22, temperature=0.0)), *REQUESTS[:4]],
    ]

    def next_wave() -> None:
        for request in waves.pop():
            engine.submit(request)
        if not waves:
            engine.close()

    def take(outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        if waves and len(tokens["long"]) == 10:
            next_wave()

    next_wave()
    engine.run(take)
    return tokens


# --- buckets ----------------------------------------------------------------------------------------------------


def test_rows_are_captured_in_powers_of_two_up_to_the_slots() -> None:
    assert row_buckets(1) == [1]
    assert row_buckets(2) == [1, 2]
    assert row_buckets(6) == [1, 2, 4, 6]
    assert row_buckets(8) == [1, 2, 4, 8]


# --- the same tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_of_fixed_shape_gives_the_same_tokens(variant: str) -> None:
    plain = Case(variant, VARIANTS[variant], REQUESTS, PLAIN)
    first, second = run_cases([plain, replace(plain, options=FIXED)])
    assert [each.token_ids for each in first.completions] == [each.token_ids for each in second.completions]
    for (_, positions, logits), (_, same_positions, same_logits) in zip(first.logits, second.logits, strict=True):
        served = [row for row, position in enumerate(positions) if position > 0]  # other rows have no request
        assert [positions[row] for row in served] == same_positions
        assert (logits[served] - same_logits).abs().max() < 1e-9


@pytest.mark.parametrize("variant", ["stagger 2", "window", "shared", "three sections with everything"])
def test_rows_that_fill_a_bucket_change_nothing(variant: str, shapes: set[int]) -> None:
    case = Case(variant, VARIANTS[variant], REQUESTS, replace(PLAIN, num_slots=6))
    expected = serve_in_two_waves(case)
    assert expected == serve_in_two_waves(replace(case, options=replace(FIXED, num_slots=6)))
    # Five requests run in a bucket of six rows and three in one of four; later the slots are admitted to.
    assert shapes == {1, 2, 4, 6}


def test_recurrent_decoding_works_with_fixed_shapes() -> None:
    options = replace(PLAIN, num_slots=2, recurrent=True)
    plain = Case("recurrent", VARIANTS["shared"], REQUESTS, options)
    first, second = run_cases([plain, replace(plain, options=replace(options, graphs=True))])
    assert [each.token_ids for each in first.completions] == [each.token_ids for each in second.completions]


@torch.inference_mode()
def test_the_time_of_a_fixed_step_is_in_the_times_of_the_rank() -> None:
    stage, _ = World().stage(Case("", {}, [], FIXED))
    stage.prefill(0, prompt(3), SamplingParams(max_new_tokens=2))
    before = stage.executor.spent_s["compute"]
    stage.run(step=True)
    assert stage.executor.spent_s["compute"] > before


def test_a_graph_that_would_have_to_delay_messages_is_refused() -> None:
    with pytest.raises(ConfigError, match="a graph cannot delay messages; give graphs=False"):
        EngineOptions(graphs=True, link_delay_s=0.01)


# --- captured ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CAPTURED_VARIANTS)
def test_replays_give_the_same_tokens_and_nothing_is_captured_after_the_start(variant: str, cuda: FakeCuda) -> None:
    plain = Case(variant, VARIANTS[variant], REQUESTS, PLAIN)
    (expected,) = run_cases([plain])
    fixed = replace(plain, options=FIXED)
    stage, transport = World().stage(fixed)
    captured = len(cuda.of("capture"))
    assert captured == len(row_buckets(3)) * (len(stage.readout.sampler.modes()) + 1)
    found = run_one(stage, transport, fixed)
    assert [each.token_ids for each in found.completions] == [each.token_ids for each in expected.completions]
    assert len(cuda.of("capture")) == captured
    assert len(cuda.of("replay")) == captured + found.steps  # each graph ran once at the start


def test_all_captures_share_one_stream_and_one_pool_and_follow_warm_up_runs_on_that_stream(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, step = cuda.current, graphs.FixedStep.__call__

    def noting(self: graphs.FixedStep, positions: Tensor, mode: Mode) -> None:
        cuda.events.append(("step", len(positions), mode, cuda.current, cuda.capturing))
        step(self, positions, mode)

    monkeypatch.setattr(graphs.FixedStep, "__call__", noting)
    shown: list[tuple[int, int]] = []
    stage, _ = World().stage(Case("", {}, [], FIXED), progress=lambda done, total: shown.append((done, total)))
    modes = (*stage.readout.sampler.modes(), Mode.OTHER)
    shapes = [(rows, mode) for rows in (3, 2, 1) for mode in modes]  # the largest first
    assert shown == [(done, len(shapes)) for done in range(1, len(shapes) + 1)]
    ((pool, stream),) = {(pool, stream) for _, _, pool, stream in cuda.of("capture")}
    assert stream is not started and pool is not None
    assert started in stream.waited_for and stream in started.waited_for
    each = ["step"] * graphs.WARM_UP_RUNS + ["capture", "step", "replay"]
    assert [event[0] for event in cuda.events] == each * len(shapes)
    steps = [event[1:] for event in cuda.events if event[0] == "step"]
    assert [(rows, mode) for rows, mode, _, _ in steps[:: graphs.WARM_UP_RUNS + 1]] == shapes
    assert {on for _, _, on, _ in steps} == {stream}
    assert [capturing for *_, capturing in steps] == [*[False] * graphs.WARM_UP_RUNS, True] * len(shapes)

    cuda.events.clear()
    stage.close()
    assert [event[0] for event in cuda.events] == ["synchronize"] + ["reset"] * len(shapes)


class _Operators(TorchDispatchMode):
    """Notes operators whose result has a size or value that the host must know, also inside others."""

    def __init__(self, cuda: FakeCuda):
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        has_mask = name in ("index", "index_put_") and any(
            getattr(each, "dtype", None) == torch.bool for each in args[1]
        )
        if has_mask or name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"):
            self._cuda.events.append(("read", func))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Notes methods that bring a tensor to the host, unless it is a buffer there. A CPU has no operators for them."""

    def __init__(self, cuda: FakeCuda):
        super().__init__()
        self._cuda = cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.cpu, Tensor.numpy) and not self._cuda.is_on_host(args[0]):
            self._cuda.events.append(("read", func))
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads(cuda: FakeCuda) -> Iterator[None]:
    """Note everything for which the host would wait for a GPU, as events `read`."""
    with _Operators(cuda), _Methods(cuda):
        yield


Reports = Callable[[Stage], tuple[StageReport, ...]]


def _unwatched(reports: Reports, made: list[Stage]) -> Reports:
    """The same without notes of reads, since its tensors are in host memory; calls are added to `made`."""

    def unwatched(stage: Stage) -> tuple[StageReport, ...]:
        made.append(stage)
        with torch._C.DisableTorchFunction():
            return reports(stage)

    return unwatched


def _with_reports(decide: Callable[..., Control]) -> Callable[..., Control]:
    """The same with a report after every other operation."""
    turns = itertools.cycle([float("inf"), float("-inf")])

    def decide_or_report(scheduler: Scheduler, **arguments: bool) -> Control:
        scheduler._reported_s = next(turns)
        return decide(scheduler, **arguments)

    return decide_or_report


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 1.0, "seed": 1}, {"temperature": 0.7, "seed": 2, "top_k": 5, "repetition_penalty": 1.2}],
    ids=["greedy", "sampled", "truncated"],
)
@pytest.mark.parametrize("reports", [False, True])
def test_a_step_is_launched_before_the_host_waits_for_the_tokens_of_the_one_before(
    params: dict[str, Any], reports: bool, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Stage] = []
    monkeypatch.setattr(Stage, "reports", _unwatched(Stage.reports, made))
    if reports:
        monkeypatch.setattr(Scheduler, "decide", _with_reports(Scheduler.decide))
    new = 12
    sampling = SamplingParams(**{"temperature": 0.0, "max_new_tokens": new} | params)
    late = Request("late", prompt(9), SamplingParams(max_new_tokens=2))  # admitted and retired while others decode
    requests = [*(Request(str(slot), prompt(3 + slot), sampling) for slot in range(2)), late]
    case = Case("", {}, requests, FIXED)
    stage, transport = World().stage(case)
    engine = engine_of(case, stage, transport)
    cuda.events.clear()
    with host_reads(cuda):
        done = engine.generate(case.requests)
    assert [len(each.token_ids) for each in done] == [new, new, 2]
    assert cuda.of("read") == cuda.of("synchronize") == []
    assert (len(made) > new) == reports
    places = [place for place, event in enumerate(cuda.events) if event[0] == "replay"]
    assert len(places) > new - 2
    for place, following in itertools.pairwise(places[3:-3]):
        _, (recorded, number), (waited, earlier) = cuda.events[place:following]
        assert (recorded, waited, earlier) == ("record", "wait", number - 1)


@pytest.mark.parametrize(
    "read", [Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, bool, lambda values: values[values > 0]]
)
def test_a_value_that_the_host_reads_is_noticed(read: Callable[[Tensor], object], cuda: FakeCuda) -> None:
    with host_reads(cuda):
        read(torch.ones(1))
    assert len(cuda.of("read")) == 1
    buffer = Device("cpu", torch.float32).host_buffer([1], torch.float32)
    with host_reads(cuda):
        assert buffer.tolist()
    assert len(cuda.of("read")) == 1


def test_captures_are_shown_as_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for done in (1, 2):
        show_captures(done, 2)
    assert capsys.readouterr().err == "captured 2 of 2 CUDA graphs\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for done in (1, 2):
        show_captures(done, 2)
    assert capsys.readouterr().err == "\rcaptured 1 of 2 CUDA graphs\rcaptured 2 of 2 CUDA graphs\n"


# --- one engine after the other ---------------------------------------------------------------------------------


def test_an_engine_is_closed_and_another_one_built(cuda: FakeCuda) -> None:
    case = Case("shared", VARIANTS["shared"], REQUESTS, FIXED)
    tokens = []
    gc.disable()
    try:
        for _ in range(2):
            stage, transport = World().stage(case)
            tokens.append([done.token_ids for done in engine_of(case, stage, transport).generate(REQUESTS)])
            stage.close()
            assert len(cuda.of("reset")) == len(cuda.of("capture"))
            # Without a reference cycle the caches go at once, not when the collector runs.
            gone = weakref.ref(stage)
            del stage
            assert gone() is None
    finally:
        gc.enable()
    assert tokens[0] == tokens[1]
