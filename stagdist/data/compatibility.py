"""Check that corpora, tokenizer and model fit each other before a run starts.

Needs no framework and no process group: the checks also run before ranks connect, and in a dry run.
"""

import hashlib
import logging
import os
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from stagdist.config.parts import CorpusConfig, DataConfig
from stagdist.config.run_config import RunConfig
from stagdist.data.indexed import CorpusIndex, canonical_prefix, corpus_path, open_index, read_description
from stagdist.data.tokenizer import BYTES, Tokenizer
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.errors import ConfigError, DataError

LOG = logging.getLogger(__name__)

SPLIT_NAMES = ("train", "validation", "test")

LARGEST_SEED = 2**32 - 1
"""Largest seed that numpy's generators take."""


@dataclass(frozen=True)
class SplitPlan:
    """The corpora of a split, and the range of each as shares of the corpus."""

    corpora: tuple[CorpusConfig, ...]
    share: tuple[float, float]


def split_shares(split: tuple[float, float, float]) -> tuple[tuple[float, float], ...]:
    """First and last share of each of the three splits."""
    shares = np.array(split, np.float64)
    return tuple(pairwise(accumulate((shares / shares.sum()).tolist(), initial=0.0)))


def plan_splits(data: DataConfig) -> tuple[SplitPlan | None, ...]:
    """Train, validation and test as configured; None for a split without corpora or share."""
    if data.corpora:
        shares = split_shares(data.split)
        return tuple(SplitPlan(data.corpora, share) if share[1] > share[0] else None for share in shares)
    separate = (data.train_corpora, data.validation_corpora, data.test_corpora)
    return tuple(SplitPlan(corpora, (0.0, 1.0)) if corpora else None for corpora in separate)


def training_identity(data: DataConfig, tokenizer: Tokenizer) -> str:
    """Short hash of the training samples: the sequence of corpora and the tokenizer, not their paths."""
    plan = plan_splits(data)[0]
    corpora = () if plan is None else plan.corpora
    parts = [open_index(canonical_prefix(corpus.prefix)).identity() for corpus in corpora]
    return hashlib.sha256("/".join([*parts, tokenizer.fingerprint]).encode()).hexdigest()[:16]


def check_vocabulary(tokenizer: Tokenizer, place: str | Path, rows: int, directory: Path | None = None) -> None:
    """Refuse a tokenizer that can give a text, or its end, ids for which the embedding has no row.

    Special tokens beyond the rows are accepted, because no text has them; so are rows without tokens.

    Args:
        place: where the tokenizer was loaded from, for the message.
        rows: rows of the embedding.
        directory: holds the embedding; None for that of a new run.

    Raises:
        DataError: there is such an id.
    """
    needed = tokenizer.text_vocab_size
    if needed <= rows:
        return
    if directory is None:
        owner, remedy = f"model.vocab_size is {rows}", f"raise model.vocab_size to {needed} or more"
    else:
        owner = f"the weights in {directory} have {rows} rows"
        remedy = (
            "use the tokenizer that belongs to the model, or add rows with transformers: "
            f"model.resize_token_embeddings({needed}), then save_pretrained of model and tokenizer to a new directory"
        )
    raise DataError(f"the tokenizer {place} gives text or its end ids up to {needed - 1}, but {owner}; {remedy}")


def documents_begin(data: DataConfig, tokenizer: Tokenizer) -> bool:
    """Whether the training documents begin with the special tokens that the tokenizer puts before a text.

    Corpora of other programs record nothing; their first document decides.
    """
    plan, begin = plan_splits(data)[0], tokenizer.begin_ids
    found = {}
    for corpus in () if plan is None or not begin else plan.corpora:
        prefix = canonical_prefix(corpus.prefix)
        description = read_description(prefix)
        first = description.begin_of_document if description else open_index(prefix).first_tokens(len(begin))
        found[prefix] = first == begin
    if len(set(found.values())) == 2:
        without = ", ".join(prefix for prefix, begins in found.items() if not begins)
        LOG.warning(
            "documents of %s do not begin with the special tokens that the tokenizer puts before a text, those of the "
            "other corpora do; prepare them again for documents of one kind", without,
        )  # fmt: skip
    return any(found.values()) or not begin


