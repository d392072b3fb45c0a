"""Mutated inputs of the data tools: a refusal of one line, or the documents that are there."""

import bz2
import gzip
import io
import json
import lzma
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import xxhash

import tools.prepare_data
import tools.train_tokenizer
from stagdist.data.indexed import open_index
from tests.fuzz.mutations import COUNT, Mutation, Outcome, mutations, run_main

TEXTS = [f"document {index}\nof {index * 7919 % 1000003} words \u00e4\U0001f642" for index in range(60)]
RECORDS = [json.dumps({"id": index, "text": text}, ensure_ascii=index % 2 == 0) for index, text in enumerate(TEXTS)]
LINES = "\n".join(RECORDS).encode() + b"\n"
PROSE = "\n\n".join(TEXTS).encode()
TABLE = pyarrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))})


def zstd(content: bytes) -> bytes:
    """A frame with a checksum, as the command zstd writes it; pyarrow writes none."""
    frame = bytearray(pyarrow.compress(content, "zstd", asbytes=True))
    frame[4] |= 4
    return bytes(frame) + struct.pack("<I", xxhash.xxh64(content).intdigest() & 0xFFFFFFFF)


def parquet() -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(TABLE, stream, row_group_size=20, write_page_checksum=True)
    return stream.getvalue()


def arrow(*, random_access: bool) -> bytes:
    stream = io.BytesIO()
    with (pyarrow.ipc.new_file if random_access else pyarrow.ipc.new_stream)(stream, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=20)
    return stream.getvalue()


VALID = {
    "a.jsonl": LINES,
    "b.json": ("[\n" + ",\n".join(RECORDS) + "\n]").encode(),
    "part-00000": LINES,
    "c.jsonl.gz": gzip.compress(LINES),
    "d.jsonl.bz2": bz2.compress(LINES[:2000]) + bz2.compress(LINES[2000:]),
    "e.jsonl.xz": lzma.compress(LINES[:2000]) + lzma.compress(LINES[2000:]),
    "f.jsonl.zst": zstd(LINES),
    "g.parquet": parquet(),
    "h.arrow": arrow(random_access=False),
    "i.arrow": arrow(random_access=True),
    "j.txt": PROSE,
    "k.txt.gz": gzip.compress(PROSE),
}


def prepare(source: Path, *options: object) -> tuple[Outcome, list[str]]:
    """What tools/prepare_data.py does with a file, and the documents of its corpus."""
    prefix = source.parent / "out" / "corpus"
    outcome = run_main(
        tools.prepare_data.main,
        *(source, "--output", prefix, "--tokenizer", "bytes", "--no-shuffle", "--workers", 1, "--quiet", *options),
    )
    documents: list[str] = []
    if outcome.code == 0:
        ends = np.cumsum(open_index(str(prefix)).lengths)
        tokens = np.fromfile(f"{prefix}.bin", np.uint16)
        documents = [bytes(part[:-1].astype(np.uint8)).decode() for part in np.split(tokens, ends[:-1])]
    for path in (source.parent / "out").glob("*"):
        assert outcome.code == 0, f"{path} was left behind"
        path.unlink()
    return outcome, documents


def is_right(name: str, mutation: Mutation, documents: list[str]) -> bool:
    """Whether the documents are those of the file before the change, as far as the change leaves them."""
    if mutation.kept == 0 and mutation.content in VALID.values():  # recognized by content, but .txt stays text
        return documents in (TEXTS, ["\n".join(RECORDS)] if ".txt" in name else TEXTS)
    if name.endswith((".gz", ".bz2", ".xz", ".zst", ".parquet")):
        return documents == TEXTS  # check sums
    if name.endswith(".arrow"):  # no check sums: a changed place of a buffer is not noticed, a changed text is alone
        batches = [VALID[name].rfind(text.encode()) for text in TEXTS[::20]]
        if not any(start <= mutation.kept < start + 20 * len(TEXTS[0].encode()) for start in batches):
            return True
        return len(documents) == len(TEXTS) == 1 + sum(map(TEXTS.__contains__, documents))
    if name.endswith(".txt"):
        parts = re.split(r"\n[ \t\r]*\n", mutation.content.decode("utf-8-sig"))
        return documents == [part.strip("\r\n") for part in parts if part.strip()]
    line = VALID[name][: mutation.kept].count(b"\n") - name.endswith(".json")
    before, after = TEXTS[: max(line, 0)], TEXTS[line + 2 :] if "bit" in mutation.name else []
    return (
        documents[: len(before)] == before
        and documents[len(documents) - len(after) :] == after
        and len(before) + len(after) <= len(documents) <= len(TEXTS) + 1
    )


@pytest.mark.parametrize("name", VALID)
def test_a_mutated_input_is_refused_or_read_rightly(tmp_path: Path, name: str) -> None:
    source = tmp_path / name
    options = ("--txt-documents", "paragraph")
    source.write_bytes(VALID[name])
    assert prepare(source, *options)[1] == TEXTS
    foreign = [VALID[other] for other in ("a.jsonl", "c.jsonl.gz", "g.parquet", "i.arrow")] + [b"PK\3\4" + b"\0" * 26]
    for mutation in mutations(VALID[name], others=foreign):
        source.write_bytes(mutation.content)
        outcome, documents = prepare(source, *options)
        if outcome.code:
            outcome.assert_refused(name)
        else:
            assert is_right(name, mutation, documents), (mutation.name, documents)


@pytest.mark.parametrize("name", ["a.jsonl", "c.jsonl.gz", "g.parquet"])
def test_the_tokenizer_is_trained_on_a_mutated_input_or_nothing_is_written(tmp_path: Path, name: str) -> None:
    source, target = tmp_path / name, tmp_path / "tokenizer"
    for mutation in mutations(VALID[name], max(COUNT // 10, 6)):
        source.write_bytes(mutation.content)
        outcome = run_main(
            tools.train_tokenizer.main,
            *(source, "--output", target, "--vocab-size", 300, "--quiet", "--overwrite"),
        )
        if outcome.code:
            outcome.assert_refused(name)
            assert not target.exists()
        else:
            for path in target.iterdir():
                path.unlink()
            target.rmdir()
