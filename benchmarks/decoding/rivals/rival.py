"""What a rival is, and how it takes part in the rounds."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.decoding.contestants import SEED, Load, Served, between
from benchmarks.decoding.rivals.baseline_llama import Baseline
from benchmarks.decoding.site import DecodeSite
from stagdist.errors import StagdistError

Prompts = Sequence[Sequence[int]]
CALM_SHARE, CALM_S, PATIENCE_S = 0.05, 0.05, 20.0
"""A process is idle when it uses less than this share of a core for this long; it must be idle within PATIENCE_S."""


@dataclass(frozen=True)
class Decoded:
    """When the tokens of each step of the complete batch were there, and the tokens of each request."""

    times: tuple[float, ...]
    token_ids: tuple[tuple[int, ...], ...]


class Rival(ABC):
    """Decodes greedily. Built for one load: `Rival(baseline, precision, load, threads)`.

    Attributes:
        title: its name in the command and in the results.
        packages: modules that it needs.
        kinds: of devices that it runs on here, `cpu` or `cuda`.
        weight_bytes: bytes of one weight for each precision that it has.
        cache_bytes: bytes of one key or value.
        timed_by: where the times come from.
    """

    title: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    kinds: ClassVar[tuple[str, ...]]
    weight_bytes: ClassVar[Mapping[str, float]]
    cache_bytes: ClassVar[Mapping[str, float]]
    timed_by: ClassVar[str]

    @abstractmethod
    def __init__(self, baseline: Baseline, precision: str, load: Load, threads: int): ...

    @staticmethod
    def obstacle(precision: str) -> str | None:
        """Why this machine cannot run it in this precision; None if it can."""
        return None

    @abstractmethod
    def decode(self, prompts: Prompts, new_tokens: int) -> Decoded:
        """Consume the prompts, then decode as many tokens of each."""

    @abstractmethod
    def close(self) -> None:
        """End its threads and free the model."""


class RivalContestant:
    """A rival on rank 0 with `threads` threads, while the other ranks wait without using a core.

    Args:
        rival: None on the other ranks.
    """

    def __init__(self, site: DecodeSite, rival: Rival | None, vocab_size: int, threads: int):
        self._site, self._rival, self._vocab_size, self._threads = site, rival, vocab_size, threads

    def __call__(self, load: Load) -> Served:
        """Decode one batch from prompts to end."""
        self._site.barrier()
        served = Served()
        if self._rival is not None:
            torch.set_num_threads(self._threads)
            try:
                prompts = [load.prompt(self._vocab_size, SEED + row) for row in range(load.batch)]
                decoded = self._rival.decode(prompts, load.new_tokens)
                served = Served(between(decoded.times), decoded.token_ids[0])
            finally:
                torch.set_num_threads(self._site.threads)
            wait_until_idle(self._rival.title)
        self._site.barrier()
        return served

    def close(self) -> None:
        """End the rival's threads."""
        if self._rival is not None:
            self._rival.close()


def wait_until_idle(title: str) -> None:
    """Return when this process is idle: threads of a rival may spin for a while after their work.

    Raises:
        StagdistError: they do not stop.
    """
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        wall_s, used_s = time.perf_counter(), time.process_time()
        time.sleep(CALM_S)
        if time.process_time() - used_s < CALM_SHARE * (time.perf_counter() - wall_s):
            return
    raise StagdistError(f"threads of {title} still use cores {PATIENCE_S:.0f} s after its run; others cannot be timed")
