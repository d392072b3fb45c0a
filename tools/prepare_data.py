"""Prepare a corpus for training: text in, PREFIX.bin, PREFIX.idx and PREFIX.json out."""

import argparse
import os
import sys

from stagdist.data.prepare.arguments import add_reading_arguments, reading_options, report_left_out, run_tool
from stagdist.data.prepare.preparation import prepare
from stagdist.data.prepare.processes import Ranks, current_ranks
from stagdist.data.prepare.sources import files_left_out
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.parallel.ranks_parser import OneLineParser

EXAMPLES = """\
examples:
  one token per byte, nothing to set up first:
    python tools/prepare_data.py book.txt notes/ --output data/books --tokenizer bytes
  a tokenizer of your own (tools/train_tokenizer.py) or of any Hugging Face model you have:
    python tools/prepare_data.py 'dump/*.jsonl' --text-key content --output data/dump --tokenizer data/tokenizer
  a data set of the Hub, without downloading it first:
    python tools/prepare_data.py roneneldan/TinyStories --streaming --output data/stories --tokenizer data/tokenizer
  a large corpus on many machines that share a file system:
    mpirun -n 64 --hostfile hosts python tools/prepare_data.py '/nfs/crawl/*.jsonl' --output /nfs/crawl_tokens \\
        --tokenizer /nfs/tokenizer

Each document becomes one item: the special tokens that the tokenizer puts before a text, if it has any, the text, and
the end-of-document token. Documents are shuffled. The format is that of Megatron-LM and GPT-NeoX. Whatever the number
of workers and ranks, the files are the same byte for byte. They are written under temporary names and renamed at the
end: if PREFIX.idx exists, the corpus is complete. While it runs, the disk holds the tokens twice; memory grows by 28
bytes per document. Then set data.corpora to PREFIX in the configuration.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the corpus without ending")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR|bytes",
        help="directory with Hugging Face tokenizer files, a tokenizer.json, or `bytes`",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="tokenizing processes of each rank (default: one per core; under mpirun 1)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the order of documents (default: 1234)")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the order of the input")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_reading_arguments(parser)
    parsed = parser.parse_args(arguments)
    if not 0 <= parsed.seed < 2**32:
        parser.error(f"--seed {parsed.seed} must be between 0 and {2**32 - 1}")
    return parsed


def run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Prepare the corpus and print its size."""
    default_workers = 1 if ranks.size > 1 else len(os.sched_getaffinity(0))
    options = reading_options(arguments)
    left_out = files_left_out(arguments.inputs, options) if ranks.rank == 0 else []
    prepared = prepare(
        arguments.inputs,
        arguments.output,
        load_tokenizer(arguments.tokenizer),
        options=options,
        tokenizer_source=arguments.tokenizer,
        workers=default_workers if arguments.workers is None else arguments.workers,
        seed=None if arguments.no_shuffle else arguments.seed,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
        ranks=ranks,
    )
    if ranks.rank == 0:
        corpus = prepared.description
        print(
            f"{arguments.output}: {corpus.documents} documents, {corpus.tokens} tokens, {corpus.bytes} bytes of text "
            f"({corpus.bytes / corpus.tokens:.2f} per token); left out: {prepared.skipped_empty} empty, "
            f"{prepared.skipped_bad} not UTF-8"
        )
        report_left_out(left_out)


def main() -> int:
    """Entry point; returns the exit code."""
    arguments = parse()
    ranks: list[Ranks] = [Ranks()]

    def action() -> None:
        ranks[0] = current_ranks()
        run(arguments, ranks[0])

    return run_tool(action, on_failure=lambda: ranks[0].abort())


if __name__ == "__main__":
    sys.exit(main())
