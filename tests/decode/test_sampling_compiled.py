"""Kernels that choose tokens compile ahead of time for GPUs, without spilling registers."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stagdist.decode.kernels import sampling, scores, truncation

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
POINTERS = {
    "logits": "bf16",
    **dict.fromkeys(("positions", "table", "may_end", "tokens"), "i64"),
    **dict.fromkeys(("ends", "seen"), "u8"),
    **dict.fromkeys(("scores", "messages", "merged", "score_messages"), "fp64"),
    **dict.fromkeys(("states", "partials", "next_states", "next_partials"), "fp64"),
    "bias": "fp32",
    "counts": "i32",
}
LARGE = 262144


def kernels(vocab: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each kernel with its constants, in every variant that `SamplingKernels` launches."""
    block = max(1024, triton.next_power_of_2(triton.cdiv(vocab, sampling.MOST_BLOCKS)))
    count = triton.next_power_of_2(triton.cdiv(vocab, 1024))
    blocks = triton.next_power_of_2(triton.cdiv(vocab, block))
    sizes = {"COUNT": count, "BLOCKS": blocks, "BLOCK": block, "CHUNK": sampling.CHUNK}
    yield scores.likeliest_kernel, {"BLOCK": 1024}
    yield scores.score_kernel, {"BLOCK": 1024}
    yield scores.score_kernel, {"BLOCK": 1024, "scores": None}
    yield scores.merge_kernel, {"COUNT": count, "RECORDS": False, "merged": None, "positions": None}
    yield scores.merge_kernel, {"COUNT": count, "RECORDS": True, "merged": None}
    yield scores.merge_kernel, {"COUNT": count, "RECORDS": False, "tokens": None, "positions": None}
    yield truncation.narrow_kernel, {"FIRST": True, **sizes}
    yield truncation.narrow_kernel, {"FIRST": False, **sizes}
    yield truncation.pick_kernel, sizes


def spilled_bytes(kernel: Any, constants: dict[str, Any], capability: int, folder: Path) -> int:
    """Compile a kernel and return the bytes of registers that it keeps in memory."""
    names = kernel.arg_names
    types = {name: f"*{POINTERS[name]}" if name in POINTERS else "i32" for name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name][0] == "*"}
    source = ASTSource(kernel, signature, constexprs, aligned)
    options = sampling.EXACT if kernel not in (scores.likeliest_kernel, scores.merge_kernel) else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    ptx = folder / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    architecture = re.findall(r"\.target (\w+)", compiled.asm["ptx"])[0]
    command = [str(PTXAS), "-v", f"--gpu-name={architecture}", str(ptx), "-o", str(folder / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", report)))


def check(vocab: int, capability: int, folder: Path) -> None:
    for kernel, constants in kernels(vocab):
        assert spilled_bytes(kernel, constants, capability, folder) == 0, (kernel.__name__, constants)


def test_kernels_compile_for_the_newest_gpu_and_largest_vocabulary(tmp_path: Path) -> None:
    check(LARGE, 90, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("vocab", "capability"), [(LARGE, 80), (32000, 80), (32000, 90)])
def test_kernels_compile_for_other_gpus_and_vocabularies(vocab: int, capability: int, tmp_path: Path) -> None:
    check(vocab, capability, tmp_path)


@pytest.mark.slow
def test_registers_that_do_not_fit_are_noticed(tmp_path: Path) -> None:
    """The negative control: four times the tokens at a time."""
    constants = {"FIRST": True, "COUNT": 1, "BLOCKS": 1, "BLOCK": 2048, "CHUNK": 4 * sampling.CHUNK}
    assert spilled_bytes(truncation.narrow_kernel, constants, 90, tmp_path) > 0
