"""Wrong paths and numbers on the command lines of launch/ and tools/: one line of error, code 2, nothing written."""

import importlib
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from launch.run import parse_arguments
from stagdist.cluster.supervision.options import options_of
from stagdist.errors import ConfigError
from stagdist.serving.http_child import MODULE as HTTP_PROCESS
from tests.fuzz.mutations import Outcome, run_main
from tests.launch.runs import tiny_config
from tests.ranks import free_port

BAD_PATHS = {
    "missing": "absent/name",
    "empty": "",
    "long": "x" * 300,
    "long folder": "y" * 300 + "/name",
    "broken link": "broken",
    "loop of links": "loop",
    "below a file": "text.txt/name",
    "below a loop": "loop/name",
}
"""Paths that no file can be read from."""

PORT = free_port()
FILES = [
    "launch.pretrain --dry-run --config PATH",
    "launch.pretrain --config PATH",
    "launch.pretrain --config run.yaml --set data.tokenizer=PATH",
    "launch.pretrain --config run.yaml --set data.corpora.0.prefix=PATH",
    "launch.doctor --hostfile PATH",
    "launch.doctor --config PATH",
    "launch.serve --model folder --api-key-file PATH",
    "launch.serve --model folder --chat-template PATH",
    "tools.prepare_data PATH --output out --tokenizer bytes",
    "tools.prepare_data text.txt --output out --tokenizer PATH",
    "tools.train_tokenizer PATH --output out --vocab-size 300",
    "tools.convert_checkpoint verify folder folder --text PATH",
]
FOLDERS = [
    "launch.generate --model PATH --prompt a",
    f"launch.serve --port {PORT} --model PATH",
    "tools.evaluate perplexity --model PATH --text text.txt",
    *(f"tools.convert_checkpoint {verb}" for verb in (
        "export PATH out", "import PATH out", "split PATH out", "merge PATH PATH out",
        "upcycle PATH out --section-layers 1 1", "inspect PATH", "verify PATH folder", "verify folder PATH",
    )),
]  # fmt: skip
OUTPUTS = [
    "tools.prepare_data text.txt --output PATH --tokenizer bytes",
    "tools.train_tokenizer text.txt --output PATH --vocab-size 300",
    "launch.doctor --json PATH",
    "launch.doctor --write-env PATH",
    "tools.evaluate perplexity --model folder --text text.txt --json PATH",
]
NUMBERS = [
    "launch.doctor --num-ranks",
    "launch.doctor --write-mib",
    "launch.doctor --time-limit",
    "tools.prepare_data text.txt --output out --tokenizer bytes --workers",
    "tools.train_tokenizer text.txt --output out --vocab-size",
    "tools.train_tokenizer text.txt --output out --vocab-size 300 --max-megabytes",
    "tools.evaluate perplexity --model folder --text text.txt --window",
    "tools.evaluate perplexity --model folder --text text.txt --stride",
    "tools.evaluate perplexity --model folder --text text.txt --batch-size",
    "tools.evaluate perplexity --model folder --text text.txt --tensor-parallel-size",
    *(f"launch.generate --model folder --prompt a --{name}" for name in (
        "max-new-tokens", "temperature", "top-k", "top-p", "min-p", "repetition-penalty", "seed", "stop-token-id",
        "logprobs", "tensor-parallel-size", "batch-size", "max-context", "prefill-chunk", "timeout",
    )),
    *(f"launch.serve --model folder --port {PORT} --{name}" for name in (
        "port", "batch-size", "max-context", "prefill-chunk", "tensor-parallel-size", "timeout", "keep-alive-s",
        "inter-token-target-ms", "max-body-mib", "max-queued-requests", "max-queued-tokens", "drain-timeout-s",
        "hang-timeout-s", "restart-timeout-s",
    )),
    *(f"tools.convert_checkpoint {one}" for one in (
        "upcycle folder out --section-layers", "upcycle folder out --section-layers 1 --output-scale",
        "verify folder folder --tokens", "verify folder folder --tolerance",
    )),
]  # fmt: skip

MAY_BE_HUGE = ("tools.prepare_data", "tools.train_tokenizer text.txt --output out --vocab-size 300 --max-megabytes")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, in which nothing may be left."""
    (tmp_path / "text.txt").write_text("Some text. " * 30)
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_config(Path("corpus"), "run")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = sorted(tmp_path.rglob("*"))
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert sorted(tmp_path.rglob("*")) == before
    assert not [one for one in psutil.Process().children() if HTTP_PROCESS in one.cmdline()]


def command(line: str, path: str = "") -> Outcome:
    """Run the `main` of `package.module` with arguments; PATH stands for the path."""
    module, *words = line.split()
    return run_main(importlib.import_module(module).main, *(word.replace("PATH", path) for word in words))


@pytest.mark.parametrize("kind", BAD_PATHS)
@pytest.mark.parametrize("line", FILES + FOLDERS)
def test_paths_that_cannot_be_read_are_refused(line: str, kind: str) -> None:
    outcome = command(line, BAD_PATHS[kind])
    if line.startswith("tools.convert_checkpoint inspect") and outcome.code == 1:
        assert not outcome.errors and "problem" in outcome.output
        return
    outcome.assert_refused()


@pytest.mark.parametrize("kind", BAD_PATHS)
@pytest.mark.parametrize(
    "words",
    ["--hostfile PATH -- launch/pretrain.py --config run.yaml", "-- PATH", "-- launch/pretrain.py --config PATH"],
)
def test_the_supervisor_refuses_paths_that_cannot_be_read(words: str, kind: str) -> None:
    """Without its `main`, which writes to the file descriptors of the process."""
    arguments = parse_arguments([word.replace("PATH", BAD_PATHS[kind]) for word in words.split()])
    with pytest.raises(ConfigError) as refused:
        options_of(arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("line", FILES)
def test_a_folder_is_no_file(line: str) -> None:
    command(line, "folder").assert_refused()


@pytest.mark.parametrize("line", FOLDERS)
def test_a_file_is_no_folder(line: str) -> None:
    command(line, "text.txt").assert_refused()


@pytest.mark.parametrize("path", ["text.txt/name", "loop/name", "y" * 300 + "/name", "x" * 300])
@pytest.mark.parametrize("line", OUTPUTS)
def test_places_that_cannot_be_written_are_refused(line: str, path: str) -> None:
    command(line, path).assert_refused()


@pytest.mark.parametrize("line", NUMBERS)
def test_numbers_out_of_range_are_refused(line: str) -> None:
    for value in ("-1", "nan", "", "1x", *([] if line.startswith(MAY_BE_HUGE) else ["9" * 30])):
        command(f"{line}={value}" if line.split()[-1].startswith("--") else f"{line} {value}").assert_refused()


@pytest.mark.parametrize("value", ["-1", "0", "9" * 30])
def test_a_dry_run_names_a_number_of_ranks_that_does_not_fit(value: str) -> None:
    outcome = command(f"launch.pretrain --dry-run --config run.yaml --world-size={value}")
    assert outcome.code == 2 and not outcome.errors
    assert "This run would not start" in outcome.output and f"world size {value}" in outcome.output
