"""Input to documents: every format, and every way to cut a file gives the same documents."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from stagdist.data.prepare.documents import Reader
from stagdist.data.prepare.sources import BLOCK_BYTES, PIECE_BYTES, ReadOptions, plan_pieces
from stagdist.errors import ConfigError, DataError


def read(*inputs: object, piece_bytes: int = PIECE_BYTES, **options: object) -> list[str]:
    chosen = ReadOptions(**options)  # type: ignore[arg-type]
    pieces = plan_pieces([str(entry) for entry in inputs], chosen, piece_bytes=piece_bytes)
    reader = Reader(chosen)
    return [text for piece in pieces for text in reader.documents(piece)]


@pytest.fixture
def big_text(library_files: list[Path], tmp_path: Path) -> Path:
    path = tmp_path / "all.txt"
    path.write_bytes(b"\n".join(file.read_bytes() for file in library_files))
    return path


@pytest.mark.parametrize("mode", ["line", "paragraph", "auto"])
def test_the_pieces_of_a_file_hold_each_document_once(big_text: Path, mode: str) -> None:
    whole = read(big_text, txt_documents=mode, piece_bytes=1 << 30)
    assert read(big_text, txt_documents=mode, piece_bytes=BLOCK_BYTES) == whole
    assert read(big_text, txt_documents=mode, piece_bytes=3 * BLOCK_BYTES) == whole
    content = big_text.read_text(encoding="utf-8")
    assert [line for text in whole for line in text.splitlines() if line.strip()] == [
        line for line in content.splitlines() if line.strip()
    ]
    if mode == "line":
        assert whole == [line for line in content.split("\n") if line.strip()]
    if mode == "paragraph":
        assert len(whole) > 1000 and not any("\n\n" in text for text in whole)
    if mode == "auto":
        assert len(big_text.read_bytes()) / len(whole) == pytest.approx(BLOCK_BYTES, rel=0.2)


def test_text_without_a_line_end_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "one_line.txt"
    path.write_text("\u6f22\u5b57x" * 60_000, encoding="utf-8")
    documents = read(path, piece_bytes=2 * BLOCK_BYTES)
    assert len(documents) > 20 and "".join(documents) == path.read_text(encoding="utf-8")


def test_a_file_is_one_document_where_it_is_small_or_asked_for(big_text: Path, library_files: list[Path]) -> None:
    assert read(*library_files) == [
        text for path in library_files if (text := path.read_text(encoding="utf-8")).strip()
    ]
    assert read(big_text, txt_documents="file") == [big_text.read_text(encoding="utf-8")]


def test_json_lines_are_read_once_from_pieces_gzip_and_arrays(library_files: list[Path], tmp_path: Path) -> None:
    expected = [path.read_text(encoding="utf-8") for path in library_files if path.stat().st_size]
    records = [{"body": text, "text": 3} for text in expected]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write(lines)
    (tmp_path / "c.json").write_text(json.dumps(records, indent=1))
    for name in ("a.jsonl", "b.jsonl.gz", "c.json"):
        assert read(tmp_path / name, text_key="body", piece_bytes=BLOCK_BYTES) == expected
    assert read(str(tmp_path / "?.json*"), text_key="body") == expected * 3


def test_half_a_surrogate_pair_in_json_becomes_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud83dy \\ud83d\\ude42"}\n')
    assert read(tmp_path / "a.jsonl") == ["x\ufffdy \U0001f642"]


def test_parquet_is_read_by_row_groups(tmp_path: Path) -> None:
    texts = [f"document {index}" for index in range(2500)] + [None]
    table = pyarrow.table({"text": texts, "other": list(range(2501))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    assert len(plan_pieces([str(tmp_path / "a.parquet")], ReadOptions())) == 4
    assert read(tmp_path / "a.parquet") == texts[:-1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_the_datasets_library_is_read_in_its_order(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for shard in range(3):
        rows = [json.dumps({"text": f"row {shard} {index}"}) for index in range(5)]
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"train-{shard}.jsonl").write_text("\n".join(rows))
    expected = [f"row {shard} {index}" for shard in range(3) for index in range(5)]
    name = f"hub:{tmp_path / 'set'}"
    assert read(name, streaming=streaming) == expected
    assert len(plan_pieces([name], ReadOptions(streaming=streaming))) == (3 if streaming else 1)
    with pytest.raises(DataError, match="--split-name"):
        read(name, streaming=streaming, split_name="absent")


def test_a_directory_gives_its_text_files_by_name(tmp_path: Path) -> None:
    for name in ("b.txt", "a.py", "sub/c.md", "x.bin", ".hidden.txt", "__pycache__/d.py", "sub/e.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    assert read(tmp_path) == ["a.py", "b.txt", "sub/c.md", "sub/e.jsonl"]
    assert read(tmp_path, exclude=("sub/*",)) == ["a.py", "b.txt"]
    assert read(tmp_path, include=("*.bin",)) == ["x.bin"]


def test_bytes_that_are_not_utf8_stop_or_are_left_out_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\nb\xe9d\n\nlast")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 \(byte 0xe9 at 7\).*--bad-utf8"):
        read(tmp_path / "a.txt", txt_documents="file")
    assert read(tmp_path / "a.txt", txt_documents="paragraph", bad_utf8="skip") == ["good", "last"]
    assert read(tmp_path / "a.txt", txt_documents="paragraph", bad_utf8="replace") == ["good", "b\ufffdd", "last"]
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "b\xe9d"}\n{"text": "good"}\n')
    assert read(tmp_path / "b.jsonl", bad_utf8="skip") == ["good"]
    assert read(tmp_path / "b.jsonl", bad_utf8="replace") == ["b\ufffdd", "good"]


def test_input_that_cannot_be_read_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "keys.jsonl").write_text('{"content": "x", "id": 1}\n')
    with pytest.raises(DataError, match=r"no text under the key 'text', its keys are content, id; .*--text-key"):
        read(tmp_path / "keys.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(DataError, match="not JSON at byte 14"):
        read(tmp_path / "broken.jsonl")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(DataError, match="is not text"):
        read(tmp_path / "image.png")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"broken\.parquet is damaged: .*; fetch it again"):
        read(tmp_path / "broken.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text' but content"):
        read(tmp_path / "a.parquet")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    with pytest.raises(DataError, match="damaged"):
        read(tmp_path / "cut.jsonl.gz")
    with pytest.raises(DataError, match=r"absent\.txt does not exist"):
        read(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="no file matches"):
        read(tmp_path / "*.absent")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(DataError, match=r"holds no file to read but .*a\.png; .*--include"):
        read(tmp_path / "images")
    with pytest.raises(ConfigError, match="no input"):
        read()
