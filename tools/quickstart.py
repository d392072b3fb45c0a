"""From text to a trained StagFormer in minutes, through the commands of a user. `make quickstart` runs it."""

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from stagdist.config.loading import load_config
from stagdist.data.prepare.arguments import run_tool
from stagdist.data.prepare.documents import Reader
from stagdist.data.prepare.sources import ReadOptions, plan_pieces
from stagdist.errors import DataError, StagdistError
from stagdist.parallel.ranks_parser import OneLineParser
from stagdist.telemetry.logging import setup_logging

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "quickstart.yaml"
RUN = Path("runs/quickstart")
TEXT_BYTES = 24_000_000
"""Text that is used at most; a longer corpus is cut, and the output says so."""
HELD_OUT_BYTES = 150_000
"""Text of the final evaluation; as much again is for the evaluations on the way."""
MIN_DOCUMENTS = 60
MICRO_BATCH = ("--set", "training.micro_batch_size=4")
"""The configuration says 1, so that it fits many ranks; two do better with larger matrices."""
PROMPT_TOKENS = 24
NEXT = """
Next, generate more text, serve the model or train longer, for example:
  source .venv/bin/activate
  deepspeed --num_accelerators 2 launch/generate.py --model runs/quickstart/model --prompt 'def main(' --temperature 0.7
  deepspeed --num_accelerators 2 launch/serve.py --model runs/quickstart/model
  deepspeed --num_accelerators 2 launch/pretrain.py --config configs/quickstart.yaml --set name=longer \\
      --set training.micro_batch_size=4 --set training.steps=2000"""
EXAMPLES = """\
examples:
  make quickstart
  make quickstart CORPUS="a.txt b.jsonl"
  python tools/quickstart.py --corpus notes/ --set training.steps=600
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus", nargs="+", metavar="INPUT", help="text, as for tools/prepare_data.py (default: Python's own source)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable")
    return parser.parse_args(arguments)


def standard_library() -> list[str]:
    """The default corpus: the source of Python's standard library without tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    files = [path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts)]
    if not files:
        raise DataError(f'no Python source below {root}; name a corpus: make quickstart CORPUS="a.txt b.jsonl"')
    return [str(path) for path in sorted(files)]


def documents(inputs: list[str]) -> list[str]:
    """All documents, shuffled; a text that is one long document is cut at its paragraphs."""
    texts: list[str] = []
    for cut in ("auto", "paragraph", "line"):
        options = ReadOptions(bad_utf8="skip", txt_documents=cut)  # type: ignore[arg-type]
        texts = list(Reader(options).documents(plan_pieces(inputs, options)))
        if len(texts) >= MIN_DOCUMENTS:
            break
    if not texts:
        raise DataError(f"no text in {' '.join(inputs[:3])}; give files with at least some hundred kilobytes of text")
    random.Random(0).shuffle(texts)
    return texts


