#!/usr/bin/env python3
"""Serve a model to clients of OpenAI's API: `deepspeed --num_accelerators 2 launch/serve.py --model DIR`."""

import argparse
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stagdist.decode.frontend.command_line import add_running_options, exit_code, from_options, model_parser, run_rank
from stagdist.errors import ConfigError

if TYPE_CHECKING:
    from stagdist.parallel.world import World
    from stagdist.serving.serve import Server

EPILOG = """\
The number of processes divided by --tensor-parallel-size is the number of pipeline stages; it divides the number of
sections. Started with plain `python`, one process holds all sections.

GET /health answers 200 once requests are served. SIGTERM and Ctrl-C make the server refuse new requests, finish those
that it has accepted within --drain-timeout-s, and end; a second one ends it at once.
Exit code: 0 ended by a signal with all requests finished; 143 (Ctrl-C: 130) some were cut off; 1 a rank or the HTTP
process was lost; 2 invalid arguments, model or configuration.

API keys come from --api-key-file, one per line, or from STAGDIST_API_KEYS, separated by commas. Without keys everyone
who reaches the port is served.

examples:
  deepspeed --num_accelerators 2 launch/serve.py --model runs/quickstart/model --port 8000
  python launch/serve.py --model DIR --host 0.0.0.0 --api-key-file keys.txt --served-model-name stag
  python launch/run.py --hostfile hostfile --folder runs/server -- launch/serve.py --model DIR --batch-size 16
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an argument is invalid.
    """
    parser = model_parser("serve.py", __doc__, EPILOG)
    _add_address(parser)
    _add_requests(parser)
    add = add_running_options(parser, slots=8, timeout_s=20, what="requests")
    target = "shorten prefill chunks while others decode, for this time between tokens"
    add("--inter-token-target-ms", type=float, metavar="MS", help=target)
    add("--no-prefix-caching", action="store_false", dest="prefix_caching", help="compute every prompt from its start")
    drain = "limit for accepted requests after SIGTERM (default 25; DeepSpeed and torchrun kill after 30)"
    add("--drain-timeout-s", type=float, default=25.0, metavar="S", help=drain)
    hang = "time without a sign of life after which /health answers 503 (default 30)"
    add("--hang-timeout-s", type=float, default=30.0, metavar="S", help=hang)
    restart = "time for launch/run.py to start the engine again (default 120)"
    add("--restart-timeout-s", type=float, default=120.0, metavar="S", help=restart)
    return parser.parse_args(arguments)


def _add_address(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("HTTP").add_argument
    add("--host", default="127.0.0.1", help="address of this host to listen on; 0.0.0.0: all (default 127.0.0.1)")
    add("--port", type=int, default=8000, help="1 to 65535 (default 8000)")
    add("--api-key-file", type=Path, metavar="FILE", help="one key per line")
    add("--root-path", default="", metavar="PATH", help="prefix that a proxy removes, such as /llm")
    origin = "pages of this origin may call the server; repeatable"
    add("--cors-origin", action="append", default=[], dest="cors_origins", metavar="URL", help=origin)
    add("--keep-alive-s", type=int, default=75, metavar="S", help="how long idle connections are kept (default 75)")
    add("--max-body-mib", type=float, default=8.0, metavar="N", help="limit of a request's body, MiB (default 8)")
    add("--metrics-prefix", default="stagdist:", metavar="TEXT", help="of names in /metrics (default stagdist:)")
    add("--no-access-log", action="store_false", dest="access_log", help="no line per request")


def _add_requests(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("requests").add_argument
    name = "name of the model in requests; repeatable (default: that of its directory)"
    add("--served-model-name", action="append", default=[], dest="names", metavar="NAME", help=name)
    add("--any-model", action="store_true", help="serve requests for models of other names too")
    template = "a Jinja template, or `plain` for models without one"
    add("--chat-template", metavar="FILE", help=template)
    add("--max-queued-requests", type=int, default=256, metavar="N", help="that wait for a slot (default 256)")
    tokens = "of prompts that wait for a slot (default 1048576)"
    add("--max-queued-tokens", type=int, default=1 << 20, metavar="N", help=tokens)


def run(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> int:
    """Start the HTTP process on rank 0, check everything, and serve."""
    from stagdist.decode.frontend.interrupts import Interrupts
    from stagdist.parallel.world import join_launcher
    from stagdist.telemetry.pulse import Pulse

    pulse = Pulse.from_environment()
    world = join_launcher()
    world.share_cores()
    if world.rank:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 shuts the others down
        return _server(arguments, world).follow(pulse)
    interrupts = Interrupts()

    from stagdist.serving.http_child import HttpProcess
    from stagdist.serving.serve_settings import server_settings

    if arguments.max_queued_tokens < 1:
        raise ConfigError(f"--max-queued-tokens is {arguments.max_queued_tokens}; give at least 1")
    settings = server_settings(arguments, environment)
    # torch is imported while the HTTP process starts.
    with HttpProcess(settings) as http:
        interrupts.stop_with(lambda: http.abandon(interrupts.code))
        server = _server(arguments, world)
        http.connect()
        return server.lead(http, settings, interrupts, pulse, max_queued_tokens=arguments.max_queued_tokens)


def _server(arguments: argparse.Namespace, world: "World") -> "Server":
    from stagdist.decode.runtime.build import EngineOptions
    from stagdist.serving.serve import Server
    from stagdist.telemetry.logging import setup_logging

    setup_logging(world.rank, None)
    return Server(arguments.model, from_options(EngineOptions, arguments), world, arguments.device)


def main() -> int:
    """Exit code, see the end of --help."""
    return exit_code(lambda: run(parse_arguments()))


if __name__ == "__main__":
    run_rank(main)
