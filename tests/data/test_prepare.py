"""Preparing corpora: the files, their independence of processes, and what a killed or wrong run leaves behind."""

import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from stagdist.data.indexed import read_description
from stagdist.data.prepare.encode import Encoder, write_parts
from stagdist.data.prepare.preparation import _partial_files, prepare
from stagdist.data.prepare.processes import Ranks
from stagdist.data.prepare.sources import PIECE_BYTES, ReadOptions, plan_pieces
from stagdist.data.tokenizer import Tokenizer, byte_tokenizer
from stagdist.errors import ConfigError, DataError
from tests.data.conftest import LIBRARY, ROOT, RunTool, tool_environment
from tests.ranks import Script, fork_script

ENDINGS = (".bin", ".idx", ".json")
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or ""
TWO_RANKS = (MPIRUN, "-n", "2", "--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else []))


def documents_of(prefix: Path | str, dtype: str) -> list[list[int]]:
    """Documents read by hand from the two files."""
    index = Path(f"{prefix}.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, boundaries = struct.unpack("<QBQQ", index[9:34])
    assert (version, code, boundaries) == (1, {"uint16": 8, "int32": 4}[dtype], sequences + 1)
    lengths = np.frombuffer(index, "<i4", sequences, 34)
    pointers = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    edges = np.frombuffer(index, "<i8", boundaries, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * boundaries and edges.tolist() == list(range(sequences + 1))
    tokens = np.fromfile(f"{prefix}.bin", dtype)
    starts = pointers // tokens.itemsize
    assert int(lengths.sum()) == len(tokens) and starts.tolist() == [0, *np.cumsum(lengths)[:-1].tolist()]
    return [
        tokens[start : start + length].tolist() for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_files_hold_every_document_once_in_a_shuffled_order(
    library_files: list[Path], bpe: Tokenizer, tmp_path: Path
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    texts = [text for path in library_files if (text := path.read_text(encoding="utf-8")).strip()]
    expected = [[*bpe.encode(text), bpe.end_of_document] for text in texts]
    inputs = [str(path) for path in library_files]
    done = prepare(inputs, str(tmp_path / "plain"), bpe, seed=None)
    assert documents_of(tmp_path / "plain", "uint16") == expected
    prepare(inputs, str(tmp_path / "mixed"), bpe, seed=7)
    mixed = documents_of(tmp_path / "mixed", "uint16")
    assert mixed != expected and sorted(mixed) == sorted(expected)
    prepare(inputs, str(tmp_path / "other"), bpe, seed=8)
    assert documents_of(tmp_path / "other", "uint16") != mixed

    theirs = IndexedDataset(str(tmp_path / "mixed"))
    assert [theirs[index].tolist() for index in range(len(theirs))] == mixed
    about = json.loads((tmp_path / "plain.json").read_text())
    assert about["documents"] == len(expected) == done.description.documents
    assert about["tokens"] == sum(map(len, expected)) and about["bytes"] == sum(len(text.encode()) for text in texts)
    assert about["max_token"] == max(map(max, expected)) and about["tokenizer_fingerprint"] == bpe.fingerprint
    assert done.skipped_empty == len(inputs) - len(expected)
    assert listing(tmp_path) == sorted(name + end for name in ("plain", "mixed", "other") for end in ENDINGS)


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import models

    vocab = {f"t{index}": index for index in range(66_000)} | {"</s>": 66_000}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    (tmp_path / "a.txt").write_text("t65999")
    prepare([str(tmp_path / "a.txt")], str(tmp_path / "c"), Tokenizer(backend.to_str(), "</s>"))
    assert documents_of(tmp_path / "c", "int32") == [[65_999, 66_000]]


# Every rank would load a saved one on its own, which takes 8 s; other tests prepare with one.
@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("saved", marks=pytest.mark.slow)])
def test_the_files_are_the_same_for_any_number_of_workers_and_ranks(
    run_tool: RunTool, bpe_directory: Path, tmp_path: Path, tokenizer: str
) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted((LIBRARY / "asyncio").glob("*.py"))]
    padding = "x" * (2 * PIECE_BYTES // len(texts))
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps({"text": text, "other": padding}) for text in texts))
    assert (tmp_path / "all.jsonl").stat().st_size > 2 * PIECE_BYTES, "the file is to be read in several pieces"
    given = bpe_directory if tokenizer == "saved" else tokenizer
    common = [tmp_path / "all.jsonl", LIBRARY / "json", "--tokenizer", given]
    launchers = {"one": None, "two": None} | ({"ranks": TWO_RANKS} if MPIRUN else {})
    for name, launcher in launchers.items():
        workers = ["--workers", "2" if name == "two" else "1"]
        done = run_tool("prepare_data.py", *common, "--output", f"out/{name}", *workers, launcher=launcher)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("documents") == 1
        assert "100%" in done.stderr, "a progress bar is shown"
    assert listing(tmp_path / "out") == sorted(name + end for name in launchers for end in ENDINGS)
    for name in launchers:
        for ending in ENDINGS:
            assert (tmp_path / f"out/{name}{ending}").read_bytes() == (tmp_path / f"out/one{ending}").read_bytes()
    if not MPIRUN:
        pytest.skip("mpirun is not installed; workers were compared, ranks were not")


def test_a_failing_rank_ends_all_ranks_with_one_clear_line(run_tool: RunTool, tmp_path: Path) -> None:
    if not MPIRUN:
        pytest.skip("mpirun is not installed")
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 1000)
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n' * 900 + "broken\n")
    done = run_tool(
        "prepare_data.py", "a.jsonl", "b.jsonl", "--output", "out/c", "--tokenizer", "bytes", "--quiet",
        launcher=TWO_RANKS,
    )  # fmt: skip
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error: b.jsonl is not JSON at byte 15300")]
    assert not any(name.endswith((".idx", ".bin")) for name in listing(tmp_path / "out"))


