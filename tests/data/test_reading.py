"""Input to documents: every format, and every way to cut a file gives the same documents."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from stagdist.data.prepare.documents import Reader
from stagdist.data.prepare.sources import BLOCK_BYTES, PIECE_BYTES, ReadOptions, files_left_out, plan_pieces
from stagdist.errors import ConfigError, DataError
from tests.data.conftest import RunTool
from tests.data.test_compressed import COMPRESS


def read(*inputs: object, piece_bytes: int = PIECE_BYTES, **options: object) -> list[str]:
    chosen = ReadOptions(**options)  # type: ignore[arg-type]
    return list(Reader(chosen).documents(plan_pieces(list(map(str, inputs)), chosen, piece_bytes=piece_bytes)))


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


ONE, TWO = {"text": "one"}, {"text": "two"}
EMPTY = {
    **{f"zero{suffix}": b"" for suffix in (".jsonl", ".json", ".ndjson", ".txt", ".parquet", ".arrow", "")},
    **{f"zero.jsonl{suffix}": b"" for suffix in COMPRESS},
    **{f"nothing.jsonl{suffix}": compress(b"") for suffix, compress in COMPRESS.items()},
    **{f"nothing.txt{suffix}": compress(b"") for suffix, compress in COMPRESS.items()},
    **{f"mark.{suffix}": b"\xef\xbb\xbf" for suffix in ("jsonl", "json", "txt")},
    **{f"blank.{suffix}": b"\n \n\n" for suffix in ("jsonl", "json", "txt")},
    "array.json": b"[]",
    "array.jsonl": b" [ ]\n",
    "array.json.gz": gzip.compress(b"[]"),
}


@pytest.mark.parametrize("mode", ["auto", "file", "paragraph", "line"])
def test_an_empty_input_holds_no_documents_and_the_others_are_kept(tmp_path: Path, mode: str) -> None:
    for name, content in EMPTY.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name, txt_documents=mode) == []
    table = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    pyarrow.parquet.ParquetWriter(tmp_path / "groups.parquet", table.schema).close()
    for name, new in (("stream.arrow", pyarrow.ipc.new_stream), ("file.arrow", pyarrow.ipc.new_file)):
        new(tmp_path / name, table.schema).close()
    assert read(tmp_path, txt_documents=mode) == []
    (tmp_path / "folder").mkdir()
    assert read(tmp_path / "folder") == []
    (tmp_path / "one.jsonl").write_text(json.dumps(ONE))
    assert read(tmp_path / "folder", tmp_path, txt_documents=mode) == ["one"]


@pytest.mark.parametrize("name", ["a.ndjson", "a.jsonlines", "part-00000", "a.dump", "a.jl", "a.JSONL", "a.gz", "part"])
@pytest.mark.parametrize("pack", [bytes, *COMPRESS.values()])
def test_json_is_recognized_by_name_or_content(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    lines = (json.dumps(ONE) + "\n" + json.dumps(TWO) + "\n").encode()
    content = gzip.compress(lines) if name.endswith(".gz") else pack(lines)
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == ["one", "two"]
    (tmp_path / "array").write_bytes(pack(json.dumps([ONE, TWO], indent=1).encode()))
    assert read(tmp_path / "array") == ["one", "two"]


def test_a_table_is_recognized_by_content_and_text_stays_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = pyarrow.table({"text": pyarrow.array(["one", None, "two"])})
    pyarrow.parquet.write_table(table, tmp_path / "part-0")
    with pyarrow.ipc.new_file(tmp_path / "part-1", table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path) == ["one", "two"] * 2
    for name in ("a.txt", "a.csv", "a.md", "LICENSE"):
        content = json.dumps(ONE) if name != "LICENSE" else "one {two} [three]"
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name) == [content]
    remedy = "to read the texts of their records, convert them to .jsonl"
    assert caplog.messages == [f"note: read as text (1): {tmp_path}/a.{end}; {remedy}" for end in ("txt", "csv")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"PK\3\4" + b"\0" * 30, "is an archive; unpack it"),
        ("a.jsonl", b"PK\3\4" + b"\0" * 30, "is an archive; unpack it"),
        ("a.tar", b"a.txt" + b"\0" * 252 + b"ustar" + b"\0" * 250, "is an archive; unpack it"),
        ("a.pdf", b"%PDF-1.7\n%\xe2\xe3", "is a PDF; .*pdftotext"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer, .*: run git lfs pull"),
        ("a.feather", b"FEA1" + b"\0" * 60, "is Feather of version 1; write it again"),
        ("a.bin", b"a\0b\0" * 99, "is not text; convert it"),
        ("a.jsonl", b'{"text": "a"},\n{"text": "b"}', "Extra data.*write each record on one line"),
        ("a.dat", bytes(range(256)) * 4, "is not text; convert it"),
        ("a.txt", bytes(range(256)) * 4, "is not text; convert it"),
        ("a", b'{\n "text": "on two lines"\n}', "write each record on one line"),
        ("a.json", b'{\n "text": "on two lines"\n}', "write each record on one line"),
        *((name, '{"text": "wide"}\n'.encode(e), "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
          for e in ("utf-16",) for name in ("a.jsonl", "a.txt", "a.ndjson", "a")),
        *(("a.jsonl", '{"text": "wide"}\n'.encode(e), f"is {e.upper()}; convert it: iconv -f {e.upper()} -t UTF-8")
          for e in ("utf-16le", "utf-16be", "utf-32le", "utf-32be", "utf-32")),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"not UTF-8 \(byte 0xe9 at 13\).*iconv -f LATIN1.*--bad-utf8"),
        ("a.json", b'[{"text": "caf\xe9"}]', r"not UTF-8 \(byte 0xe9 at 14\).*iconv -f LATIN1.*--bad-utf8"),
        ("a.jsonl", b'{"text": ["one"]}', "the value under 'text' is a list, not text, its keys are text; choose"),
        ("a.jsonl", b'{"text": 5}', "the value under 'text' is a number"),
        ("a.jsonl", b'{"text": {"a": 1}}', "the value under 'text' is an object"),
        ("a.jsonl", b'["one"]', "the record is a string, not an object with the key 'text'"),
        ("a.jsonl", b"5", "the record is a number, not an object"),
        ("a.jsonl", b'{"Text": "one"}', "no text under the key 'text', its keys are Text; choose with --text-key"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "not JSON at byte 0: it is nested too deeply"),
        ("a.json", b"[" * 100_000, "not JSON at byte 0: it is nested too deeply"),
    ],
)  # fmt: skip
def test_each_fault_has_its_own_message(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"/{name}\b.*{message}"):
        read(tmp_path / name)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=rf"/{name}.gz\b.*{message}"):
        read(tmp_path / f"{name}.gz")


def test_null_under_the_key_is_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "one", "id": ' + "1" * 5000 + "}\n")
    (tmp_path / "b.json").write_text('[{"text": "one"}, {"text": null}]')
    assert read(tmp_path) == ["one", "one"]


def test_records_that_are_not_utf8_are_left_out_of_an_array(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"text": "caf\xe9"}, {"text": "one"}]')
    assert read(tmp_path / "a.json", bad_utf8="skip") == ["one"]
    assert read(tmp_path / "a.json", bad_utf8="replace") == ["caf\ufffd", "one"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    lines = "\ufeff" + json.dumps(ONE) + "\r\n"
    contents = {"a.jsonl": lines * 2, "b": lines, "c.json": "\ufeff" + json.dumps([ONE]), "d.txt": "\ufeffone"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content, newline="")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        for mode in ("auto", "file", "paragraph", "line"):
            found = {*read(tmp_path / name, txt_documents=mode), *read(tmp_path / f"{name}.gz", txt_documents=mode)}
            assert found == {"one"}, name


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_of_text_are_read_and_others_are_named_with_their_type(tmp_path: Path, kind: str) -> None:
    texts, path = ["one", None, "", "two"] * 600, tmp_path / f"a.{kind}"
    columns = {
        "dictionary": pyarrow.array(texts).dictionary_encode(),
        "large": pyarrow.array(texts, pyarrow.large_string()),
        "view": pyarrow.array(texts, pyarrow.string_view()),
        "null": pyarrow.nulls(len(texts)),
        "binary": pyarrow.array([b"one"] * len(texts)),
        "list": pyarrow.array([["one"]] * len(texts)),
        "latin": pyarrow.array([b"caf\xe9"] * len(texts)).view(pyarrow.string()),
    }
    table = pyarrow.table(columns)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
    for key in ("dictionary", "large", "view"):
        assert read(path, text_key=key) == ["one", "two"] * 600
    assert read(path, text_key="null") == read(path, text_key="latin", bad_utf8="skip") == []
    for key, found in (("binary", "binary"), ("list", "list<")):
        with pytest.raises(DataError, match=rf"a\.{kind}: the column '{key}' is of type {found}.*--text-key"):
            read(path, text_key=key)
    with pytest.raises(DataError, match=rf"a\.{kind} is not UTF-8.*--bad-utf8"):
        read(path, text_key="latin")
    (tmp_path / f"packed.{kind}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read(tmp_path / f"packed.{kind}.gz", text_key="view") == ["one", "two"] * 600


def test_what_is_passed_over_is_listed(tmp_path: Path) -> None:
    for name in ("a.ndjson", "part-0", "b.jsonl.zst", "c.pdf", "_SUCCESS", "README", ".hidden", "sub/d.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = b"" if name == "_SUCCESS" else json.dumps(ONE).encode() if name[0] in "apb" else b"%PDF-"
        (tmp_path / name).write_bytes(COMPRESS[".zst"](content) if name.endswith("zst") else content)
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    os.mkfifo(tmp_path / "pipe.txt")
    assert read(tmp_path) == ["one"] * 3

    def left_out(entry: Path, **options: tuple[str, ...]) -> list[str]:
        found = files_left_out([str(entry)], ReadOptions(**options))  # type: ignore[arg-type]
        return [str(Path(path).relative_to(tmp_path)) for path in found]

    expected = ["README", "_SUCCESS", "c.pdf", "link", "pipe.txt", "sub/d.bin"]
    assert left_out(tmp_path) == expected
    assert left_out(tmp_path, exclude=("*.pdf", "sub/*")) == ["README", "_SUCCESS", "link", "pipe.txt"]
    assert left_out(tmp_path, include=("*.ndjson",)) == []
    assert left_out(tmp_path / "*") == ["link", "pipe.txt", "sub"]
    described = ["dataset_info.json", "own.idx", "own.json", "state.json"]
    for name in described:
        (tmp_path / "sub" / name).write_text("{}")
    assert left_out(tmp_path) == [*expected, *(f"sub/{name}" for name in described)]
    assert left_out(tmp_path, include=("*.json",)) == []
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "absent")
    for entry in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match=r"gone\.jsonl is a link to a file that is missing; .*--exclude"):
            read(entry)
    assert read(tmp_path, exclude=("gone*",)) == ["one"] * 3


def test_the_tools_name_what_they_passed_over_and_refuse_input_without_text(run_tool: RunTool, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.pdf").write_bytes(b"%PDF-")
    (tmp_path / "in" / "b.jsonl").write_text(json.dumps(ONE))
    (tmp_path / "blank.txt").write_text("\n")
    for tool, options in (("prepare_data.py", ["--tokenizer", "bytes"]), ("train_tokenizer.py", ["--vocab-size", 260])):
        done = run_tool(tool, "in", "--output", f"in/{tool}", "--quiet", *options)
        assert done.returncode == 0 and "note: not read (1): in/a.pdf; " in done.stderr
        refused = run_tool(tool, "blank.txt", "--output", f"out/{tool}", "--quiet", *options)
        assert refused.returncode == 2 and refused.stderr.startswith("error: no text in blank.txt")
        assert len(refused.stderr.splitlines()) == 1 and not list(tmp_path.glob("out/*"))
        for path in tmp_path.glob("in/prepare_data.py.*"):
            path.unlink()
