#!/usr/bin/env python3
"""Benchmarks: `python launch/bench.py train --json FILE`, `deepspeed --num_accelerators 2 launch/bench.py decode`.

`decode` runs on the processes that a launcher started; the others start their own on this machine.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BENCHMARKS = {
    "train": "speed of training: pipeline against one process, its bound and torch.distributed.pipelining",
    "memory": "memory of training: the dry run's plan against the peak of real ranks",
    "save": "what saving costs training: waiting for the disk against writing beside the training",
    "conversions": "memory of every verb of tools/convert_checkpoint.py on checkpoints of 2 GB",
    "recovery": "what an upcycled Llama recovers in further training, against a StagFormer from scratch",
    "decode": "speed of decoding: staggered sections against the sequential baseline, rivals and the bound",
}
LAUNCHED = "decode"
"""Runs on the processes of a launcher."""
EPILOG = """\
examples:
  python launch/bench.py train --json benchmarks/train.json
  python launch/bench.py train --rounds 40 --micro-batches 16 --set training.micro_batch_size=1
  python launch/bench.py train --one-process --config configs/pythia-410m-staggered.yaml \\
      --set training.precision=bf16 --json runs/gpu.json
  python launch/bench.py memory --json benchmarks/memory.json
  python launch/bench.py save --json benchmarks/save.json
  python launch/bench.py conversions --json benchmarks/conversion-memory.json
  python launch/bench.py recovery --json benchmarks/recovery.json
  deepspeed --num_accelerators 2 launch/bench.py decode --json benchmarks/decode.json --timeline runs/decode.png
  deepspeed --num_accelerators 2 launch/bench.py decode --sweep contexts=64,256,1024 delays_ms=0,2,5,10
"""


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; DeepSpeed's launcher adds --local_rank in front.

    Raises:
        ConfigError: it cannot be understood.
    """
    from stagdist.parallel.ranks_parser import RanksParser

    parser = RanksParser(
        prog="bench.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    chosen = next((word for word in arguments if word in BENCHMARKS), None)
    for name, says in BENCHMARKS.items():
        command = commands.add_parser(name, help=says)
        if name == chosen:
            module = importlib.import_module(f"benchmarks._bench.{name}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 measured, 1 a failure or a missed prediction, 2 something to mend first."""
    from stagdist.errors import ConfigError, StagdistError
    from stagdist.parallel.world import join_launcher

    given = sys.argv[1:] if arguments is None else arguments
    try:
        if LAUNCHED in given:
            join_launcher().share_cores()  # before torch is imported
        parsed = parse_arguments(given)
        return int(parsed.run(parsed))
    except StagdistError as error:
        # What was typed is wrong on every rank: one of them says so.
        if not isinstance(error, ConfigError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
