"""The rounds of the benchmark of links: every contestant at every latency, alternating."""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.decoding.bounds import step_bytes
from benchmarks.decoding.contestants import EngineContestant, Load, alternate
from benchmarks.decoding.shapes import baseline, changed, split_name
from benchmarks.decoding.site import DecodeSite
from benchmarks.decoding.spans import counted_steps
from benchmarks.slow_links.link_curves import Curve, crossings
from benchmarks.slow_links.stage_times import RecordedTimes, median_times, recorded_times
from stagdist.config.parts import ModelConfig
from stagdist.decode.runtime.build import EngineOptions, plan_decoding
from stagdist.errors import ConfigError
from stagdist.planning.decode_steps import flat_until_s, pipeline_step_s, section_s, tensor_parallel_step_s
from stagdist.telemetry.spans import SpanRecorder

SEQUENTIAL, TENSOR = "sequential pipeline", "tensor parallel"
TENSOR_STEPS = 6
"""Tensor parallelism has dozens of collectives in a step: it decodes fewer steps."""
WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Reading:
    """One run. Attributes: mean step (0 on other ranks than the first); times of the stages, where they are known."""

    step_s: float
    times: RecordedTimes | None


class _Contestant:
    """An engine whose steps are recorded."""

    def __init__(self, site: DecodeSite, model: ModelConfig, options: EngineOptions, load: Load):
        self._site, self.model, self._load = site, model, load
        self._recorder = SpanRecorder(rank=site.rank, stage=site.stage, clock=site.clock())
        self._pipeline = options.tensor_parallel_size == 1
        self._engine = EngineContestant(site, model, options, recorder=self._recorder)
        self._engine.warm_up(replace(load, steps=WARM_UP_STEPS))
        self.read_bytes = [sum(of.values()) for of in site.gather(step_bytes(self._engine.stage, load.context, 1))]

    def __call__(self, delay_s: float, set_wire: Callable[[float], None] | None) -> Reading:
        transport, site = self._engine.transport, self._site
        assert transport is not None, "there are several processes"
        set_latency = transport.delay_links if set_wire is None else set_wire
        set_latency(delay_s)
        self._recorder.clear()
        served = self._engine(self._load)
        set_latency(0.0)
        times = None
        if self._pipeline and delay_s == 0:
            stretches = site.gather(counted_steps(self._recorder.spans))
            times = recorded_times(stretches, self._engine.plan.topology.lag)
        return Reading(statistics.fmean(served.step_s) if served.step_s else 0.0, times)


class LinkRounds:
    """All contestants. All ranks run it together.

    Args:
        model: staggered, one section per process.
        set_wire: sets the latency of the link itself; None injects it.

    Attributes:
        others_shares: share of the machine that other programs used before the first round and in each one, also if it
            was repeated.
    """

    def __init__(
        self,
        site: DecodeSite,
        model: ModelConfig,
        options: EngineOptions,
        load: Load,
        set_wire: Callable[[float], None] | None,
    ):
        self._site, self._set_wire = site, set_wire
        self.others_shares: list[float] = []
        self._together, self._alone = site.read_bandwidths()
        plain = baseline(model, site.size)
        self._contestants = {
            "staggered, stagger 1": _Contestant(site, changed(model, {"stagger": 1}), options, load),
            "staggered, stagger 2": _Contestant(site, changed(model, {"stagger": 2}), options, load),
            SEQUENTIAL: _Contestant(site, plain, options, load),
        }
        split = replace(options, tensor_parallel_size=site.size)
        try:
            plan_decoding(plain, split, site.size)
        except ConfigError:
            return  # heads do not divide
        self._contestants[TENSOR] = _Contestant(site, plain, split, replace(load, steps=TENSOR_STEPS))

    def measure(self, delays_ms: Sequence[float], rounds: int) -> list[Curve]:
        """A curve of each contestant; on rank 0 only."""
        runs = {
            (name, delay_ms): partial(contestant, delay_ms / 1e3, self._set_wire)
            for name, contestant in self._contestants.items()
            for delay_ms in delays_ms
        }

        def others() -> float:
            self.others_shares.append(self._site.others())
            return self.others_shares[-1]

        readings: dict[tuple[str, float], list[Reading]] = alternate(runs, rounds, self._say, others)
        if self._site.rank:
            return []
        return [
            self._curve(name, {delay_ms: readings[name, delay_ms] for delay_ms in delays_ms})
            for name in self._contestants
        ]

    def _say(self, text: str) -> None:
        if self._site.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def _curve(self, name: str, readings: Mapping[float, Sequence[Reading]]) -> Curve:
        model, read_bytes = self._contestants[name].model, self._contestants[name].read_bytes
        ms = [[1e3 * each.step_s for each in of_rounds] for of_rounds in readings.values()]
        if name == TENSOR:
            collectives = 2 * model.num_layers + 1
            at_zero_s = statistics.median(ms[0]) / 1e3
            predicted = [1e3 * tensor_parallel_step_s(at_zero_s, collectives, each / 1e3) for each in readings]
            return Curve(name, f"{self._site.size} ranks", ms, predicted, {"collectives": collectives})
        times = median_times([each.times for each in readings[0.0] if each.times is not None])
        sequential = name == SEQUENTIAL
        cycles = times.cycles(0 if sequential else model.stagger, sequential=sequential)
        found = [pipeline_step_s(cycles, times.message_s + each / 1e3) for each in readings]
        bandwidths = self._alone if sequential else self._together
        inputs = {
            "bytes_over_bandwidth_ms": [1e3 * section_s(*each) for each in zip(read_bytes, bandwidths, strict=True)],
            "begin_ms": [1e3 * each.begin_s for each in times.stages],
            "rest_ms": [1e3 * each.rest_s for each in times.stages],
            "after_ms": [1e3 * each.after_s for each in times.stages],
            "end_ms": 1e3 * times.end_s,
            "message_ms": 1e3 * times.message_s,
            "flat_until_ms": 1e3 * max(0.0, flat_until_s(cycles) - times.message_s),
            "critical_cycle": [[f"{event} {stage}" for event, stage in cycle.events] for _, cycle in found],
        }
        return Curve(name, split_name(model.section_layers), ms, [1e3 * step_s for step_s, _ in found], inputs)


def summary(results: Mapping[str, Any]) -> str:
    """The curves as a table, and where they cross."""
    delays, curves = results["delays_ms"], results["curves"]
    lines = [f"{'one-way latency, ms':<26}" + "".join(f"{delay:>9g}" for delay in delays)]
    for curve in curves:
        lines.append(f"{curve['name']:<26}" + "".join(f"{ms:>9.2f}" for ms in curve["ms_per_token"]))
        lines.append(f"{'  predicted':<26}" + "".join(f"{ms:>9.2f}" for ms in curve["predicted_ms"]))
    lines += [f"{ours}: faster than {rival}: {where if isinstance(where, str) else f'from {where:.2f} ms'}"
              for ours, rivals in results["crossings_ms"].items() for rival, where in rivals.items()]  # fmt: skip
    lines.append(f"median error of the predictions: {results['median_prediction_error']:.1%}")
    return "\n".join(lines)


def comparison(curves: Sequence[Curve], delays_ms: Sequence[float]) -> dict[str, Any]:
    """What follows from all curves together. Tensor parallelism without latency is no prediction."""
    errors = [error for curve in curves for error in curve.errors[curve.name == TENSOR :]]
    return {
        "crossings_ms": crossings(delays_ms, curves),
        "median_prediction_error": statistics.median(errors),
    }
