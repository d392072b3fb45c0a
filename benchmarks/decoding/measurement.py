"""The rounds of the decode benchmark: first all splits and head layouts, then the best one against every rival."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from benchmarks.common.figures import paired_ratios, percentile, spread
from benchmarks.decoding.bounds import bound_s, median_bandwidths, step_bytes
from benchmarks.decoding.contestants import (
    EngineContestant,
    Load,
    PlainContestant,
    PrefillContestant,
    Served,
    alternate,
)
from benchmarks.decoding.plain_step import rank_edges
from benchmarks.decoding.rivals.lineup import Choice, Lineup, speedup
from benchmarks.decoding.rivals.rival import RivalContestant
from benchmarks.decoding.shapes import Split, baseline, changed, split_name
from benchmarks.decoding.site import DecodeSite
from stagdist.config.parts import ModelConfig
from stagdist.decode.runtime.build import EngineOptions, plan_decoding
from stagdist.decode.topology import HeadLayout
from stagdist.errors import ConfigError, StagdistError

CHUNKS = (64, 128, 256, 512)
SEQUENTIAL = "sequential pipeline"
"""The baseline; in one process its sections take turns."""
OWN_KINDS: Mapping[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "int8": {"weights": "int8"},
}
"""Options of our engine beside rivals of a precision."""
READING = "read of the memory"
WARM_UP_STEPS = 4
FEWER_STEPS = 4
"""Tensor parallelism over gloo is slow: it decodes this many times fewer steps."""


@dataclass(frozen=True)
class Settings:
    """What the benchmark was asked for.

    Attributes:
        model: the shape; its layers are split as `splits` say.
        options: precision and limits of every engine.
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
        return changed(self.model, {"section_layers": split} | keys)

    def options_for(self, load: Load, head: HeadLayout = "last", tensor: int = 1) -> EngineOptions:
        """Options of an engine that serves this load."""
        return replace(
            self.options, head=head, tensor_parallel_size=tensor, num_slots=load.batch, max_context=load.length
        )

    def described(self) -> dict[str, Any]:
        """The settings for the JSON file."""
        return {
            "model": self.model.model_dump(mode="json"),
            "load": asdict(self.load) | {"prompt_tokens": self.load.prompt_length},
            "precision": self.options.precision,
            "splits": [split_name(split) for split in self.splits],
            "heads": list(self.heads),
            "rounds": self.rounds,
            "prefill_tokens": self.prefill_tokens,
        }


