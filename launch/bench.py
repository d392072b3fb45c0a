#!/usr/bin/env python3
"""Benchmarks: `python launch/bench.py train --json FILE`. They start their own processes on this machine."""

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BENCHMARKS = {
    "train": "speed of training: pipeline against one process, its bound and torch.distributed.pipelining",
    "memory": "memory of training: the dry run's plan against the peak of real ranks",
}
EPILOG = """\
examples:
  python launch/bench.py train --json benchmarks/train.json
  python launch/bench.py train --rounds 40 --micro-batches 16 --set training.micro_batch_size=1
  python launch/bench.py train --one-process --config configs/pythia-410m-staggered.yaml \\
      --set training.precision=bf16 --json runs/gpu.json
  python launch/bench.py memory --json benchmarks/memory.json
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 measured, 1 a failure or a missed prediction, 2 something to mend first."""
    from stagdist.errors import ConfigError, StagdistError

    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, says in BENCHMARKS.items():
        module = importlib.import_module(f"stagdist.bench.{name}")
        command = commands.add_parser(name, help=says, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except StagdistError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
