"""Train a byte-level BPE tokenizer on text."""

import argparse
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from stagdist.data.prepare.arguments import add_reading_arguments, reading_options, report_left_out, run_tool
from stagdist.data.prepare.documents import Reader
from stagdist.data.prepare.sources import Piece, files_left_out, listed, plan_pieces
from stagdist.data.tokenizer import train_bpe
from stagdist.errors import ConfigError, DataError
from stagdist.parallel.ranks_parser import OneLineParser

MAX_VOCAB_SIZE = 10_000_000
"""Largest vocabulary; tables of this size are allocated at the start."""

EXAMPLES = """\
examples:
  python tools/train_tokenizer.py book.txt notes/ --output data/tokenizer --vocab-size 8192
  python tools/train_tokenizer.py 'dump/*.jsonl' --text-key content --output data/tokenizer --vocab-size 32768

The directory loads with transformers' AutoTokenizer and goes to tools/prepare_data.py as --tokenizer. A vocabulary
that is a multiple of 128 suits tensor parallelism. Of more text than --max-megabytes an even sample is read.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--vocab-size", required=True, type=int, metavar="N", help="tokens, with 256 bytes and the end of a document"
    )
    parser.add_argument(
        "--max-megabytes", type=float, default=1000.0, metavar="MB", help="text to read at most (default: 1000)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_reading_arguments(parser)
    parsed = parser.parse_args(arguments)
    if not parsed.max_megabytes > 0:
        parser.error(f"--max-megabytes {parsed.max_megabytes} must be above 0")
    if parsed.vocab_size > MAX_VOCAB_SIZE:
        parser.error(f"--vocab-size {parsed.vocab_size} must be at most {MAX_VOCAB_SIZE}")
    return parsed


def sample(pieces: Sequence[Piece], limit: float) -> list[Piece]:
    """Pieces spread evenly over the input whose sizes add up to about `limit` at most, one at least."""
    total = sum(piece.size for piece in pieces)
    if total <= limit:
        return list(pieces)
    count = max(1, int(len(pieces) * limit / total))
    return [pieces[index * len(pieces) // count] for index in range(count)]


def run(arguments: argparse.Namespace) -> None:
    """Train, save, and say what came out."""
    if Path(arguments.output, "tokenizer.json").exists() and not arguments.overwrite:
        raise ConfigError(f"{arguments.output}/tokenizer.json exists; choose another --output, or --overwrite")
    if Path(arguments.output).is_file():
        raise ConfigError(f"--output {arguments.output} is a file; give a directory")
    options = reading_options(arguments)
    left_out = files_left_out(arguments.inputs, options)
    pieces = sample(plan_pieces(arguments.inputs, options), arguments.max_megabytes * 1e6)
    texts = Reader(options).documents(pieces)
    first = next(texts, None)
    if first is None:
        raise DataError(f"no text in {listed(arguments.inputs)}; nothing was written")
    tokenizer = train_bpe(chain([first], texts), arguments.vocab_size, show_progress=not arguments.quiet)
    tokenizer.save(arguments.output)
    short = ""
    if tokenizer.vocab_size < arguments.vocab_size:
        short = f" (not {arguments.vocab_size}: the text holds no more pairs to merge)"
    print(f"{arguments.output}: {tokenizer.vocab_size} tokens{short}, fingerprint {tokenizer.fingerprint[:12]}")
    report_left_out(left_out)


def main() -> int:
    """Entry point; returns the exit code."""
    arguments = parse()
    return run_tool(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