def split(texts: list[str]) -> dict[str, list[str]]:
    """Cut documents into held-out, validation and training text; held out is at most a tenth, of many documents."""
    sizes = [len(text.encode()) for text in texts]
    total = sum(sizes)
    share = min(HELD_OUT_BYTES, total // 10)
    # Long documents go to the end, which is training text: one of them must not be all of the held-out text.
    queue = deque(sorted(zip(sizes, texts, strict=True), key=lambda pair: pair[0] > share // 8))
    parts: dict[str, list[str]] = {}
    for name, wanted in (("heldout", share), ("validation", share), ("train", TEXT_BYTES)):
        size, parts[name] = 0, []
        while queue and size < wanted:
            parts[name].append(queue[0][1])
            size += queue.popleft()[0]
        if not parts[name]:
            raise DataError(f"{total} bytes of text are too few to learn from; give some hundred kilobytes")
        print(f"  {name}: {len(parts[name])} documents, {size / 1e6:.2f} MB", flush=True)
    if queue:
        print(f"  {len(queue)} documents more are left out of this short run", flush=True)
    return parts


def run(*command: str, output: Path | None = None) -> None:
    """Show a command and run it.

    Args:
        output: gets its standard output.

    Raises:
        StagdistError: it failed; its own output says why.
    """
    print(f"\n$ {shlex.join(command)}{f' > {output}' if output else ''}", flush=True)
    # DeepSpeed prints to standard output that it found no GPU, unless DS_ACCELERATOR is set.
    accelerator = {} if enough_devices() else {"DS_ACCELERATOR": "cpu"}
    with output.open("wb") if output else nullcontext() as stream:
        code = subprocess.run(command, stdout=stream, env=os.environ | accelerator).returncode
    if code:
        raise StagdistError(f"{command[0]} ended with code {code}; see its output above")


def enough_devices() -> bool:
    """Whether two ranks have a GPU each; with one GPU or none they share the CPU."""
    import torch

    return torch.cuda.device_count() >= 2


def deepspeed(*arguments: str, output: Path | None = None) -> None:
    """Run a command on two ranks of this machine."""
    port = str(random.randint(20000, 29000))
    quiet = ("--quiet",) if output else ()
    run("deepspeed", *quiet, "--num_accelerators", "2", "--master_port", port, *arguments, output=output)


def prepare(parts: dict[str, list[str]], vocab_size: int) -> None:
    """Write the three texts, train the tokenizer on the training text, tokenize."""
    data = RUN / "data"
    data.mkdir(parents=True)
    for name, texts in parts.items():
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = f"{data}/tokenizer"
    train = ("--output", tokenizer, "--vocab-size", str(vocab_size))
    run("python", "tools/train_tokenizer.py", f"{data}/train.jsonl", *train)
    for name in parts:
        options = ("--output", f"{data}/{name}", "--tokenizer", tokenizer, "--quiet")
        run("python", "tools/prepare_data.py", f"{data}/{name}.jsonl", *options)


def judge(parts: dict[str, list[str]]) -> dict[str, Any]:
    """Bits per byte of the held-out text: the model, and bigrams trained on the same training text."""
    from stagdist.checkpoint.published.load_model import load_model
    from stagdist.data.tokenizer import Tokenizer, byte_tokenizer
    from stagdist.data.tokenizer_files import load_tokenizer
    from stagdist.evaluation.bits_per_byte import nats_from_logits, score_text
    from stagdist.evaluation.ngram import WittenBellBigram
    from stagdist.model.megatron import TensorParallel
    from stagdist.parallel.groups import single_process

    def stream(texts: list[str], by: Tokenizer) -> list[int]:
        return [token for ids in by.encode_batch(texts) for token in (*ids, by.end_of_document)]

    def bigram(by: Tokenizer) -> float:
        model = WittenBellBigram(stream(parts["train"], by), by.vocab_size)
        return model.score(stream(parts["heldout"], by), by.token_bytes()).bits_per_byte

    tokenizer = load_tokenizer(str(RUN / "model"))
    ids = stream(parts["heldout"], tokenizer)
    with single_process() as groups:
        model = load_model(RUN / "model", TensorParallel(groups.tensor))
        context = model.config.max_position_embeddings
        score = score_text(nats_from_logits(model), ids, window=context, token_bytes=tokenizer.token_bytes())
    return {
        "heldout_bits_per_byte": score.bits_per_byte,
        "heldout_tokens": score.tokens,
        "bigram_bits_per_byte": bigram(byte_tokenizer()),
        "token_bigram_bits_per_byte": bigram(tokenizer),
    }


def sample(text: str, device: Sequence[str]) -> str:
    """The beginning of a text, continued by the model with both sections working on every token."""
    from stagdist.data.tokenizer_files import load_tokenizer

    tokenizer = load_tokenizer(RUN / "model")
    prompt = tokenizer.decode(tokenizer.encode(text)[:PROMPT_TOKENS]).rstrip("\ufffd")  # not half a character
    deepspeed(
        *("launch/generate.py", "--model", str(RUN / "model"), f"--prompt={prompt}"),
        *("--max-new-tokens", "100", "--temperature", "0.7", "--top-k", "40", "--seed", "0", *device),
        output=RUN / "sample.txt",
    )
    return (RUN / "sample.txt").read_text(encoding="utf-8").rstrip("\n")


def report(summary: dict[str, Any]) -> None:
    """The final report."""
    model, byte, token = (summary[f"{key}bits_per_byte"] for key in ("heldout_", "bigram_", "token_bigram_"))
    print(
        f"""
--- a sample, after its first {PROMPT_TOKENS} tokens ---
{summary["sample"]}
---

bits per byte of held-out text (lower is better)
  this StagFormer           {model:.3f}   {model / byte:.2f} of the byte bigram
  bigram over its tokens    {token:.3f}
  bigram over bytes         {byte:.3f}

{summary["tokens_per_s"]:.0f} tokens/s in training, {summary["wall_s"]:.0f} s in all. In {RUN}/:
  checkpoints/  config.yaml  metrics.jsonl  loss.png  model/  sample.txt  summary.json
{NEXT}"""
    )


def quickstart(arguments: argparse.Namespace) -> None:
    """Run all steps."""
    started = time.monotonic()
    setup_logging(0, None)
    config = load_config(CONFIG, arguments.set)
    inputs = arguments.corpus or standard_library()
    print(f"reading {len(inputs)} input(s)", flush=True)
    parts = split(documents(inputs))
    if RUN.exists():
        print(f"removing {RUN} of an earlier quickstart", flush=True)
        shutil.rmtree(RUN)
    prepare(parts, config.model.vocab_size)
    device = () if enough_devices() else ("--set", "parallel.device=cpu")
    overrides = [part for override in arguments.set for part in ("--set", override)]
    deepspeed("launch/pretrain.py", "--config", "configs/quickstart.yaml", *MICRO_BATCH, *device, *overrides)
    print("\nscoring held-out text", flush=True)
    summary = json.loads((RUN / "summary.json").read_text()) | judge(parts)
    summary["sample"] = sample(parts["heldout"][0], () if enough_devices() else ("--device", "cpu"))
    summary["wall_s"] = time.monotonic() - started
    (RUN / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report(summary)


def main() -> int:
    """Exit code: 0, or 2 after one line about a user error."""
    arguments = parse()
    if Path.cwd() != ROOT:
        print(f"error: run it from the repository's top folder, {ROOT}", file=sys.stderr)
        return 2
    return run_tool(lambda: quickstart(arguments))


if __name__ == "__main__":
    sys.exit(main())
