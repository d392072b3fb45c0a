#!/usr/bin/env python3
"""Memory of conversions: peak of anonymous memory of every verb, `python benchmarks/conversions.py`.

Checkpoints of random weights are made in a temporary folder, `tools/convert_checkpoint.py` runs on them, and `RssAnon`
of its process is read every 20 ms. Memory mapped from files does not count: the system takes it back when needed. The
first row is the memory of a process that only imports what a conversion needs.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common.command import add_options, main
from benchmarks.common.conditions import ROOT, conditions
from benchmarks.common.results import check_outputs, write_results
from stagdist.errors import ConfigError, TrainingError

LIMIT_BYTES = 10**9
"""More than this fails the benchmark."""
SAMPLE_S = 0.02
TOOL = ROOT / "tools" / "convert_checkpoint.py"
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8}
SHAPE: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, **HEADS}
SHAPE |= {"max_position_embeddings": 256, "section_layers": [4, 4]}
TINY: dict[str, Any] = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared": {"share_section_weights": True},
    "sequential": {"connection": "sequential"},
}
IMPORTS = "import stagdist.checkpoint.convert.import_model, stagdist.checkpoint.convert.upcycle"
CONVERSIONS: dict[str, dict[str, str]] = {
    "separate": {
        "import": "import model runs/a",
        "export": "export runs/b exported",
        "export --from-master": "export runs/b master --from-master",
        "export --format torch": "export runs/b model.pt --format torch",
        "verify": "verify runs/b exported",
        "inspect": "inspect runs/b",
        "merge": "merge runs/a runs/b merged",
    },
    "shared": {"split": "split model separate"},
    "sequential": {"upcycle": "upcycle model stagformer --section-layers 4 4"},
}
"""Arguments of the tool by the name in the table, for the variant whose model directory they begin from. `runs/a` is
what `import` makes; `runs/b` is that of a run on two replicas, with moments."""
LINE = "{:<24} {:>8} {:>8} {:>8}"


@dataclass(frozen=True)
class Peak:
    """What one conversion needed: peak of anonymous memory, size of its source in bytes, seconds."""

    name: str
    arguments: tuple[str, ...]
    peak_anonymous_bytes: int
    source_bytes: int
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the benchmark."""
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the benchmark itself")
    add_options(parser, "json", "folder", folder="where checkpoints go, 12 GB (default: a temporary folder)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write; exit code 1 if a conversion needed more than the limit.

    Raises:
        TrainingError: a conversion failed.
        ConfigError: this system does not report anonymous memory, or files cannot be written.
    """
    if not Path("/proc/self/status").is_file():
        raise ConfigError("anonymous memory is read from /proc, which this system does not have; use Linux")
    check_outputs(arguments)
    shape = SHAPE | TINY if arguments.tiny else SHAPE
    print(LINE.format("conversion", "source", "peak", "seconds"), flush=True)
    peaks = [Peak("imports alone", (), peak_anonymous_bytes([sys.executable, "-c", IMPORTS], ROOT), 0, 0.0)]
    print(LINE.format(peaks[0].name, "", f"{peaks[0].peak_anonymous_bytes / 1e6:.0f} MB", ""), flush=True)
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory(prefix="stagdist-bench-conversions-", dir=arguments.folder) as folder:
            for peak in measure(Path(folder), variant, shape):
                peaks.append(peak)
                size, most = f"{peak.source_bytes / 1e9:.2f} GB", f"{peak.peak_anonymous_bytes / 1e6:.0f} MB"
                print(LINE.format(peak.name, size, most, f"{peak.seconds:.0f}"), flush=True)
    if arguments.json:
        body = conditions(None, 0) | {"benchmark": "conversions", "precision": "bf16", "model": shape}
        body |= {"largest_tensor_fp32_bytes": 4 * shape["vocab_size"] * shape["hidden_size"]}
        body |= {"limit_bytes": LIMIT_BYTES, "sample_s": SAMPLE_S, "conversions": [asdict(peak) for peak in peaks]}
        write_results(arguments.json, body)
    return 0 if all(peak.peak_anonymous_bytes < LIMIT_BYTES for peak in peaks) else 1


def measure(folder: Path, variant: str, shape: dict[str, Any]) -> Iterator[Peak]:
    """Run the conversions of a variant one after the other in an empty folder."""
    _random_model(folder / "model", shape | VARIANTS[variant])
    for name, words in CONVERSIONS[variant].items():
        arguments = tuple(words.split())
        if "runs/b" in arguments and not (folder / "runs/b").exists():
            _run_of_two_replicas(folder / "runs/a/checkpoints/step_00000000", folder / "runs/b")
        started = time.perf_counter()
        peak = peak_anonymous_bytes([sys.executable, str(TOOL), *arguments, "--quiet"], folder)
        seconds = time.perf_counter() - started
        source = folder / arguments[1]
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        yield Peak(name, arguments, peak, size, seconds)


def peak_anonymous_bytes(command: Sequence[str], folder: Path) -> int:
    """Run a command to its end; the largest `RssAnon` of its process that was seen.

    Raises:
        TrainingError: it failed; with the end of its output.
    """
    with tempfile.TemporaryFile("w+", dir=folder) as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, anonymous_bytes(process.pid))
                time.sleep(SAMPLE_S)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            output.seek(0)
            raise TrainingError(f"{' '.join(command)} ended with {process.returncode}: {output.read()[-2000:]}")
    return peak


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process at this moment; 0 after it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def _random_model(folder: Path, model: dict[str, Any]) -> None:
    """A bf16 model directory with the bytes tokenizer."""
    import torch

    from stagdist.checkpoint.published.model_writer import ModelDirectoryWriter
    from stagdist.config.parts import ModelConfig
    from stagdist.data.tokenizer_files import load_tokenizer
    from stagdist.parallel.layout import model_parameters

    config, tokenizer = ModelConfig.model_validate(model), load_tokenizer("bytes")
    generator = torch.Generator().manual_seed(0)
    with ModelDirectoryWriter(folder, config, torch.bfloat16, tokenizer.end_of_document) as writer:
        for spec in model_parameters(config):
            writer.add(spec.name, (torch.randn(spec.shape, generator=generator) * 0.02).to(torch.bfloat16))
        tokenizer.save(writer.folder)


def _run_of_two_replicas(imported: Path, run: Path) -> None:
    """A checkpoint of the imported values with moments, every tensor cut in two."""
    from stagdist.checkpoint.training.index import KINDS, Fragment, index_of
    from stagdist.checkpoint.training.reader import TrainingReader
    from stagdist.checkpoint.training.writer import OwnedFragment, complete, part_name, write_fragments
    from stagdist.parallel.layout import model_parameters

    source, folder, owned, records = TrainingReader(imported), run / "checkpoints" / "step_00000000", [], {}
    folder.mkdir(parents=True)
    specs = model_parameters(source.model)
    for rank in range(2):
        fragments = []
        for spec in specs:
            cut = (rank * spec.numel // 2, (rank + 1) * spec.numel // 2)
            values = source.value(spec).flatten()[slice(*cut)]
            box = tuple((0, size) for size in spec.shape)
            place = Fragment(file=part_name(rank), key=spec.name, box=box, range=cut)
            fragments.append(OwnedFragment(spec.name, place, dict.fromkeys(KINDS, values)))
        records[part_name(rank)] = write_fragments(folder / part_name(rank), fragments)
        owned += [(one.name, one.place) for one in fragments]
    state = replace(source.state, optimizer_steps=1)
    complete(folder, source.config, state, index_of(owned, specs, KINDS), records)


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
