#!/usr/bin/env python3
"""Convert training checkpoints to and from model directories; inspect and compare both.

The folder of a run as SOURCE means its newest complete checkpoint. Every conversion writes into a hidden folder, proves
the result, and only then renames it; a conversion that fails or is killed leaves nothing that looks complete. A run
that continues on another grid, or in another precision, needs no conversion: every grid loads every checkpoint.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from stagdist.parallel.ranks_parser import OneLineParser

EXAMPLES = """\
examples:
  python tools/convert_checkpoint.py export runs/my-run runs/my-run/model
  python tools/convert_checkpoint.py export runs/my-run model.pt --format torch --precision bf16
  python tools/convert_checkpoint.py import runs/my-run/model runs/finetune --config configs/x.yaml
  python tools/convert_checkpoint.py upcycle path/to/llama stagformer/ --section-layers 18 18
  python tools/convert_checkpoint.py split runs/shared/model separate/
  python tools/convert_checkpoint.py merge runs/my-run/checkpoints/step_00000100 runs/my-run averaged/
  python tools/convert_checkpoint.py verify runs/my-run exported/
  python tools/convert_checkpoint.py inspect runs/my-run --json

Formats, names and recipes: docs/checkpoints.md.
"""

DESCRIPTIONS = {
    "export": "Training checkpoint of any grid to a model directory (config.json, safetensors, tokenizer), or to one "
    "file of PyTorch.",
    "import": "Model directory to a training checkpoint at step 0: its weights and a new optimizer state. "
    "`pretrain` with the name of the run starts from it, on any data and any grid.",
    "upcycle": "Llama-architecture model directory (or sequential run) to a StagFormer as a starting point for "
    "training: its layers are cut into sections, cross-attention starts as a copy of self-attention. Then `import` it "
    "and train. Choices and measured recovery: docs/checkpoints.md.",
    "split": "Shared weights to separate sections, each with its own copy; writes a model directory.",
    "merge": "The average of several checkpoints or model directories of one model, as a model directory.",
    "inspect": "Show the content of a directory: kind, step, model, grid, sizes, statistics of every tensor, missing "
    "or unknown files. Exit code 1 if something is wrong.",
    "verify": "Whether two directories hold the same model: largest difference of their logits on real text, in fp32, "
    "and what their configurations say. Exit code 1 if the difference is above --tolerance, or if a key differs that "
    "changes the function and that the text is too short to show.",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    style = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, epilog=EXAMPLES, formatter_class=style)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    made: dict[str, argparse.ArgumentParser] = {}
    for verb, text in DESCRIPTIONS.items():
        lines = [line for line in EXAMPLES.splitlines() if f".py {verb} " in line]
        made[verb] = verbs.add_parser(
            verb, help=text, description=text, epilog="\n".join(["example:", *lines]), formatter_class=style
        )
        _add_paths(made[verb], verb)
        made[verb].add_argument("--quiet", action="store_true", help="no progress bar")
    _add_options(made)
    return parser.parse_args(arguments)


def _add_paths(parser: argparse.ArgumentParser, verb: str) -> None:
    if verb == "inspect":
        parser.add_argument("directory", metavar="DIR", help="run, training checkpoint or model directory")
    elif verb == "verify":
        parser.add_argument("first", metavar="A", help="run, training checkpoint or model directory")
        parser.add_argument("second", metavar="B", help="the other one")
    else:
        many = {"nargs": "+"} if verb == "merge" else {}
        parser.add_argument("source", metavar="SOURCE", help="what to convert", **many)  # type: ignore[arg-type]
        what = "run's folder (or checkpoints/step_00000000 in one)" if verb == "import" else "model directory"
        parser.add_argument("destination", metavar="DESTINATION", help=f"{what} to write")
        if verb != "import":
            parser.add_argument("--overwrite", action="store_true", help="replace an existing DESTINATION")


def _add_options(made: dict[str, argparse.ArgumentParser]) -> None:
    _add_export_options(made["export"])
    made["import"].add_argument(
        "--config",
        metavar="FILE",
        help="configuration of the new run: its precision and optimizer are used, its data.tokenizer must be that "
        "of SOURCE or of --tokenizer",
    )
    made["upcycle"].add_argument(
        "--section-layers", type=int, nargs="+", required=True, metavar="N", help="layers of each section"
    )
    made["upcycle"].add_argument(
        "--output-scale",
        type=float,
        metavar="X",
        help="scale of the copied output projection of cross-attention (default: 0, no effect at the start)",
    )
    for verb in ("export", "import", "upcycle", "split", "merge", "verify"):
        made[verb].add_argument(
            "--tokenizer", metavar="DIR", help="tokenizer (default: that of the run or model directory)"
        )
    for verb in ("inspect", "verify"):
        made[verb].add_argument("--json", action="store_true", help="print JSON")
    made["verify"].add_argument("--text", metavar="FILE", help="text to compare on (default: a built-in passage)")
    made["verify"].add_argument(
        "--tokens", type=int, metavar="N", help="tokens of the text to read, up to the context (default: 128 at most)"
    )
    made["verify"].add_argument(
        "--tolerance", type=_tolerance, default=1e-5, metavar="X", help="largest difference to accept (default: 1e-5)"
    )


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        choices=("model", "torch"),
        default="model",
        help="model: a model directory (default); torch: one file, a state dict of canonical names that "
        "torch.load(weights_only=True) reads",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="of the written weights (default: that of the run)"
    )
    parser.add_argument(
        "--from-master",
        action="store_true",
        help="write the fp32 values of the optimizer (in fp32, or rounded to --precision), not the weights of a run "
        "in a lower precision",
    )


def _tolerance(text: str) -> float:
    """Parse a tolerance: not negative, not NaN."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is no difference; give 0 or more")
    return value


