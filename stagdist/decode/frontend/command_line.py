"""What the commands that run a model have in common: options, and how a rank ends. Imports no framework."""

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stagdist.errors import CheckpointError, ConfigError, DataError, StagdistError
from stagdist.parallel.ranks_parser import RanksParser, reports_error

_FIELDS = {
    "stop_token_id": "stop_token_ids",
    "allowed_token_id": "allowed_token_ids",
    "ignore_eos": "ignore_end_of_document",
    "batch_size": "num_slots",
    "prefill_chunk": "chunk_size",
    "timeout": "timeout_s",
    "margins": "want_margins",
}
"""Fields of `SamplingParams` and `EngineOptions` with other names than the options that set them."""


def model_parser(prog: str, description: str | None, epilog: str) -> RanksParser:
    """A parser with `--model`; DeepSpeed's launcher adds --local_rank."""
    parser = RanksParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model directory")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def add_running_options(parser: RanksParser, *, slots: int, timeout_s: float, what: str) -> Callable[..., Any]:
    """Add the options that say how a model is run; returns the function that adds more to their group.

    Args:
        slots: default of --batch-size.
        timeout_s: default of --timeout.
        what: what is decoded together, for the help.
    """
    add = parser.add_argument_group("running").add_argument
    add("--tensor-parallel-size", type=int, default=1, metavar="T", help="processes per section (default 1)")
    add("--head", choices=["last", "sharded"], default="last", help="on the last stage, or spread over all (last)")
    together = f"{what} decoded together (default {slots})"
    add("--batch-size", type=int, default=slots, metavar="SLOTS", help=together)
    add("--max-context", type=int, metavar="N", help="positions of prompt and answer (default: the model's)")
    add("--prefill-chunk", type=int, default=128, metavar="N", help="prompt positions at a time (default 128)")
    add("--precision", choices=["fp32", "bf16", "fp16", "fp64"], help="of weights and sums (bf16 on a GPU, else fp32)")
    rounded = "round all matrices but the embedding to 8 bits (default: weights have the precision)"
    add("--weights", choices=["int8"], help=rounded)
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, or cuda:N for all ranks (auto)")
    add("--recurrent", action="store_true", help="skip section 1 while decoding (two sections with shared weights)")
    limit = f"limit in seconds for waiting on a rank (default {timeout_s:g})"
    add("--timeout", type=float, default=timeout_s, metavar="S", help=limit)
    return add


def from_options(kind: Any, arguments: argparse.Namespace) -> Any:
    """A dataclass with the values of the options that are named like its fields, or renamed in `_FIELDS`."""
    given = {_FIELDS.get(name, name): value for name, value in vars(arguments).items()}
    return kind(**{field.name: given[field.name] for field in dataclasses.fields(kind) if field.name in given})


def say(text: str) -> None:
    """Write a line to standard error, which answers do not use."""
    print(text, file=sys.stderr, flush=True)


def run_rank(main: Callable[[], int]) -> None:
    """Run the `main` of a script on this rank and end the process with its exit code; 130: Ctrl-C; 141: broken pipe."""
    try:
        code = main()
        sys.stdout.flush()
    except SystemExit as end:  # --help
        sys.stdout.flush()
        sys.exit(end.code)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 141
    sys.stderr.flush()
    # Peers may block in a collective and a thread on standard input; a normal exit would wait for them.
    os._exit(code)


def exit_code(command: Callable[[], int]) -> int:
    """Run a command and print its error. 2: invalid arguments, model or configuration; 1: another error."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    try:
        return command()
    except StagdistError as error:
        if reports_error(error, rank_1_reports_lost_peer=True):
            say(f"error: {error}")
        return 2 if isinstance(error, ConfigError | DataError | CheckpointError) else 1
    except Exception:
        traceback.print_exc()
        return 1
