"""A benchmark process: reads one command per line, answers each with one line of JSON.

Started by `benchmarks._bench.workers`, with the settings' file as its only argument. Commands come by standard input,
answers leave through the descriptor STAGDIST_REPLY_FD, since frameworks print what they like.
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Answer commands until standard input ends."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    with os.fdopen(int(os.environ["STAGDIST_REPLY_FD"]), "w") as replies:

        def reply(answer: object) -> None:
            print(json.dumps(answer), file=replies, flush=True)

        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        from benchmarks._bench.contestants import Site
        from stagdist.config.run_config import RunConfig
        from stagdist.training.engine.distributed import stop_distributed

        site = Site(RunConfig.model_validate(settings["config"]), int(os.environ["WORLD_SIZE"]))
        reply({"started_s": site.started_s, "resumed": site.resumed, "device_name": site.device_name})
        for line in sys.stdin:
            how, name = line.split()
            reply(site.run(name, together=how == "together"))
        site.close()
        stop_distributed()


if __name__ == "__main__":
    main()
