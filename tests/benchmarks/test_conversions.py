"""The benchmark of conversions' memory: that it sees anonymous memory, and that alone."""

import sys
from pathlib import Path

import pytest

from benchmarks.conversions import CONVERSIONS, VARIANTS, peak_anonymous_bytes
from stagdist.errors import TrainingError

MB = 10**6
ANONYMOUS = "import time; held = b'x' * 150_000_000; time.sleep(0.3)"
MAPPED = """
import mmap, time
with open("large", "w+b") as stream:
    stream.truncate(150_000_000)
    with mmap.mmap(stream.fileno(), 0) as view:
        assert sum(view[::4096]) == 0
        time.sleep(0.3)
"""


def test_anonymous_memory_counts_and_mapped_files_do_not(tmp_path: Path) -> None:
    assert 150 * MB < peak_anonymous_bytes([sys.executable, "-c", ANONYMOUS], tmp_path) < 200 * MB
    assert peak_anonymous_bytes([sys.executable, "-c", MAPPED], tmp_path) < 50 * MB


def test_a_conversion_that_fails_is_told_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"ended with 3: no such checkpoint"):
        peak_anonymous_bytes([sys.executable, "-c", "print('no such checkpoint'); exit(3)"], tmp_path)


def test_every_verb_is_measured() -> None:
    verbs = {words.split()[0] for variant in VARIANTS for words in CONVERSIONS[variant].values()}
    assert verbs == {"import", "export", "verify", "inspect", "merge", "split", "upcycle"}