def row(name: str, served: Sequence[Served], batch: int, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Results of one contestant; `facts` are its shape, bytes, memory and bounds, if they are known."""
    medians = [statistics.median(each.step_s) for each in served if each.step_s]
    if not medians:  # not rank 0
        return {"name": name}
    median_s, facts = statistics.median(medians), facts or {}
    shown = {
        "name": name,
        "split": facts.pop("split", ""),
        "head": facts.pop("head", ""),
        "ms_per_token": 1e3 * median_s,
        "ms_per_token_p90": 1e3 * percentile([step for each in served for step in each.step_s], 90),
        "tokens_per_s": batch / median_s,
        "spread_ms": {key: each if key == "repeats" else 1e3 * each for key, each in spread(medians).items()},
        "round_medians_ms": [1e3 * value for value in medians],
    }
    if "bound_ms" in facts:
        shown["efficiency"] = facts["bound_ms"] / shown["ms_per_token"]
        pairs = zip(facts["read_per_step"], facts["bandwidth_bytes_per_s"], strict=True)
        shown["memory_bandwidth_share"] = [sum(read.values()) / median_s / bandwidth for read, bandwidth in pairs]
    return shown | facts


class Measurement:
    """All ranks run it together; what it returns holds on rank 0.

    Args:
        tell: gets a line about the progress.
        choice: rivals that are not ours; None: there are none.

    Attributes:
        rivals: after `compare`, if there was a choice.
        best: split and head layout with the shortest step, after `select`.
        left_out: contestants that do not fit, with the reason.
        others_shares: share of the machine that other programs used before the first round and in each one, also if it
            was repeated.
    """

    def __init__(self, site: DecodeSite, settings: Settings, tell: Callable[[str], None], choice: Choice | None = None):
        self.site, self.settings, self._tell, self._choice = site, settings, tell, choice
        self._precision = settings.options.precision
        self.rivals: Lineup | None = None
        self._bandwidths: list[tuple[list[float], list[float]]] = []
        self.left_out: dict[str, str] = {}
        self.others_shares: dict[str, list[float]] = {}
        self.best: tuple[Split, HeadLayout] = (settings.splits[0], settings.heads[0])

    @property
    def together(self) -> list[float]:
        """Bytes per second that each rank reads while all read: medians of readings in every round."""
        return median_bandwidths(self._bandwidths)[0]

    @property
    def alone(self) -> list[float]:
        """Bytes per second that each rank reads while the others wait: medians of readings in every round."""
        return median_bandwidths(self._bandwidths)[1]

    def engine(
        self, model: ModelConfig, load: Load, head: HeadLayout = "last", tensor: int = 1, kind: str = "", **keys: Any
    ) -> EngineContestant:
        """An engine contestant that fits a load; in the precision of the settings, or a kind of `OWN_KINDS`."""
        options = replace(self.settings.options_for(load, head, tensor), **OWN_KINDS.get(kind, {}))
        engine = EngineContestant(self.site, model, options, **keys)
        engine.warm_up(replace(load, steps=WARM_UP_STEPS))
        return engine

    def select(self) -> list[dict[str, Any]]:
        """All splits and head layouts and the baseline, alternating; keeps the best in `best`."""
        settings, load = self.settings, self.settings.load
        engines = {SEQUENTIAL: self.engine(baseline(settings.model, len(settings.splits[0])), load)}
        places: dict[str, tuple[Split, HeadLayout]] = {}
        for split in settings.splits:
            for head in settings.heads:
                name = f"staggered {split_name(split)} {head}"
                engines[name] = self.engine(settings.staggered(split), load, head)
                places[name] = split, head
        readings = self._alternate({name: partial(engine, load) for name, engine in engines.items()}, "splits")
        rows = [self.row(name, engines[name], readings[name], load) for name in engines]
        times = {row["name"]: row["ms_per_token"] for row in rows if row["name"] in places and "ms_per_token" in row}
        self.best = places[self.site.from_first(min(times, key=lambda each: times[each]) if times else None)]
        return rows

    def compare(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The best split against the baseline and all rivals, in rounds of their own."""
        settings, load, (split, head) = self.settings, self.settings.load, self.best
        plain = baseline(settings.model, len(split))
        few = replace(load, steps=max(2, load.steps // FEWER_STEPS))
        engines = self._engines(plain, few)
        runs: dict[str, Callable[[], Any]] = {
            name: partial(engine, few if engine.options.tensor_parallel_size > 1 else load)
            for name, engine in engines.items()
        }
        if self._has_plain_step():
            runs["plain"] = partial(PlainContestant(engines["staggered"], rank_edges(self.site.size)), load)
        contestants = self._build_rivals(plain, load)
        runs |= {name: partial(contestant, load) for name, contestant in contestants.items()}
        chunks = self._add_prefill(runs)
        readings = self._alternate(runs, f"{split_name(split)} {head} against its rivals")
        rows = [self.row(name, engine, readings[name], load) for name, engine in engines.items()]
        if "plain" in readings:
            rows.append(row("plain", readings["plain"], load.batch))
        if contestants:
            reference = self._reference(plain, load, readings[SEQUENTIAL])
            for name in contestants:
                kind = name.rsplit(" ", 1)[1]
                ours = "staggered" if kind == self._precision else f"staggered {kind}"
                found = self.rival_row(name, readings[name], load, reference)
                rows.append(found | speedup(readings[name], readings[ours]))
        for contestant in contestants.values():
            contestant.close()
        if self.site.rank:
            return {}, rows
        check_same_tokens(readings)
        return ratios(readings) | {"prefill": chunks, "best_split": split_name(split), "best_head": head}, rows

    def _engines(self, plain: ModelConfig, few: Load) -> dict[str, EngineContestant]:
        """Our own contestants: the best split, also in the precisions of rivals, and the baseline in two ways.

        Args:
            few: load of tensor parallelism.
        """
        load, (split, head) = self.settings.load, self.best
        model = self.settings.staggered(split)
        engines = {SEQUENTIAL: self.engine(plain, load), "staggered": self.engine(model, load, head)}
        for kind in () if self._choice is None else self._choice.precisions:
            if kind != self._precision:
                engines[f"staggered {kind}"] = self.engine(model, load, head, kind=kind)
        if self._fits_tensor_parallelism(plain, few):
            engines["sequential tensor parallel"] = self.engine(plain, few, tensor=self.site.size)
        return engines

    def row(self, name: str, engine: EngineContestant, served: list[Served], load: Load) -> dict[str, Any]:
        """Results of an engine, with its bytes and bounds. All ranks call it."""
        stage, topology = engine.stage, engine.plan.topology
        mine = {
            "weights_bytes": sum(tensor.nbytes for tensor in stage.weights.tensors()),
            "kv_bytes": stage.kv_bytes,
            "process_grown_bytes": engine.grown_bytes,
        }
        read_of, memory = zip(
            *self.site.gather((step_bytes(stage, load.served_context, load.batch), mine)), strict=True
        )
        takes_turns = not topology.staggered and topology.num_stages > 1
        bandwidth, stages = self.alone if takes_turns else self.together, topology.num_stages
        bytes_of = [sum(read.values()) for read in read_of]
        facts = {
            "split": split_name(engine.model.section_layers),
            "head": topology.head,
            "read_per_step": list(read_of),
            "bandwidth_bytes_per_s": bandwidth,
            "bound_ms": 1e3 * bound_s(bytes_of, bandwidth, sequential=takes_turns, stages=stages),
            "memory": list(memory),
        }
        return row(name, served, load.batch, facts)

    def _build_rivals(self, plain: ModelConfig, load: Load) -> dict[str, RivalContestant]:
        if self._choice is None:
            return {}
        self._tell("rivals: exported and loaded")
        self.rivals = Lineup(self.site, plain, self._choice)
        self.left_out |= self.rivals.left_out
        return self.rivals.build(load)

    def _reference(self, plain: ModelConfig, load: Load, served: Sequence[Served]) -> tuple[int, ...]:
        """Tokens of the sequential baseline in fp32 with its weights as they are."""
        options = self.settings.options_for(load)
        exact = replace(options, precision="fp32")
        return (served[0] if options == exact else EngineContestant(self.site, plain, exact)(load)).token_ids

    def rival_row(
        self, name: str, served: Sequence[Served], load: Load, reference: tuple[int, ...] | None, **keys: bool
    ) -> dict[str, Any]:
        """Results of a rival, with its bytes and bounds; tokens are compared where there is a reference."""
        assert self.rivals is not None
        found = row(name, served, load.batch, self.rivals.facts(name, load, self.together))
        return found if reference is None else found | self.rivals.same_tokens(name, load, served[0], reference, **keys)

    def _alternate(self, runs: dict[str, Callable[[], Any]], what: str) -> dict[str, list[Any]]:
        """One round to warm up, then those that count."""
        shares = self.others_shares.setdefault(what, [])

        def others() -> float:
            shares.append(self.site.others())
            return shares[-1]

        alternate(runs, 1, lambda text: self._tell(f"{what}: warm"))
        all_runs = {**runs, READING: self.site.read_bandwidths}
        readings = alternate(all_runs, self.settings.rounds, lambda text: self._tell(f"{what}: {text}"), others)
        self._bandwidths += readings.pop(READING)
        return readings

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
            plan_decoding(model, self.settings.options_for(load, tensor=self.site.size), self.site.size)
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


def check_same_tokens(readings: dict[str, list[Any]]) -> None:
    """Refuse to compare a plain step that does not do what the engine does."""
    for engine, plain in zip(readings["staggered"], readings.get("plain", ()), strict=False):
        if engine.token_ids != plain.token_ids:
            first = next(i for i, (a, b) in enumerate(zip(engine.token_ids, plain.token_ids, strict=True)) if a != b)
            raise StagdistError(
                f"the plain step and the engine chose different tokens, first at {first}: {plain.token_ids[first]} and "
                f"{engine.token_ids[first]}; their times cannot be compared. Fix benchmarks/decoding/plain_step.py"
            )


def ratios(readings: dict[str, list[Any]]) -> dict[str, Any]:
    """Ratios between runs of one round, medians over the rounds, with their spread."""
    medians = {
        name: [each if isinstance(each, float) else statistics.median(each.step_s) for each in of_rounds]
        for name, of_rounds in readings.items()
    }
    pairs = {
        "speedup_vs_sequential_pipeline": (SEQUENTIAL, "staggered"),
        "speedup_vs_sequential_tensor_parallel": ("sequential tensor parallel", "staggered"),
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
