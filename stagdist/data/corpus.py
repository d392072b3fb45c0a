"""Training, validation and test data sets over indexed corpora, by megatron-core's GPTDataset and BlendedDataset.

The only module that uses the data sets of megatron-core. It avoids their pitfalls: an empty split never ends; weights
with one corpus or an unset size are refused; cached index maps are found by the path of a corpus, not by its content;
and a run that is killed while it writes them leaves maps that look complete.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from stagdist.config.parts import CorpusConfig, DataConfig
from stagdist.data.compatibility import LARGEST_SEED, cache_directory, check_data, plan_splits
from stagdist.data.indexed import CorpusIndex, canonical_prefix
from stagdist.data.tokenizer import Tokenizer
from stagdist.errors import ConfigError, DataError
from stagdist.files import locked

logger = logging.getLogger(__name__)

_SEED_STEP = 0x9E3779B9  # between the seeds of rounds; odd, so that they differ

TokenDataset = torch.utils.data.Dataset[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Splits:
    """Data sets whose items are dicts with `tokens` and `labels` (already shifted), int64 [S]; None where unused."""

    train: TokenDataset
    validation: TokenDataset | None
    test: TokenDataset | None


class _TokenizerFacts:
    """The tokenizer as the data sets of megatron-core need it. Its identifiers determine the names of cached maps.

    They include the identities of the corpora, so that a corpus that is prepared again does not use the old maps.
    """

    pad = -1  # an id that no token has: nothing is masked

    def __init__(self, tokenizer: Tokenizer, corpora: dict[str, CorpusIndex]) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.eod = self.eos = tokenizer.end_of_document
        self.unique_identifiers = {
            "tokenizer": tokenizer.fingerprint,
            "corpora": {prefix: index.identity() for prefix, index in sorted(corpora.items())},
        }


class _AllRounds(torch.utils.data.ConcatDataset[dict[str, torch.Tensor]]):
    """The samples of one corpus in the order of the rounds, with the attributes that megatron-core's blend reads."""

    def __init__(self, rounds: Sequence[Any]) -> None:
        super().__init__(rounds)
        self.index_split = rounds[0].index_split
        self.unique_identifiers = [one.unique_identifiers for one in rounds]


