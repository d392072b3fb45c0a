"""Evaluate a model: perplexity and bits per byte of a text, or tasks of lm-evaluation-harness."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from stagdist.data.prepare.arguments import run_tool
from stagdist.errors import ConfigError, StagdistError
from stagdist.parallel.ranks_parser import OTHERS_WAIT_S, RanksParser
from stagdist.parallel.world import join_launcher

EXAMPLES = """\
examples:
  python tools/evaluate.py perplexity --model runs/quickstart/model --text book.txt --json score.json
  the newest checkpoint of a run; every token has at least 384 tokens of context:
    python tools/evaluate.py perplexity --model runs/quickstart --text book.txt --window 512 --stride 128
  a model too large for one device; two groups of four divide the text (torchrun works too):
    deepspeed --num_accelerators 8 tools/evaluate.py perplexity --model DIR --text book.txt --tensor-parallel-size 4
  tasks of lm-evaluation-harness (pip install -c constraints.txt -e '.[eval]'), built in or from files:
    python tools/evaluate.py harness --model DIR --tasks hellaswag,arc_easy --json results.json
    python tools/evaluate.py harness --model DIR --tasks local_mc --include-path tasks/ --limit 100
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; DeepSpeed's launcher adds --local_rank.

    Raises:
        ConfigError: it is invalid.
    """
    parser = RanksParser(
        prog="evaluate.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_perplexity(verbs.add_parser("perplexity", help="how well a model predicts a text file"))
    _add_harness(verbs.add_parser("harness", help="tasks of lm-evaluation-harness"))
    return parser.parse_args(arguments)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows per forward pass (default: 8)")
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of the computation (default: of the stored weights)"
    )


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    parser.description = "Score a text as one document. The first token has no context and is not scored."
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="model directory, training checkpoint, or the folder of a run (its newest complete checkpoint)",
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text, may be compressed")
    parser.add_argument("--window", type=int, metavar="N", help="tokens seen at once (default: the model's maximum)")
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens between window starts (default: the window, no overlap)"
    )
    parser.add_argument("--tokenizer", metavar="DIR|bytes", help="default: the tokenizer of the model or of the run")
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="processes that split every matrix; groups of this size divide the text (default: 1)",
    )
    parser.add_argument(
        "--weights",
        choices=("int8",),
        help="round matrices as --weights of launch/generate.py does, and score by the decoding engine's layers",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_common(parser)


def _add_harness(parser: argparse.ArgumentParser) -> None:
    parser.description = "Run tasks of lm-evaluation-harness on a model directory, in one process."
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="model directory, or the folder of a run that contains one"
    )
    parser.add_argument("--tasks", required=True, metavar="A,B", help="names of tasks or groups")
    parser.add_argument("--include-path", metavar="DIR", help="folder with your own task files")
    parser.add_argument("--limit", type=float, metavar="N", help="documents per task, or a fraction of them if below 1")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each document")
    _add_common(parser)


def perplexity(arguments: argparse.Namespace) -> dict[str, Any]:
    """Score the text and print the result."""
    from stagdist.telemetry.logging import setup_logging

    setup_logging(_rank(), None)
    from stagdist.evaluation.perplexity import Scoring, score_file

    scoring = Scoring(
        **{key: getattr(arguments, key) for key in ("window", "stride", "batch_size", "dtype", "device", "tokenizer")},
        tensor_parallel_size=arguments.tensor_parallel_size,
    )
    open_nats = None
    if arguments.weights is not None:
        from stagdist.decode.prompt_nats import PromptNats

        open_nats = partial(PromptNats, weights=arguments.weights)
    started = time.monotonic()
    scored = score_file(arguments.model, arguments.text, scoring, _progress(arguments.quiet or _rank() > 0), open_nats)
    score = scored.score
    result = {
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "nats_per_token": score.nats / score.tokens,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "window": scored.window,
        "stride": scored.stride,
        "model": arguments.model,
        "text": arguments.text,
        "seconds": time.monotonic() - started,
        "settings": asdict(scoring) | {"weights": arguments.weights},
    }
    if _rank() == 0:
        print(
            f"{arguments.text}: {score.bits_per_byte:.4f} bits per byte, perplexity {score.perplexity:.3f} over "
            f"{score.tokens} tokens, {score.bytes} bytes (window {scored.window}, stride {scored.stride})"
        )
    return result


def harness(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the tasks and print the table of the harness."""
    if join_launcher().size > 1:
        raise ConfigError("harness runs in one process; start it without a launcher")
    from stagdist.evaluation.harness import run_tasks

    results = run_tasks(
        arguments.model,
        [name for name in arguments.tasks.split(",") if name],
        dtype=arguments.dtype or "auto",
        **{key: getattr(arguments, key) for key in ("include_path", "limit", "num_fewshot", "batch_size", "device")},
    )
    from lm_eval.utils import make_table  # `run_tasks` has checked that it is installed

    print(make_table(results))
    return results


def run(arguments: argparse.Namespace) -> None:
    """Evaluate; rank 0 writes the result."""
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ConfigError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    if arguments.json is not None and arguments.json.is_dir():
        raise ConfigError(f"--json {arguments.json} is a folder; give a file in it")
    result = {"perplexity": perplexity, "harness": harness}[arguments.verb](arguments)
    if arguments.json is not None and _rank() == 0:
        arguments.json.write_text(json.dumps(result, indent=2, default=str) + "\n")


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _progress(hidden: bool) -> Callable[[int, int], None]:
    from tqdm import tqdm

    # The delay: an error before the first window is not printed into the bar.
    bar = tqdm(unit="window", disable=hidden, leave=False, delay=1e-3)

    def report(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return report


def main() -> int:
    """Entry point; returns the exit code."""
    try:
        arguments = parse()
    except ConfigError as error:
        if _rank() == 0:  # the same on every rank
            print(f"error: {error}", file=sys.stderr)
        return 2

    def action() -> None:
        try:
            join_launcher().share_cores()  # before torch is imported
            run(arguments)
        except (StagdistError, OSError):
            # Rank 0 reports immediately. The others wait, so that the launcher normally stops them first, but an error
            # that only they have met is still reported.
            if _rank() > 0:
                time.sleep(OTHERS_WAIT_S)
            raise

    return run_tool(action)


if __name__ == "__main__":
    sys.exit(main())
