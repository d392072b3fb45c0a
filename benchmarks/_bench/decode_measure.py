"""The rounds of the decode benchmark: first all splits and head layouts, then the best one against every rival."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from benchmarks._bench.decode_bytes import StepBytes, bound_s, step_bytes
from benchmarks._bench.decode_contestants import (
    EngineContestant,
    GenerateContestant,
    Load,
    PlainContestant,
    PrefillContestant,
    Served,
    alternate,
)
from benchmarks._bench.decode_shapes import Split, baseline, split_name, with_split
from benchmarks._bench.decode_site import DecodeSite
from benchmarks._bench.figures import paired_ratios, spread
from benchmarks._bench.plain_step import rank_edges
from stagdist.config.parts import ModelConfig
from stagdist.decode.runtime.build import EngineOptions, place_model
from stagdist.decode.topology import HeadLayout
from stagdist.errors import ConfigError, StagdistError

CHUNKS = (64, 128, 256, 512)
SEQUENTIAL = "sequential pipeline"
"""The baseline; with one process its sections take turns there."""
WARM_UP_STEPS = 4
FEWER_STEPS = 4
"""Tensor parallelism over gloo is slow: it decodes this many times fewer steps."""


@dataclass(frozen=True)
class Settings:
    """What the benchmark was asked for.

    Attributes:
        model: the shape; its layers are cut as `splits` say.
        load: context, steps and batch.
        options: precision and limits of every engine.
        splits: sections tried.
        heads: head layouts tried.
        rounds: of each half.
        prefill_tokens: length of the prompt whose prefill is timed; 0 leaves it out.
    """

    model: ModelConfig
    load: Load
    options: EngineOptions
    splits: tuple[Split, ...]
    heads: tuple[HeadLayout, ...]
    rounds: int
    prefill_tokens: int

    def staggered(self, split: Split, **keys: Any) -> ModelConfig:
        """The model of a split."""
        return with_split(self.model, split, **keys)

    def options_for(self, load: Load, head: HeadLayout = "last", tensor: int = 1) -> EngineOptions:
        """Options of an engine that serves this load."""
        return replace(
            self.options, head=head, tensor_parallel_size=tensor, num_slots=load.batch, max_context=load.length
        )


@dataclass
class Row:
    """One contestant.

    Attributes:
        name: in results and table.
        split: layers of each section.
        head: layout.
        medians_s: median step of each round.
        steps_s: all steps of all rounds.
        facts: bytes, memory and bounds.
    """

    name: str
    split: str
    head: str
    medians_s: list[float]
    steps_s: list[float]
    facts: dict[str, Any]

    def result(self, batch: int) -> dict[str, Any]:
        """For the JSON file."""
        median_s = statistics.median(self.medians_s)
        in_ms = {key: value if key == "repeats" else 1e3 * value for key, value in spread(self.medians_s).items()}
        shown = {
            "name": self.name,
            "split": self.split,
            "head": self.head,
            "ms_per_token": 1e3 * median_s,
            "ms_per_token_p90": 1e3 * percentile(self.steps_s, 90),
            "tokens_per_s": batch / median_s,
            "spread_ms": in_ms,
            "round_medians_ms": [1e3 * value for value in self.medians_s],
        }
        if "bound_ms" in self.facts:
            shown["efficiency"] = self.facts["bound_ms"] / shown["ms_per_token"]
            read = [rank["weights_bytes"] + rank["cache_bytes"] for rank in self.facts["read_per_step"]]
            shares = zip(read, self.facts["bandwidth_bytes_per_s"], strict=True)
            shown["memory_bandwidth_share"] = [each / median_s / bandwidth for each, bandwidth in shares]
        return shown | self.facts


def percentile(values: Sequence[float], percent: int) -> float:
    """Value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second that each rank can read: while all read, and while the others rest."""

    together: list[float]
    alone: list[float]


class Measurement:
    """All ranks run it together; what it returns holds on rank 0.

    Args:
        tell: gets a line about the progress.

    Attributes:
        best: split and head layout with the shortest step, after `select`.
        left_out: contestants that do not fit, with the reason.
        others_shares: of the machine, what other programs took in each round, repeated ones too.
    """

    def __init__(self, site: DecodeSite, settings: Settings, tell: Callable[[str], None]):
        self.site, self.settings, self._tell = site, settings, tell
        self.bandwidth = Bandwidth(*site.read_bandwidths())
        self.left_out: dict[str, str] = {}
        self.others_shares: dict[str, list[float]] = {}
        self.best: tuple[Split, HeadLayout] = (settings.splits[0], settings.heads[0])

    def engine(self, model: ModelConfig, load: Load, head: HeadLayout = "last", **keys: Any) -> EngineContestant:
        """An engine contestant that fits a load."""
        tensor = keys.pop("tensor", 1)
        engine = EngineContestant(self.site, model, self.settings.options_for(load, head, tensor), **keys)
        engine.warm_up(replace(load, steps=WARM_UP_STEPS))
        return engine

    def select(self) -> list[Row]:
        """All splits and head layouts and the baseline, alternating; keeps the best in `best`."""
        settings, load = self.settings, self.settings.load
        plain = baseline(settings.model, len(settings.splits[0]))
        engines = {SEQUENTIAL: self.engine(plain, load)}
        places: dict[str, tuple[Split, HeadLayout]] = {}
        for split in settings.splits:
            for head in settings.heads:
                name = f"staggered {split_name(split)} {head}"
                engines[name] = self.engine(settings.staggered(split), load, head)
                places[name] = split, head
        readings = self._alternate({name: partial(engine, load) for name, engine in engines.items()}, "splits")
        rows = [self.row(name, engines[name], readings[name], load) for name in engines]
        times = {row.name: statistics.median(row.medians_s) for row in rows if row.name in places and row.medians_s}
        name = self.site.from_first(min(times, key=lambda each: times[each]) if times else None)
        self.best = places[name]
        return rows

    def compare(self) -> tuple[dict[str, Any], list[Row]]:
        """The best split against the baseline and all rivals, in rounds of their own."""
        settings, load, (split, head) = self.settings, self.settings.load, self.best
        plain = baseline(settings.model, len(split))
        engines = {
            SEQUENTIAL: self.engine(plain, load),
            "staggered": self.engine(settings.staggered(split), load, head),
        }
        few = replace(load, steps=max(2, load.steps // FEWER_STEPS))
        if self._fits_tensor_parallelism(plain, few):
            engines["sequential tensor parallel"] = self.engine(plain, few, tensor=self.site.size)
        runs: dict[str, Callable[[], Any]] = {
            name: partial(engine, few if engine.options.tensor_parallel_size > 1 else load)
            for name, engine in engines.items()
        }
        if self._has_plain_step():
            runs["plain"] = partial(PlainContestant(engines["staggered"], rank_edges(self.site.size)), load)
        dtype = engines[SEQUENTIAL].stage.device.dtype
        runs["generate"] = partial(
            GenerateContestant(self.site, plain, dtype, self.site.size * self.site.threads), load
        )
        chunks = self._add_prefill(runs)
        readings = self._alternate(runs, f"{split_name(split)} {head} against its rivals")
        rows = [self.row(name, engine, readings[name], load) for name, engine in engines.items()]
        rows += [bare_row(name, readings[name]) for name in ("plain", "generate") if name in readings]
        if self.site.rank:
            return {}, rows
        _check_same_tokens(readings)
        return _ratios(readings) | {"prefill": chunks, "best_split": split_name(split), "best_head": head}, rows

    def row(self, name: str, engine: EngineContestant, served: list[Served], load: Load) -> Row:
        """What a contestant did, with its bytes and bounds; all ranks call it."""
        stage, topology = engine.stage, engine.placement.topology
        read = step_bytes(stage, load.context, load.batch)
        weights = sum(tensor.nbytes for tensor in stage.weights.tensors())
        facts = self.site.gather((read, weights, stage.kv_bytes, engine.grown_bytes))
        read_of: list[StepBytes] = [fact[0] for fact in facts]
        takes_turns = not topology.staggered and topology.num_stages > 1
        bandwidth = self.bandwidth.alone if takes_turns else self.bandwidth.together
        bound = bound_s(read_of, bandwidth, sequential=takes_turns, stages=topology.num_stages)
        return Row(
            name,
            split_name(engine.model.section_layers),
            topology.head,
            [statistics.median(each.step_s) for each in served if each.step_s],
            [step for each in served for step in each.step_s],
            {
                "read_per_step": [{"weights_bytes": each.weights, "cache_bytes": each.cache} for each in read_of],
                "bandwidth_bytes_per_s": bandwidth,
                "bound_ms": 1e3 * bound,
                "memory": [
                    {"weights_bytes": weights, "kv_bytes": kv, "process_grown_bytes": grown}
                    for _, weights, kv, grown in facts
                ],
            },
        )

    def _alternate(self, runs: dict[str, Callable[[], Any]], what: str) -> dict[str, list[Any]]:
        """One round to warm up, then those that count."""
        alternate(runs, 1, lambda text: self._tell(f"{what}: warm"))

        def tell(text: str) -> None:
            self._tell(f"{what}: {text}")

        def others() -> float:
            share = self.site.others()
            self.others_shares.setdefault(what, []).append(share)
            return share

        return alternate(runs, self.settings.rounds, tell, others)

    def _has_plain_step(self) -> bool:
        model, size = self.settings.model, self.site.size
        wanted = {
            "it is for one section per process": size > 1 and len(self.best[0]) == size,
            "it is for stagger 1": model.stagger == 1,
            "it does not combine sections": not model.combine_sections,
            "it is for one request": self.settings.load.batch == 1,
        }
        missing = [reason for reason, holds in wanted.items() if not holds]
        if missing:
            self.left_out["plain step"] = missing[0]
        return not missing

    def _fits_tensor_parallelism(self, model: ModelConfig, load: Load) -> bool:
        if self.site.size == 1:
            return False
        try:
            place_model(model, self.settings.options_for(load, tensor=self.site.size), self.site.size)
        except ConfigError as error:
            self.left_out["sequential tensor parallel"] = str(error)
            return False
        return True

    def _add_prefill(self, runs: dict[str, Callable[[], Any]]) -> dict[str, Any] | None:
        settings, length = self.settings, self.settings.prefill_tokens
        if self.site.size == 1 or not length:
            return None
        model, options = settings.staggered(self.best[0]), replace(settings.options, head=self.best[1], num_slots=1)
        sizes = tuple(size for size in CHUNKS if size <= length) or (length,)
        tried = {}
        for name, alone in (("prefill over stages", False), ("prefill in one process", True)):
            contestant = PrefillContestant(self.site, model, options, length, alone=alone)
            readings = contestant.choose_chunk(sizes if not alone else tuple(dict.fromkeys((*sizes, length))))
            tried[name] = {"chunk_size": contestant.chunk_size, "s_by_chunk_size": readings}
            runs[name] = contestant
        return {"tokens": length} | tried


def bare_row(name: str, served: list[Served]) -> Row:
    """A contestant of which only the time is known."""
    medians = [statistics.median(each.step_s) for each in served if each.step_s]
    return Row(name, "", "", medians, [step for each in served for step in each.step_s], {})


def _check_same_tokens(readings: dict[str, list[Any]]) -> None:
    """The plain step must do what the engine does, or its time says nothing."""
    for engine, plain in zip(readings["staggered"], readings.get("plain", ()), strict=False):
        if engine.token_ids != plain.token_ids:
            first = next(i for i, (a, b) in enumerate(zip(engine.token_ids, plain.token_ids, strict=True)) if a != b)
            raise StagdistError(
                f"the plain step and the engine chose different tokens, first at {first}: {plain.token_ids[first]} and "
                f"{engine.token_ids[first]}; their times cannot be compared. Mend stagdist/bench/plain_step.py"
            )


def _ratios(readings: dict[str, list[Any]]) -> dict[str, Any]:
    """Ratios between runs of one round, medians over the rounds, with their spread."""
    medians = {
        name: [each if isinstance(each, float) else statistics.median(each.step_s) for each in of_rounds]
        for name, of_rounds in readings.items()
    }
    pairs = {
        "speedup_vs_sequential_pipeline": (SEQUENTIAL, "staggered"),
        "speedup_vs_sequential_tensor_parallel": ("sequential tensor parallel", "staggered"),
        "speedup_vs_transformers_generate": ("generate", "staggered"),
        "plain_torch_step_over_engine_step": ("plain", "staggered"),
        "prefill_speedup_vs_one_process": ("prefill in one process", "prefill over stages"),
    }
    spreads = {
        key: spread(paired_ratios(medians[above], medians[below])) if above in medians else None
        for key, (above, below) in pairs.items()
    }
    results: dict[str, Any] = {key: each and each["median"] for key, each in spreads.items()}
    seconds = {name: spread(values) for name, values in medians.items() if name.startswith("prefill")}
    return results | {"spread": spreads | {f"{name} (s)": each for name, each in seconds.items()}}


def as_settings(settings: Settings) -> dict[str, Any]:
    """The settings for the JSON file."""
    return {
        "model": settings.model.model_dump(mode="json"),
        "load": asdict(settings.load) | {"prompt_tokens": settings.load.prompt_length},
        "precision": settings.options.precision,
        "splits": [split_name(split) for split in settings.splits],
        "heads": list(settings.heads),
        "rounds": settings.rounds,
        "prefill_tokens": settings.prefill_tokens,
    }
