"""Compressed files and URLs give the same documents as plain local files."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from stagdist.data.prepare.documents import Reader
from stagdist.data.prepare.sources import ReadOptions, plan_pieces
from stagdist.errors import DataError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}
TEXTS = [f"document {index}\nwith two lines and an umlaut \u00e4" for index in range(2000)]
CONTENTS = {
    "a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
    "b.json": json.dumps([{"text": text} for text in TEXTS]),
    "c.txt": "\n\n".join(TEXTS),
}


def read(*inputs: object, **options: object) -> list[str]:
    chosen = ReadOptions(**options)  # type: ignore[arg-type]
    return list(Reader(chosen).documents(plan_pieces(list(map(str, inputs)), chosen)))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("mode", ["auto", "file", "paragraph", "line"])
def test_a_compressed_file_has_the_documents_of_the_plain_one(
    tmp_path: Path, suffix: str, name: str, mode: str
) -> None:
    plain = tmp_path / name
    plain.write_text(CONTENTS[name], encoding="utf-8")
    if name == "c.txt" and mode == "auto":  # cut in blocks, which a plain file is when it is large
        plain.write_text(CONTENTS[name] * 3, encoding="utf-8")
    compressed = tmp_path / (name + suffix)
    compressed.write_bytes(COMPRESS[suffix](plain.read_bytes()))
    assert read(compressed, txt_documents=mode) == read(plain, txt_documents=mode)
    plain.unlink()
    assert len(read(tmp_path, txt_documents=mode)) == len(read(compressed, txt_documents=mode))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "c.txt"])
@pytest.mark.parametrize("damage", ["cut", "not compressed"])
def test_a_damaged_compressed_file_is_one_error_with_its_name(
    tmp_path: Path, suffix: str, name: str, damage: str
) -> None:
    content = CONTENTS[name].encode()
    path = tmp_path / (name + suffix)
    path.write_bytes(COMPRESS[suffix](content)[:-40] if damage == "cut" else content)
    remedy = "fetch it again" if damage == "cut" else "fetch it again, or correct its suffix"
    with pytest.raises(DataError, match=rf"{path.name} is damaged: .*; {remedy}"):
        read(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damage_is_not_taken_for_the_end_or_for_bad_json(tmp_path: Path, suffix: str) -> None:
    pack, lines = COMPRESS[suffix], b'{"text": "one"}\n' * 5000
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(lines) * 2)
    assert read(path) == ["one"] * 10_000
    if suffix != ".zst":
        path.write_bytes(pack(lines) + b"\0" * 10_000 + pack(lines) + b"\0" * 100)
        assert read(path) == ["one"] * 10_000, "padding"
    for after in (b"garbage", b"\0garbage", pack(lines)[:-1], pack(lines)[1:]):
        path.write_bytes(pack(lines) + after)
        with pytest.raises(DataError, match=rf"a\.jsonl{suffix} is damaged: .*; fetch it again"):
            read(path)
    path.write_bytes(pack(b"no JSON\n" + lines)[:-1])
    with pytest.raises(DataError, match=rf"a\.jsonl{suffix} is damaged: .*; fetch it again"):
        read(path)
    path.write_bytes(pack(lines + b"no JSON\n"))
    with pytest.raises(DataError, match=r"not JSON at byte 80000: .*remove that record \(.* decompressed text\)"):
        read(path)
    path.write_bytes(pack(b"one\n\ntw\xf6\n"))
    path = path.rename(tmp_path / f"a.txt{suffix}")
    for mode in ("auto", "file", "paragraph", "line"):
        with pytest.raises(DataError, match=r"not UTF-8 \(byte 0xf6 at 7\); .* \(.* decompressed text\)"):
            read(path, txt_documents=mode)


def test_a_long_window_of_zstd_has_its_own_remedy(tmp_path: Path) -> None:
    line = b'{"text": "one"}\n'
    for window in (27, 28, 31):
        block = (1 | len(line) << 3).to_bytes(3, "little") + line  # the last one, not compressed
        (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\0" + bytes([window - 10 << 3]) + block)
        if window == 27:
            assert read(tmp_path / "a.jsonl.zst") == ["one"]
            continue
        with pytest.raises(DataError, match=r"a\.jsonl\.zst has a larger window .*; unpack it: zstd -d --long=31"):
            read(tmp_path / "a.jsonl.zst")


def test_an_error_of_a_store_while_reading_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFile

    class NoAnswerError(Exception):
        """As those of aiohttp: of no class that Python knows."""

    def fail(*_: object) -> None:
        raise NoAnswerError("no answer")

    store = fsspec.filesystem("memory")
    store.pipe("/broken/a.jsonl", CONTENTS["a.jsonl"].encode() * 10)
    try:
        (piece,) = plan_pieces(["memory://broken/a.jsonl"], ReadOptions())
        monkeypatch.setattr(MemoryFile, "readinto", fail)
        with pytest.raises(DataError, match=r"broken/a\.jsonl cannot be read: NoAnswerError: no answer; check"):
            list(Reader(ReadOptions()).documents([piece]))
        with pytest.raises(DataError, match=r"broken/a\.jsonl cannot be read: NoAnswerError: no answer; check"):
            plan_pieces(["memory://broken/a.jsonl"], ReadOptions())
    finally:
        store.rm("/broken", recursive=True)


def test_files_of_a_url_are_read_by_name_folder_and_pattern(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name, content in CONTENTS.items():
        store.pipe(f"/corpus/{name}", content.encode())
    store.pipe("/corpus/d.jsonl.gz", gzip.compress(CONTENTS["a.jsonl"].encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "e.parquet")
    store.pipe("/corpus/e.parquet", (tmp_path / "e.parquet").read_bytes())
    store.pipe("/corpus/ignored.bin", b"\0")
    try:
        for name in ("a.jsonl", "b.json", "d.jsonl.gz", "e.parquet"):
            assert read(f"memory://corpus/{name}") == TEXTS
        assert read("memory://corpus/*.jsonl*") == TEXTS * 2
        assert read("memory://corpus", exclude=("*.txt",)) == TEXTS * 4
        with pytest.raises(DataError, match="no file at memory://corpus/absent"):
            read("memory://corpus/absent.jsonl")
    finally:
        store.rm("/corpus", recursive=True)
    (tmp_path / "a.jsonl").write_text(CONTENTS["a.jsonl"])
    assert read(f"file://{tmp_path}/a.jsonl") == TEXTS


def test_a_store_whose_package_is_missing_or_unknown_is_one_error() -> None:
    with pytest.raises(DataError, match=r"s3://bucket/a.jsonl cannot be read: .*s3fs"):
        read("s3://bucket/a.jsonl")
    with pytest.raises(DataError, match=r"nowhere://a.jsonl cannot be read: .*nowhere"):
        read("nowhere://a.jsonl")


def test_an_arrow_file_of_a_dataset_is_read_in_its_order(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "set")
    (arrow,) = (tmp_path / "set").glob("*.arrow")
    assert read(arrow) == TEXTS
    content = arrow.read_bytes()
    for cut in (1000, 6, 1, len(content) - 8):
        arrow.write_bytes(content[:cut])
        with pytest.raises(DataError, match=r"\.arrow is damaged: .*; fetch it again"):
            read(arrow)