def test_a_killed_run_leaves_nothing_that_looks_whole_and_no_process(tmp_path: Path, run_tool: RunTool) -> None:
    out, given = tmp_path / "out", tmp_path / "given"
    given.mkdir()
    for number in range(4):
        (given / f"{number}.jsonl").write_text('{"text": "one of many documents"}\n' * 60_000)
    tool = ROOT / "tools" / "prepare_data.py"
    words = (str(given), "--tokenizer", "bytes", "--workers", "2", "--quiet", "--output", str(out / "c"))
    script = Script(tool, words, tmp_path, tmp_path / "printed", tmp_path / "errors")
    part, tokens = "c.*.part00000.partial", "c.*.bin.partial"
    endings = (part, signal.SIGTERM), (part, signal.SIGHUP), (part, signal.SIGKILL), (tokens, signal.SIGKILL)
    started: list[psutil.Process] = []
    for wait_for, ending in endings:
        (process,) = fork_script(script, None)
        assert process.pid is not None
        deadline = time.monotonic() + 60
        while not list(out.glob(wait_for)) and process.exitcode is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert process.exitcode is None, "the run was over before it could be killed"
        started += psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, ending)
        process.join(60)
        killed = ending == signal.SIGKILL
        assert process.exitcode == (-ending if killed else 130), "the run was over before it could be killed"
        left = listing(out)
        assert bool(list(out.glob(wait_for))) == killed and all(name.endswith(".partial") for name in left)
    assert len(started) >= 6, "the workers of three runs"
    _, outliving = psutil.wait_procs(started, timeout=20)
    assert not outliving, "workers outlive the process that started them"
    (out / "c.part00077.partial").write_bytes(b"of more ranks")
    for path in given.iterdir():  # this run needs no time to be killed in
        path.write_text('{"text": "one document"}\n')
    done = run_tool(tool.name, *words)
    assert done.returncode == 0, done.stderr
    assert listing(out) == ["c" + ending for ending in ENDINGS]


