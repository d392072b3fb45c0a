"""Arguments and reporting that the data tools share."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields

from stagdist.data.prepare.sources import ReadOptions, listed
from stagdist.errors import StagdistError


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select input and turn it into documents."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="file (.jsonl, .ndjson, .json, .parquet, .arrow, .txt, .md, .py or other text; .gz, .bz2, .xz and .zst "
        "are decompressed; without a known suffix, the content decides), directory (searched for such files; hidden "
        "ones are skipped, others named at the end), quoted glob, URL of fsspec (s3://, gs://, ...), or a dataset of "
        "the Hugging Face Hub: owner/name or hub:NAME",
    )
    reading = parser.add_argument_group("how input becomes documents")
    reading.add_argument("--text-key", default="text", metavar="KEY", help="JSON key or column (default: text)")
    reading.add_argument(
        "--txt-documents",
        choices=("auto", "file", "paragraph", "line"),
        default="auto",
        help="what a document is in plain text; auto (default): a file, but files above 256 KiB are cut at blank "
        "lines about every 16 KiB, so that they can be shuffled and split",
    )
    reading.add_argument(
        "--bad-utf8",
        choices=("error", "skip", "replace"),
        default="error",
        help="documents that are not UTF-8: stop (default), leave them out, or put U+FFFD for the bad bytes",
    )
    reading.add_argument(
        "--include", action="append", default=[], metavar="GLOB", help="of a directory only these files; repeatable"
    )
    reading.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="leave these files out; repeatable"
    )
    reading.add_argument("--split-name", default="train", metavar="NAME", help="split of a Hub dataset (train)")
    reading.add_argument("--config-name", metavar="NAME", help="configuration of a Hub dataset")
    reading.add_argument(
        "--streaming",
        action="store_true",
        help="read a Hub dataset over the network instead of downloading it first (files are never held in memory)",
    )


def reading_options(arguments: argparse.Namespace) -> ReadOptions:
    """The options in the parsed arguments."""
    values = {field.name: getattr(arguments, field.name) for field in fields(ReadOptions)}
    return ReadOptions(**values | {"include": tuple(arguments.include), "exclude": tuple(arguments.exclude)})


def report_left_out(left_out: Sequence[str]) -> None:
    """Name what was not read in directories and globs, on standard error."""
    if left_out:
        remedy = "give them by name, or choose with --include and --exclude"
        print(f"note: not read ({len(left_out)}): {listed(left_out)}; {remedy}", file=sys.stderr)


def run_tool(action: Callable[[], None], on_failure: Callable[[], object] = lambda: None) -> int:
    """Exit code of a tool; a user error becomes one line on standard error and code 2.

    Args:
        on_failure: called after any failure, also an unexpected one.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths that are not UTF-8
    for number in (signal.SIGTERM, signal.SIGHUP):  # a scheduler, a lost connection: temporary files are removed
        if signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
            signal.signal(number, signal.default_int_handler)
    try:
        action()
        return 0
    except (StagdistError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # a launcher ends the other ranks like this
            print("error: interrupted; nothing was written", file=sys.stderr, flush=True)
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    on_failure()
    return code