def show(items: Sequence[Any], what: str, *, quiet: bool = False) -> Iterable[Any]:
    """Show a progress bar if stderr is a terminal and not `quiet`."""
    from tqdm import tqdm

    return tqdm(items, desc=what, file=sys.stderr, disable=quiet or None, dynamic_ncols=True, leave=False)


def convert(arguments: argparse.Namespace) -> int:
    """Run a conversion and print what it proved."""
    from stagdist.checkpoint.convert import model_conversions
    from stagdist.checkpoint.convert.import_model import import_model
    from stagdist.checkpoint.convert.staging import ConversionOptions
    from stagdist.checkpoint.convert.upcycle import OUTPUT_SCALE, upcycle

    options = ConversionOptions(
        tokenizer=arguments.tokenizer,
        overwrite=getattr(arguments, "overwrite", False),
        track=partial(show, quiet=arguments.quiet),
    )
    source, destination = arguments.source, arguments.destination
    if arguments.verb == "export":
        result = model_conversions.export(
            source,
            destination,
            options,
            precision=arguments.precision,
            from_master=arguments.from_master,
            as_state_dict=arguments.format == "torch",
        )
    elif arguments.verb == "split":
        result = model_conversions.split(source, destination, options)
    elif arguments.verb == "upcycle":
        scale = OUTPUT_SCALE if arguments.output_scale is None else arguments.output_scale
        result = upcycle(source, destination, arguments.section_layers, options, output_scale=scale)
    elif arguments.verb == "merge":
        result = model_conversions.merge(source, destination, options)
    else:
        result = import_model(source, destination, arguments.config, options)
    print(f"wrote {result.directory}: {result.checked}")
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Print the content of a directory."""
    from stagdist.checkpoint.convert import inspection

    report = inspection.inspect(arguments.directory, track=partial(show, quiet=arguments.quiet))
    print(json.dumps(asdict(report), indent=2) if arguments.json else inspection.as_table(report))
    return 1 if report.problems else 0


def verify(arguments: argparse.Namespace) -> int:
    """Compare two models."""
    from stagdist.checkpoint.convert.proof import TEXT
    from stagdist.checkpoint.convert.verify import verify as compare
    from stagdist.evaluation.bits_per_byte import read_text

    text = TEXT if arguments.text is None else read_text(arguments.text)
    verdict = compare(
        arguments.first,
        arguments.second,
        text=text,
        tokens=arguments.tokens,
        tokenizer=arguments.tokenizer,
        track=partial(show, quiet=arguments.quiet),
    )
    same = verdict.same(arguments.tolerance)
    if arguments.json:
        print(json.dumps(asdict(verdict) | {"tolerance": arguments.tolerance, "same": same}, indent=2))
    else:
        print(
            f"{'same' if same else 'DIFFERENT'}: largest difference of a logit {verdict.largest_difference:.3g} on "
            f"{verdict.tokens} tokens of text (largest logit {verdict.largest_logit:.3g}, tolerance "
            f"{arguments.tolerance:g}); the same first choice at {verdict.equal_choices:.1%} of the positions"
        )
        for line in verdict.remarks():
            print(line)
    return 0 if same else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Exit code: 0 success, 1 models differ or problems were found, 2 user error."""
    from stagdist.data.prepare.arguments import run_tool

    parsed = parse(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # conversions use no device; DeepSpeed would warn that it guesses
    run = {"inspect": inspect, "verify": verify}.get(parsed.verb, convert)
    codes: list[int] = []
    return run_tool(lambda: codes.append(run(parsed))) or codes[0]


if __name__ == "__main__":
    sys.exit(main())