def test_of_two_runs_at_once_the_second_ends_the_first_and_is_not_harmed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the text of the second run")
    (tmp_path / "c.other.bin.partial").touch()  # of the output c.other
    with (
        pytest.raises(DataError, match="cannot prepare .*another run with this --output has removed it"),
        _partial_files(str(tmp_path / "c"), Ranks()) as first,
    ):
        Path(f"{first}.bin.partial").write_text("the first run")
        with _partial_files(str(tmp_path / "c"), Ranks()) as second:
            Path(f"{second}.bin.partial").touch()
            assert listing(tmp_path) == ["a.txt", f"{Path(second).name}.bin.partial", "c.other.bin.partial"]
        prepare([str(tmp_path / "a.txt")], str(tmp_path / "c"), byte_tokenizer())
        Path(f"{first}.bin.partial").rename(tmp_path / "c.bin")
    assert documents_of(tmp_path / "c", "uint16") == [[*b"the text of the second run", 256]]
    assert listing(tmp_path) == ["a.txt", "c.bin", "c.idx", "c.json", "c.other.bin.partial"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_the_index_is_renamed_last_also_over_an_old_corpus(tmp_path: Path, renames: int) -> None:
    (tmp_path / "a.txt").write_text("the old text")
    prepare([str(tmp_path / "a.txt")], str(tmp_path / "out" / "c"), byte_tokenizer())
    (tmp_path / "a.txt").write_text("the new text, which is longer")
    script = (
        "import os, signal, sys\n"
        "from stagdist.data.prepare.preparation import prepare\n"
        "from stagdist.data.tokenizer import byte_tokenizer\n"
        "real, left = os.replace, [int(sys.argv[1])]\n"
        "def replace(old, new):\n"
        "    if left[0] == 0:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    left[0] -= 1\n"
        "    real(old, new)\n"
        "os.replace = replace\n"
        "prepare(['a.txt'], 'out/c', byte_tokenizer(), overwrite=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(renames)], cwd=tmp_path, env=tool_environment())
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "c.idx").exists()
    prepare([str(tmp_path / "a.txt")], str(tmp_path / "out" / "c"), byte_tokenizer())
    assert documents_of(tmp_path / "out" / "c", "uint16") == [[*b"the new text, which is longer", 256]]
    assert listing(tmp_path / "out") == ["c" + ending for ending in ENDINGS]


def test_a_killed_worker_ends_the_run_with_the_remedy(tmp_path: Path) -> None:
    for name in "abcdefgh":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "some text"}\n' * 20_000)
    pieces = plan_pieces([str(tmp_path)], ReadOptions())
    paths = [tmp_path / f"{number}.partial" for number in range(len(pieces))]
    encoder = Encoder(ReadOptions(), byte_tokenizer(), np.uint16)
    parts = write_parts(encoder, [[piece] for piece in pieces], paths, workers=2)
    next(parts)
    victims = multiprocessing.active_children()
    assert len(victims) == 2
    for victim in victims:
        victim.kill()
        victim.join()
    with pytest.raises(DataError, match="fewer --workers"):
        list(parts)


def test_an_error_ends_the_workers_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("no JSON")
    (tmp_path / "b.jsonl").write_text('{"text": "some text"}\n' * 1_000_000)
    runs = [[piece] for piece in plan_pieces([str(tmp_path)], ReadOptions(), piece_bytes=1 << 30)]
    encoder = Encoder(ReadOptions(), byte_tokenizer(), np.uint16)
    with pytest.raises(DataError, match=r"a\.jsonl is not JSON"):
        list(write_parts(encoder, runs, [tmp_path / "0.partial", tmp_path / "1.partial"], workers=2))
    written = sum(path.stat().st_size for path in tmp_path.glob("1.partial"))
    assert written < 1_000_000 * 20 and not multiprocessing.active_children()


def test_an_existing_corpus_is_kept_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    prefix = str(tmp_path / "c")
    prepare([str(tmp_path / "a.txt")], prefix, byte_tokenizer())
    (tmp_path / "a.txt").write_text("second")
    with pytest.raises(ConfigError, match="exists; choose another --output, or --overwrite"):
        prepare([str(tmp_path / "a.txt")], prefix, byte_tokenizer())
    assert documents_of(prefix, "uint16") == [[*b"first", 256]]
    prepare([str(tmp_path / "a.txt")], prefix, byte_tokenizer(), overwrite=True)
    assert documents_of(prefix, "uint16") == [[*b"second", 256]]


