"""Which rivals take part, and what is reported of them."""

import importlib.util
import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common.figures import paired_ratios, spread
from benchmarks.decoding.contestants import Load, Served
from benchmarks.decoding.rivals.baseline_llama import Baseline
from benchmarks.decoding.rivals.llama_cpp import LlamaCpp
from benchmarks.decoding.rivals.rival import Rival, RivalContestant
from benchmarks.decoding.rivals.static_cache import CompiledStaticCache, GraphStaticCache, Transformers
from benchmarks.decoding.rivals.through_ctranslate2 import Ctranslate2
from benchmarks.decoding.rivals.through_openvino import OpenVino
from benchmarks.decoding.site import DecodeSite
from stagdist.config.parts import ModelConfig
from stagdist.errors import ConfigError, StagdistError
from stagdist.parallel.device import on_cuda

RIVALS: dict[str, type[Rival]] = {
    rival.title: rival
    for rival in (LlamaCpp, OpenVino, Ctranslate2, CompiledStaticCache, GraphStaticCache, Transformers)
}
PRECISIONS = ("fp32", "bf16", "int8")
CLOSE_MARGIN = 1e-3
"""Tokens of fp32 may differ where the two best logits are closer than this."""


@dataclass(frozen=True)
class Choice:
    """Rivals by title, and the precisions that are wanted of each."""

    titles: tuple[str, ...]
    precisions: tuple[str, ...]

    @classmethod
    def parse(cls, titles: str, precisions: str) -> "Choice":
        """From the command line: names with commas, or `all`.

        Raises:
            ConfigError: an unknown name, or a package that is missing.
        """
        chosen = tuple(RIVALS) if titles == "all" else tuple(titles.split(","))
        if unknown := [title for title in chosen if title not in RIVALS]:
            raise ConfigError(f"--rivals {','.join(unknown)}: give all, or some of {', '.join(RIVALS)} with commas")
        wanted = tuple(precisions.split(","))
        if not set(wanted) <= set(PRECISIONS):
            raise ConfigError(f"--rival-precisions {precisions}: give some of {', '.join(PRECISIONS)} with commas")
        packages = dict.fromkeys(package for title in chosen for package in RIVALS[title].packages)
        if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
            raise ConfigError(f"the rivals need {', '.join(missing)}; install with: pip install -e .[rivals]")
        return cls(chosen, wanted)


class Lineup:
    """The rivals of one model. All ranks build it together; rank 0 holds the rivals.

    Args:
        model: the sequential baseline.

    Attributes:
        left_out: rivals that cannot run here, with the reason.
        threads: of each rival: as many as the processes on rank 0's host have together.
    """

    def __init__(self, site: DecodeSite, model: ModelConfig, choice: Choice):
        self._site, self._model = site, model
        places = site.gather((socket.gethostname(), site.threads))
        self._local = [rank for rank, place in enumerate(places) if place[0] == places[0][0]]
        self.threads = sum(places[rank][1] for rank in self._local)
        self._folder = None if site.rank else TemporaryDirectory(prefix="rivals-")
        self._baseline = None if self._folder is None else Baseline(model, site.device, Path(self._folder.name))
        self._chosen, self.left_out = site.from_first(self._choose(choice) if site.rank == 0 else None)

    def _choose(self, choice: Choice) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
        chosen: dict[str, tuple[str, str]] = {}
        left_out: dict[str, str] = {}
        kind = "cuda" if on_cuda(self._site.device) else "cpu"
        for title in choice.titles:
            rival = RIVALS[title]
            if kind not in rival.kinds:
                left_out[title] = f"it runs on {' and '.join(rival.kinds)} only, this run is on {kind}"
                continue
            for precision in choice.precisions:
                lacks = None if precision in rival.weight_bytes else "it has no such weights here"
                if reason := lacks or rival.obstacle(precision):
                    left_out[f"{title} {precision}"] = reason
                else:
                    chosen[f"{title} {precision}"] = (title, precision)
        return chosen, left_out

    def build(self, load: Load) -> dict[str, RivalContestant]:
        """All rivals by name, ready for this load."""
        built = {}
        for name, (title, precision) in self._chosen.items():
            baseline = self._baseline
            rival = None if baseline is None else RIVALS[title](baseline, precision, load, self.threads)
            built[name] = RivalContestant(self._site, rival, self._model.vocab_size, self.threads)
        return built

    def facts(self, name: str, load: Load, bandwidths: Sequence[float]) -> dict[str, Any]:
        """Bytes and bound of a rival; empty on other ranks.

        Args:
            bandwidths: of each rank while all read. The rival's threads have those of rank 0's host together.
        """
        if self._baseline is None:
            return {}
        (title, precision), local = self._chosen[name], [bandwidths[rank] for rank in self._local]
        rival, bandwidth = RIVALS[title], sum(local[:1] if on_cuda(self._site.device) else local)
        weights = round(self._baseline.read_values * rival.weight_bytes[precision])
        cache = round(self._baseline.cache_values(load) * rival.cache_bytes[precision])
        return {
            "precision": precision,
            "threads": self.threads,
            "timed_by": rival.timed_by,
            "read_per_step": [{"weights_bytes": weights, "cache_bytes": cache}],
            "bandwidth_bytes_per_s": [bandwidth],
            "bound_ms": 1e3 * (weights + cache) / bandwidth,
            "memory": [{"weights_bytes": weights}],
        }

    def same_tokens(
        self, name: str, load: Load, found: Served, reference: tuple[int, ...], *, refuse: bool = True
    ) -> dict[str, Any]:
        """How many first tokens are those of our sequential baseline in fp32, on rank 0.

        Args:
            refuse: raise the error; else the distance of the two best logits is in the result alone.

        Raises:
            StagdistError: a rival in fp32 chose another token where the two best logits are not close.
        """
        if self._baseline is None:
            return {}
        pairs = enumerate(zip(found.token_ids, reference, strict=True))
        equal = next((place for place, (ours, theirs) in pairs if ours != theirs), len(reference))
        result: dict[str, Any] = {"tokens_equal": equal, "tokens_compared": len(reference)}
        if equal < len(reference) and self._chosen[name][1] == "fp32":
            margin = self._baseline.margin(load, reference[:equal])
            if refuse and margin >= CLOSE_MARGIN:
                raise StagdistError(
                    f"{name} does not decode our baseline: token {equal} is {found.token_ids[equal]} and not "
                    f"{reference[equal]}, although the two best logits are {margin:.2g} apart; fix its export"
                )
            result["margin_at_first_difference"] = margin
        return result

    def close(self) -> None:
        """Remove the exported files."""
        if self._folder is not None:
            self._folder.cleanup()


def speedup(rival: Sequence[Served], ours: Sequence[Served]) -> dict[str, Any]:
    """A rival's time over ours in the same precision within rounds, above 1 where we are faster; on rank 0."""
    times = [[statistics.median(served.step_s) for served in each if served.step_s] for each in (rival, ours)]
    if not all(times):
        return {}
    found = spread(paired_ratios(*times))
    return {"staggered_speedup": found["median"], "staggered_speedup_spread": found}
