"""One thing changed at a time around the best split: context, batch, window, lag, sections."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.decoding.contestants import EngineContestant, Load, alternate
from benchmarks.decoding.measurement import Measurement
from benchmarks.decoding.rivals.rival import RivalContestant
from benchmarks.decoding.shapes import balanced_split, baseline, split_name
from stagdist.config.parts import ModelConfig
from stagdist.errors import ConfigError

KEPT = (
    "name",
    "split",
    "ms_per_token",
    "ms_per_token_p90",
    "tokens_per_s",
    "bound_ms",
    "efficiency",
    "tokens_equal",
    "margin_at_first_difference",
)
"""What the row of a sweep reports of a contestant."""
AXES = ("contexts", "batches", "windows", "stagger", "sections")
DEFAULT_AXES: Mapping[str, tuple[int | None, ...]] = {
    "contexts": (64, 256, 1024),
    "batches": (1, 4),
    "windows": (None, 128),
    "stagger": (0, 1, 2),
}


def parse_axis(text: str) -> tuple[str, tuple[int | None, ...]]:
    """`contexts=64,256` as its name and values; `none` is None.

    Raises:
        ConfigError: an unknown axis, or values that are no numbers.
    """
    name, _, values = text.partition("=")
    if name not in AXES:
        raise ConfigError(f"--sweep {text!r}: {name!r} is no axis; give one of {', '.join(AXES)}")
    try:
        return name, tuple(_value(name, each) for each in values.split(","))
    except ValueError:
        raise ConfigError(f"--sweep {text!r}: give integers separated by commas, such as {name}=1,2") from None


def _value(axis: str, text: str) -> int | None:
    if axis == "windows" and text == "none":
        return None
    value = int(text)
    if value < (0 if axis == "stagger" else 1):
        raise ValueError(f"{value} is too small")
    return value


class Sweeps:
    """Sweeps around the best split of a measurement. All ranks run them together."""

    def __init__(self, measurement: Measurement, rounds: int):
        self._measurement, self._rounds = measurement, rounds
        self._split, self._head = measurement.best
        self._settings, self._load = measurement.settings, measurement.settings.load

    def run(self, axes: Mapping[str, Sequence[Any]], tell: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
        """Rows of each axis, with bounds."""
        results: dict[str, list[dict[str, Any]]] = {}
        for axis, values in axes.items():
            tell(f"sweep over {axis}")
            results[axis] = self._axis(axis, values)
        return results

    def _axis(self, axis: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        """Every value of an axis, staggered and (where it has a meaning there) sequential, alternating."""
        engines: dict[tuple[Any, str], tuple[EngineContestant, Load]] = {}
        for value in values:
            load, model = self._changed(axis, value)
            engines[value, "staggered"] = (self._measurement.engine(model, load, self._head), load)
            if axis in ("contexts", "batches", "sections"):
                plain = baseline(self._settings.model, len(model.section_layers))
                engines[value, "sequential"] = (self._measurement.engine(plain, load), load)
        rivals = self._rivals(axis, values)
        readings = self._alternate({**engines, **rivals})
        rows = []
        for (value, kind), (engine, load) in engines.items():
            row = self._measurement.row(kind, engine, readings[value, kind], load)
            rows.append({axis: value} | _kept(row))
        for (value, name), (rival, load) in rivals.items():
            # An engine that rounds chooses other tokens, so only fp32 is a reference. A mismatch does not end a sweep:
            # the row contains the margin of the logits.
            exact = self._settings.options.precision == "fp32"
            reference = readings[value, "sequential"][0].token_ids if exact else None
            row = self._measurement.rival_row(name, readings[value, name], load, reference, refuse=False)
            rows.append({axis: value} | _kept(row))
            rival.close()
        return [] if self._measurement.site.rank else sorted(rows, key=lambda row: values.index(row[axis]))

    def _rivals(self, axis: str, values: Sequence[Any]) -> dict[tuple[Any, str], tuple[RivalContestant, Load]]:
        """Every rival for every value, where the value is one of the load alone."""
        lineup = self._measurement.rivals
        if lineup is None or axis not in ("contexts", "batches"):
            return {}
        loads = {value: self._changed(axis, value)[0] for value in values}
        return {
            (value, name): (rival, loads[value])
            for value in values
            for name, rival in lineup.build(loads[value]).items()
        }

    def _changed(self, axis: str, value: Any) -> tuple[Load, ModelConfig]:
        """Load and model with one thing changed."""
        keys = {"windows": "cross_attention_window", "stagger": "stagger"}
        split = self._split
        if axis == "sections":
            split = balanced_split(self._settings.model, value)
        model = self._settings.staggered(split, **({keys[axis]: value} if axis in keys else {}))
        loads = {"contexts": "context", "batches": "batch"}
        load = replace(self._load, **({loads[axis]: value} if axis in loads else {}))
        return load, model

    def _alternate(self, engines: Mapping[Any, tuple[Callable[[Load], Any], Load]]) -> dict[Any, list[Any]]:
        runs = {key: partial(engine, load) for key, (engine, load) in engines.items()}
        alternate(runs, 1)
        return alternate(runs, self._rounds)


def _kept(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is reported of a contestant, with the bytes of keys and values that all ranks read in a step."""
    read = row.get("read_per_step", ())
    return {key: row[key] for key in KEPT if key in row} | {"cache_bytes": sum(rank["cache_bytes"] for rank in read)}


def check_axes(axes: Mapping[str, Sequence[Any]], processes: int, num_layers: int) -> None:
    """Refuse values that cannot run, before any group is built.

    Raises:
        ConfigError: which one, and why.
    """
    for sections in axes.get("sections", ()):
        if sections % processes or sections > num_layers:
            raise ConfigError(
                f"--sweep sections={sections}: {num_layers} layers on {processes} processes need a number of sections "
                f"that {processes} divides, at most {num_layers}"
            )
    for lag in axes.get("stagger", ()):
        if lag > 2:
            raise ConfigError(f"--sweep stagger={lag}: models have a stagger of 0, 1 or 2")


def describe(axes: Mapping[str, Sequence[Any]], split: Sequence[int]) -> str:
    """What a sweep varies, for the output."""
    return f"around {split_name(split)}: " + "; ".join(f"{axis} {list(values)}" for axis, values in axes.items())