@pytest.mark.parametrize("given", [" corpus", ". ./corpus", ".. ../corpus", "o/ o/corpus", "a.bin a"])
def test_an_output_without_a_name_is_refused(given: str) -> None:
    output, example = given.split(" ")
    with pytest.raises(ConfigError, match=rf"'{output}' is not the beginning of a file's name; give {example} for"):
        prepare([], output, byte_tokenizer())


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 10_000)
    script = (
        "import resource, signal\n"
        "from stagdist.data.prepare.preparation import prepare\n"
        "from stagdist.data.tokenizer import byte_tokenizer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "prepare(['a.txt'], 'out/c', byte_tokenizer())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=tool_environment(), capture_output=True, text=True
    )
    assert "DataError: cannot prepare out/c: [Errno 27] File too large" in done.stderr
    assert listing(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.txt", "--tokenizer", "bytes"], "absent.txt does not exist; give a file"),
        (["empty.txt", "--tokenizer", "bytes"], "no text in empty.txt"),
        (["blank.jsonl", "--tokenizer", "bytes"], r"no text in blank.jsonl (2 documents were left out)"),
        (["a.txt", "--tokenizer", "absent"], "tokenizer absent does not exist; give `bytes`"),
        (["latin.txt", "--tokenizer", "bytes"], "latin.txt is not UTF-8"),
        (["keys.jsonl", "--tokenizer", "bytes"], "choose with --text-key"),
        (["keys.jsonl", "a.txt", "--tokenizer", "bytes", "--workers", "2"], "choose with --text-key"),
        (["a.txt", "--tokenizer", "bytes", "--workers", "0"], "--workers is 0"),
        (["nobody/nothing", "--tokenizer", "bytes"], "cannot load the dataset nobody/nothing"),
        (["/dev/null", "--tokenizer", "bytes"], "/dev/null is a pipe or a device; write its content to a file"),
    ],
)
def test_bad_input_is_one_line_and_code_2_and_writes_nothing(
    run_tool: RunTool, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "keys.jsonl").write_text('{"content": "x"}\n')
    done = run_tool("prepare_data.py", *arguments, "--output", "out/c", "--quiet")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() or listing(tmp_path / "out") == []


def test_paths_that_are_not_utf8_are_read_written_and_described(run_tool: RunTool, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\n")
    (tmp_path / f"{name}.txt").write_text("some text")
    done = run_tool("prepare_data.py", f"{name}.txt", "--output", name, "--tokenizer", "bytes", "--quiet")
    assert done.returncode == 0 and done.stdout.startswith("caf\\udce9\n: 1 documents"), done.stderr
    description = read_description(str(tmp_path / name))
    assert description is not None and description.sources == ("caf?\n.txt",)


def test_the_tokenizer_tool_trains_what_prepare_takes(run_tool: RunTool, tmp_path: Path) -> None:
    done = run_tool("train_tokenizer.py", LIBRARY / "json", "--output", "tok", "--vocab-size", 600, "--quiet")
    assert done.returncode == 0 and "600 tokens" in done.stdout, done.stderr
    done = run_tool("prepare_data.py", LIBRARY / "json", "--output", "out/c", "--tokenizer", "tok", "--quiet")
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "out" / "c.json").read_text())
    assert about["vocab_size"] == 600 and about["tokenizer"] == "tok" and about["bytes"] > 1.5 * about["tokens"]
    refused = run_tool("train_tokenizer.py", LIBRARY / "json", "--output", "tok", "--vocab-size", 300)
    assert refused.returncode == 2 and "or --overwrite" in refused.stderr
    small = run_tool("train_tokenizer.py", LIBRARY / "json", "--output", "tiny", "--vocab-size", 100)
    assert small.returncode == 2 and "below 257" in small.stderr and not (tmp_path / "tiny").exists()


def test_the_tokenizer_tool_reads_an_even_sample_of_much_text(run_tool: RunTool, tmp_path: Path) -> None:
    for index, letter in enumerate("abcdefgh"):
        (tmp_path / f"{index}.jsonl").write_text(json.dumps({"text": (letter * 8 + " ") * 2000}) + "\n")
    options = ("--vocab-size", 400, "--max-megabytes", 0.0725, "--quiet")
    done = run_tool("train_tokenizer.py", "[0-9].jsonl", "--output", "tok", *options)
    assert done.returncode == 0, done.stderr
    vocab = json.loads((tmp_path / "tok" / "tokenizer.json").read_text())["model"]["vocab"]
    assert {letter for letter in "abcdefgh" if letter * 8 in vocab} == set("aceg")


@pytest.mark.parametrize("name", ["prepare_data.py", "train_tokenizer.py"])
def test_help_teaches_by_examples(run_tool: RunTool, name: str) -> None:
    done = run_tool(name, "--help", launcher=())
    assert done.returncode == 0 and "examples:" in done.stdout and f"python tools/{name}" in done.stdout
