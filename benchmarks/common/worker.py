"""A benchmark process: reads one command per line, answers each with one line of JSON.

Started by `benchmarks.common.workers` with the file of its settings. Answers leave through the descriptor
STAGDIST_REPLY_FD, because frameworks print to standard output.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch


def main() -> None:
    """Answer commands until standard input ends."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    module, name = settings["site"].split(":")

    from stagdist.config.run_config import RunConfig

    site = getattr(importlib.import_module(module), name)(RunConfig.model_validate(settings["config"]), settings)
    with os.fdopen(int(os.environ["STAGDIST_REPLY_FD"]), "w") as replies:
        print(json.dumps(site.started), file=replies, flush=True)
        for line in sys.stdin:
            how, contestant = line.split()
            print(json.dumps(site.run(contestant, together=how == "together")), file=replies, flush=True)
        site.close()


if __name__ == "__main__":
    main()
