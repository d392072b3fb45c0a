#!/usr/bin/env python3
"""Generate text: `deepspeed --num_accelerators 2 launch/generate.py --model DIR --prompt TEXT`."""

import argparse
import signal
from pathlib import Path

from stagdist.decode.frontend.command_line import add_running_options, exit_code, from_options, model_parser, run_rank
from stagdist.errors import ConfigError

EPILOG = """\
The number of processes divided by --tensor-parallel-size is the number of pipeline stages; it divides the number of
sections. All stages work on every token at the same time. Started with plain `python`, one process holds all sections.

Text is written as it is generated, after its prompt. Several prompts are answered in order: the first unfinished answer
is streamed, and later answers are buffered. Statistics and errors go to standard error.
Exit code: 0 all prompts were served; 1 some prompts failed, there were none, or the run failed; 2 invalid arguments,
model or configuration; 130 and 143 after Ctrl-C and SIGTERM (a second Ctrl-C exits immediately); 141 broken pipe.

A prompt is encoded as by the tokenizer of the model in transformers: with the begin-of-text token where the tokenizer
adds one. Control tokens that are written in a prompt are text, unless --parse-special is given.

A .jsonl file of prompts holds one object per line: "prompt" (text), "prompt_ids" (token ids) or "messages" (objects
with "role" and "content", for the chat template of the model), and optionally "id" and sampling parameters by the names
of docs/decoding.md, such as max_new_tokens, temperature and stop.

examples:
  deepspeed --quiet --num_accelerators 2 launch/generate.py --model runs/quickstart/model --prompt "def main(" \\
      --max-new-tokens 100 --temperature 0.7 --top-k 40
  python launch/generate.py --model DIR --prompts-file prompts.jsonl --batch-size 8 --json > answers.jsonl
  torchrun --nproc_per_node 4 launch/generate.py --model DIR --tensor-parallel-size 2 --head sharded < prompts.txt
  python launch/generate.py --model DIR --prompt "Once" --temperature 0 --trace decode.json
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: an argument is invalid.
    """
    parser = model_parser("generate.py", __doc__, EPILOG)
    _add_prompts(parser)
    _add_sampling(parser)
    add = add_running_options(parser, slots=1, timeout_s=600, what="prompts")
    add("--json", action="store_true", help="one JSON object per finished prompt instead of text")
    add("--margins", action="store_true", help="report the smallest difference between best and second-best token")
    add("--trace", type=Path, metavar="FILE", help="write a Perfetto trace of all ranks; creates folders")
    return parser.parse_args(arguments)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts", "without either, one prompt per line of standard input, at once")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeatable")
    source.add_argument("--prompts-file", type=Path, metavar="FILE", help=".txt: one per line; .jsonl: see below")
    add = group.add_argument
    add("--chat", action="store_true", help="a prompt is the message of a user in the model's chat template")
    add("--no-special-tokens", action="store_true", help="add no begin-of-text token or the like to prompts")
    add("--parse-special", action="store_true", help="control tokens that are written in prompts become themselves")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "for prompts that do not set their own values")
    add = group.add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N", help="maximum number of new tokens (default 128)")
    add("--temperature", type=float, default=1.0, metavar="T", help="0: always the likeliest token (default 1)")
    add("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (default all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest P of all (default 1)")
    add("--min-p", type=float, default=0.0, metavar="P", help="drop tokens below P of the top probability (default 0)")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less (default 1)")
    add("--presence-penalty", type=float, default=0.0, metavar="X", help="above 0: more new tokens (-2 to 2; 0)")
    add("--frequency-penalty", type=float, default=0.0, metavar="X", help="the same for each repetition (-2 to 2; 0)")
    add("--logit-bias", action="append", type=_bias, default=[], metavar="ID=X", help="-100 to 100; repeatable")
    only = "choose no other; repeatable (default all)"
    add("--allowed-token-id", action="append", type=int, metavar="ID", help=only)
    add("--min-tokens", type=int, default=0, metavar="N", help="no end before so many new tokens (default 0)")
    add("--seed", type=int, default=0, metavar="S", help="prompt i, counted from 0, uses S + i (default 0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; repeatable")
    add("--stop-token-id", action="append", type=int, default=[], metavar="ID", help="stop after it; repeatable")
    add("--include-stop-str-in-output", action="store_true", help="stop after the text of --stop, not before it")
    add("--no-skip-special-tokens", action="store_false", dest="skip_special_tokens", help="show special tokens")
    add("--ignore-eos", action="store_true", help="continue after an end-of-text token")
    add("--logprobs", type=int, metavar="N", help="log-probabilities, also of the N likeliest tokens (with --json)")
    add("--prompt-logprobs", type=int, metavar="N", help="the same for the prompt; also with --max-new-tokens 0")


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no token id with a number; write for example 13=-2.5") from None


def run(arguments: argparse.Namespace) -> int:
    """Check everything that needs no process group, then generate."""
    from stagdist.decode.frontend.interrupts import Interrupts
    from stagdist.parallel.world import join_launcher
    from stagdist.telemetry.pulse import Pulse

    pulse = Pulse.from_environment()
    world = join_launcher()
    interrupts = Interrupts() if world.rank == 0 else None
    if interrupts is None:  # a terminal sends Ctrl-C to all ranks; rank 0 shuts the others down
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    world.share_cores()

    from stagdist.decode.request import SamplingParams

    params = from_options(SamplingParams, arguments)
    if arguments.chat and (arguments.no_special_tokens or arguments.parse_special):
        raise ConfigError("--chat leaves special tokens to the template; drop --no-special-tokens and --parse-special")
    if (params.logprobs, params.prompt_logprobs) != (None, None) and not arguments.json:
        raise ConfigError("log-probabilities cannot be shown in plain text; add --json")

    from stagdist.decode.frontend.generate import Generation
    from stagdist.decode.frontend.prompts import PromptEncoding
    from stagdist.decode.runtime.build import EngineOptions
    from stagdist.telemetry.logging import setup_logging

    setup_logging(world.rank, None)
    generation = Generation(
        arguments.model,
        from_options(EngineOptions, arguments),
        params,
        world,
        prompts=arguments.prompt,
        prompts_file=arguments.prompts_file,
        device=arguments.device,
        as_json=arguments.json,
        trace=arguments.trace,
        encoding=PromptEncoding(not arguments.no_special_tokens, arguments.parse_special, arguments.chat),
    )
    return generation.run(interrupts, pulse)


def main() -> int:
    """Exit code, see the end of --help."""
    return exit_code(lambda: run(parse_arguments()))


if __name__ == "__main__":
    run_rank(main)