def check_data(
    data: DataConfig,
    *,
    sequence_length: int,
    vocab_size: int,
    num_samples: tuple[int, int, int] = (1, 0, 0),
    tokenizer: Tokenizer | None = None,
) -> dict[str, CorpusIndex]:
    """Refuse data that cannot train the model; returns the opened corpora by canonical prefix.

    Args:
        sequence_length: tokens of a training sequence.
        vocab_size: rows of the embedding (`model.vocab_size`).
        num_samples: sequences of train, validation and test; a split of 0 is not checked.
        tokenizer: the tokenizer of `data` if it is already loaded.

    Raises:
        ConfigError: no corpus is configured.
        DataError: a corpus is missing, damaged, empty, shorter than a sequence, made by another tokenizer, or has ids
            that the embedding lacks; the tokenizer has such ids.
    """
    tokenizer = tokenizer or load_tokenizer(data.tokenizer)
    plans = plan_splits(data)
    if plans[0] is None:
        raise ConfigError("no corpus: set data.corpora (or data.train_corpora) to the PREFIX of a .bin/.idx pair")
    if data.seed > LARGEST_SEED:
        raise ConfigError(f"data.seed is {data.seed}, at most {LARGEST_SEED} is possible")
    check_vocabulary(tokenizer, data.tokenizer, vocab_size)
    directory = cache_directory(data)
    ancestor = next(folder for folder in (directory, *directory.parents) if folder.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise DataError(f"cannot write index maps to {directory}; set data.cache_directory to a writable directory")
    opened: dict[str, CorpusIndex] = {}
    for name, plan, wanted in zip(SPLIT_NAMES, plans, num_samples, strict=True):
        for corpus in plan.corpora if plan is not None else ():
            prefix = canonical_prefix(corpus.prefix)
            if prefix not in opened:
                opened[prefix] = open_index(prefix)
                _check_tokens(opened[prefix], data, tokenizer, vocab_size)
            if plan is not None and wanted:
                _check_length(opened[prefix], name, plan, sequence_length)
    return opened


def problems_on_this_machine(config: RunConfig) -> list[str]:
    """Why the data cannot train the model, for a dry run. Files that are absent may be on the hosts of the run."""
    data = config.data
    corpora = (*data.corpora, *data.train_corpora, *data.validation_corpora, *data.test_corpora)
    files = [corpus_path(corpus.prefix, ending) for corpus in corpora for ending in (".bin", ".idx")]
    try:
        if data.tokenizer != BYTES and not os.path.exists(data.tokenizer):
            return []
        tokenizer, rows = load_tokenizer(data.tokenizer), config.model.vocab_size
        check_vocabulary(tokenizer, data.tokenizer, rows)
        if files and all(map(os.path.exists, files)):
            check_data(data, sequence_length=config.sequence_length, vocab_size=rows, tokenizer=tokenizer)
    except (ConfigError, DataError) as error:
        return [str(error)]
    return []


def _check_tokens(index: CorpusIndex, data: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that the tokenizer is the recorded one, if there is a record, and that all ids are in the embedding."""
    description = read_description(index.prefix)
    if description is not None and description.tokens != index.tokens:
        raise DataError(
            f"{index.prefix}.json says {description.tokens} tokens but the index {index.tokens}: they do not "
            "belong together; prepare the corpus again, or move the .json away if another program made the corpus"
        )
    if description is not None and description.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"corpus {index.prefix} was made with the tokenizer {description.tokenizer} "
            f"({description.vocab_size} tokens, fingerprint {description.tokenizer_fingerprint[:12]}), not with "
            f"data.tokenizer {data.tokenizer} ({tokenizer.vocab_size} tokens, {tokenizer.fingerprint[:12]}); "
            "set data.tokenizer to that one, or prepare the corpus again"
        )
    if description is not None and description.begin_of_document not in ((), tokenizer.begin_ids):
        raise DataError(
            f"documents of corpus {index.prefix} begin with the token ids {list(description.begin_of_document)}, but "
            f"data.tokenizer {data.tokenizer} puts {list(tokenizer.begin_ids)} before a text; set data.tokenizer to "
            "the one that made the corpus, or prepare the corpus again"
        )
    limits = np.iinfo(index.dtype)
    if description is not None:  # recorded while these tokens were written
        smallest, largest = 0, description.max_token
    elif limits.min < 0 or limits.max >= vocab_size:
        smallest, largest = index.token_range(cache_directory(data))
    else:
        return
    if smallest < 0:
        position = index.first_outside(np.iinfo(np.int64).max)
        raise DataError(
            f"corpus {index.prefix} holds token id {smallest}; ids are 0 or more, and the one at position {position} "
            f"is not. Write the corpus again: with a wider type than {np.dtype(index.dtype).name} if its ids did not "
            "fit and wrapped, without the marks if -1 or -100 marks padding"
        )
    if largest >= vocab_size:
        position = index.first_outside(vocab_size)
        if position < 0:
            raise DataError(f"{index.prefix}.json says max_token {largest}, but it is not there; prepare it again")
        raise DataError(
            f"corpus {index.prefix} holds token id {largest}, but model.vocab_size is {vocab_size} (first such id at "
            f"position {position}); raise model.vocab_size to at least {largest + 1}, or use "
            "the corpus's own tokenizer"
        )


def _check_length(index: CorpusIndex, name: str, plan: SplitPlan, sequence_length: int) -> None:
    tokens = index.split_tokens(plan.share)
    if tokens > sequence_length:
        return
    complete = plan.share == (0.0, 1.0)
    part = f"corpus {index.prefix}" if complete else f"the {name} split of corpus {index.prefix}"
    remedy = "use more text or a shorter data.sequence_length"
    if not complete:
        remedy += f", or give {name} a larger part of data.split (documents are not divided, it has {index.documents})"
    raise DataError(
        f"{part} is shorter than one sequence: {tokens} tokens, {sequence_length + 1} are needed "
        f"(data.sequence_length {sequence_length} and the last label); {remedy}"
    )


def cache_directory(data: DataConfig) -> Path:
    """Where index maps are kept: as configured, or `index_cache` beside the first corpus."""
    if data.cache_directory is not None:
        return Path(os.path.realpath(data.cache_directory))
    first = (data.corpora or data.train_corpora)[0]
    return Path(canonical_prefix(first.prefix)).parent / "index_cache"