def build_splits(
    data: DataConfig,
    *,
    sequence_length: int,
    num_samples: tuple[int, int, int],
    tokenizer: Tokenizer,
    vocab_size: int,
    read_samples: int = 0,
) -> Splits:
    """Build the data sets of a run.

    If torch.distributed is initialized every rank must call this: rank 0 writes index maps into the cache while
    the others wait, so the cache must be on a shared file system. The order of the samples depends on
    `num_samples`: it must stay the same during a run. It does not depend on `read_samples`: a run that needs more
    samples than the first data set has gets further rounds, see `_further_rounds`.

    Args:
        sequence_length: tokens of a sequence.
        num_samples: sequences of train, validation and test; 0 builds none.
        read_samples: training sequences that the run reads, if that may be more than `num_samples`.

    Raises:
        ConfigError: see `check_data`.
        DataError: see `check_data`; the order of so many samples needs more memory or disk than there is.
    """
    if num_samples[0] < 1 or min(num_samples) < 0:
        raise ConfigError(f"number of samples {num_samples} must be at least 1 for training and not negative")
    corpora = check_data(
        data, sequence_length=sequence_length, vocab_size=vocab_size, num_samples=num_samples, tokenizer=tokenizer
    )
    _check_memory(max(num_samples[0], read_samples // 2) * sequence_length, sequence_length, corpora)
    directory = cache_directory(data)
    fixed = {
        "sequence_length": sequence_length,
        "path_to_cache": str(directory),
        "tokenizer": _TokenizerFacts(tokenizer, corpora),
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
    }
    with _process_group(), _locked_cache(directory):
        train, validation, test = _build(data, data.seed, num_samples, fixed)
        if len(train) < read_samples:
            train = _further_rounds(data, train, num_samples[0], read_samples, fixed)
    return Splits(train, validation, test)


def _check_memory(tokens: int, sequence_length: int, corpora: dict[str, CorpusIndex]) -> None:
    """Refuse an order of samples that this machine could not hold, before the system ends the process for it.

    Args:
        tokens: of all samples in the largest round; megatron-core needs 12 bytes per sample and 16 per document.
    """
    mean_length = sum(index.tokens for index in corpora.values()) / sum(len(one.lengths) for one in corpora.values())
    needed, there = tokens * (12 / sequence_length + 16 / mean_length), psutil.virtual_memory().total
    if needed > there:
        raise DataError(
            f"the order of so many samples needs {needed / 2**30:.0f} GiB of memory, this machine has "
            f"{there / 2**30:.0f} GiB; lower training.steps"
        )


def _build(data: DataConfig, seed: int, num_samples: tuple[int, int, int], fixed: dict[str, Any]) -> list[Any]:
    """Data sets of the three splits by megatron-core."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core warns of optional GPU packages when it is imported
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    wanted = [plan is not None and count > 0 for plan, count in zip(plan_splits(data), num_samples, strict=True)]
    config = GPTDatasetConfig(random_seed=seed, **fixed, **_blend_arguments(data, wanted))
    if config.split_matrix is not None:
        # an unused split must not be built: with few documents it may be empty
        config.split_matrix = [edges if keep else None for edges, keep in zip(config.split_matrix, wanted, strict=True)]
    built: list[Any] = BlendedMegatronDatasetBuilder(GPTDataset, list(num_samples), lambda: True, config).build()
    return built


def _further_rounds(data: DataConfig, first: Any, num_samples: int, read_samples: int, fixed: dict[str, Any]) -> Any:
    """The training samples of a run that is longer than planned, beginning with those of `first`.

    Each corpus is read to the end of its data set in `first`, which holds complete epochs. Its next round is a data set
    with another seed, and so on. Round r is built for `num_samples * 2**(r - 1)` samples, as many as all rounds before
    it, so even a run that becomes a thousand times longer has few rounds. A blend keeps its weights.
    """
    rounds = [first]
    while sum(map(len, rounds)) < read_samples:
        seed = (data.seed + len(rounds) * _SEED_STEP) & LARGEST_SEED
        rounds.append(_build(data, seed, (num_samples << (len(rounds) - 1), 0, 0), fixed)[0])
    if not hasattr(first, "datasets"):  # one corpus
        return _AllRounds(rounds)
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.utils import normalize

    corpora = [_AllRounds(one) for one in zip(*(blend.datasets for blend in rounds), strict=True)]
    weights = normalize([corpus.weight for corpus in data.corpora or data.train_corpora])
    return BlendedMegatronDatasetBuilder.build_generic_dataset(
        BlendedDataset, lambda: True, True, corpora, weights, sum(map(len, rounds)), first.config
    )


def _blend_arguments(data: DataConfig, wanted: list[bool]) -> dict[str, Any]:
    """Arguments of megatron-core: one blend that is cut, or a blend for each split."""
    if data.corpora:
        # fixed-point notation: megatron-core reads numbers by a pattern that knows no exponents
        return {"blend": _blend(data.corpora), "split": ",".join(f"{share:.12f}" for share in data.split)}
    plans = zip(plan_splits(data), wanted, strict=True)
    return {"blend_per_split": [_blend(plan.corpora) if plan and keep else None for plan, keep in plans]}


def _blend(corpora: tuple[CorpusConfig, ...]) -> tuple[list[str], list[float] | None]:
    prefixes = [canonical_prefix(corpus.prefix) for corpus in corpora]
    return prefixes, [corpus.weight for corpus in corpora] if len(corpora) > 1 else None


@contextmanager
def _process_group() -> Iterator[None]:
    """Create a process group of one process if there is none, because BlendedDataset reads the rank."""
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _locked_cache(directory: Path) -> Iterator[None]:
    """On rank 0: lock the cache against other runs, and remove incomplete maps of a killed run."""
    if torch.distributed.get_rank() != 0:
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory / ".lock", timeout_s=-1):
            _remove_damaged(directory)
            yield
    except MemoryError as error:
        raise DataError(f"the order of the samples does not fit in memory: {error}; lower training.steps") from error
    except Exception as error:
        reason = error.__cause__ or error  # megatron-core raises a bare Exception from an OSError
        if not isinstance(reason, OSError):
            raise
        raise DataError(f"cannot write index maps to {directory}: {reason}; set data.cache_directory") from error


def _remove_damaged(directory: Path) -> None:
    for path in directory.glob("*.npy"):
        try:
            np.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError) as error:
            logger.warning("index map %s was cut short (%s) and is built again", path, error)
            path.unlink(missing_ok=True)
