"""The distributed runs that are compared with the reference, as data."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stagdist.config.run_config import RunConfig
from tests.reference.stagformer import Parameters, random_parameters
from tests.reference.variants import BASE, VARIANTS

SEQUENCE = 12
GLOBAL_BATCH = 8
LEARNING_RATES = (1e-3, 5e-4, 8e-4)
SEED = 5


@dataclass(frozen=True)
class Case:
    """One distributed run.

    With the defaults, clipping is active and Adam's eps matters, so a gradient of the wrong size changes the weights.
    Plain Adam would cancel the size.

    Attributes:
        model: keys added to `BASE`.
        grid: sizes of the axes pipe, data, tensor.
        fault: name of a planted fault; see `tests.training.faults`.
        device: `cpu` or `cuda`.
        deterministic: train with deterministic kernels only; all cases of one world must agree.
        nightly: `make test-all` alone runs it.
    """

    name: str
    model: dict[str, Any] = field(hash=False)
    grid: tuple[int, int, int]
    checkpointing: str = "none"
    precision: str = "fp32"
    micro_batch_size: int = 2
    max_grad_norm: float = 0.1
    eps: float = 1e-3
    fault: str | None = None
    device: str = "cpu"
    sequence_length: int = SEQUENCE
    deterministic: bool = False
    nightly: bool = False

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        pipe, data, tensor = self.grid
        return pipe * data * tensor

    @property
    def model_keys(self) -> dict[str, Any]:
        """The full model configuration."""
        return BASE | self.model

    def config(self) -> RunConfig:
        """The run's configuration."""
        values = {
            "name": "parity",
            "model": self.model_keys,
            "parallel": {"pipeline_parallel_size": self.grid[0], "tensor_parallel_size": self.grid[2]},
            "data": {"sequence_length": self.sequence_length},
            "training": {
                "steps": len(LEARNING_RATES),
                "global_batch_size": GLOBAL_BATCH,
                "micro_batch_size": self.micro_batch_size,
                "precision": self.precision,
                "activation_checkpointing": self.checkpointing,
                "deterministic": self.deterministic,
            },
            "optimizer": {"eps": self.eps, "max_grad_norm": self.max_grad_norm},
        }
        return RunConfig.model_validate(values)

    def parameters(self) -> Parameters:
        """Starting values, norms and null vectors moved away from their constants."""
        return random_parameters(self.model_keys, SEED, perturb=True)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Input tokens and labels of every step, each [GLOBAL_BATCH, sequence_length]."""
        generator = torch.Generator().manual_seed(SEED)
        size = (len(LEARNING_RATES), GLOBAL_BATCH, self.sequence_length + 1)
        tokens = torch.randint(self.model_keys["vocab_size"], size, generator=generator)
        return [(step[:, :-1], step[:, 1:].contiguous()) for step in tokens]

    def text(self) -> Tensor:
        """Tokens to ask for the logits of, shorter than a sequence; [1, S]."""
        return self.batches()[0][0][:1, : self.sequence_length - 3]


ON_TENSOR_RANKS = {"combined", "sequential, tied", "one section, tied"}
"""Variants that `make test` trains on two tensor ranks of each stage. tests/model/test_model.py has all of them on two
tensor ranks, logits and gradients in fp64; stages of one rank train all of them."""
IN_ONE_PROCESS = {
    "one section", "one section, tied", "three sections", "four sections", "stagger 2", "shared", "tied", "sequential",
}  # fmt: skip
"""Variants that `make test` also trains in one process, for whose math the same holds."""
NIGHTLY = {
    "checkpointing on 2x2x2",  # as below on 2x1x2 and 3x1x2, and without checkpointing on 2x2x2
    "four sections on two stages of two tensor ranks",  # on two stages, and four stages of one rank
    "four sections on 4x1x1",  # with combined sections on this grid
    "tied, replicated on 2x2x1",  # in bf16 with shared sections too
    "bf16, default on 2x2x1",
    "tied gradients stay apart, shared on 2x1x1",
    "memory is not shifted, default on 2x1x1",  # in bf16, whose tolerance is larger
    "a gradient is infinite on 2x1x1, fp32",
    "a gradient is infinite on 1x2x1, bf16",
}
"""Other cases that `make test` leaves out: the cases that the comments name check the same."""
SHARED_AND_TIED = VARIANTS["shared"] | {"tie_word_embeddings": True}


def _grids() -> list[Case]:
    sizes = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)]
    return [Case(f"grid {label(size)}", {}, size) for size in sizes]


def label(grid: tuple[int, int, int]) -> str:
    """A grid as text: 2x1x2."""
    return "x".join(map(str, grid))


def _variants() -> list[Case]:
    """Every variant in one process, on a stage per section, and the latter with two tensor ranks."""
    cases = []
    for name, model in VARIANTS.items():
        sections = len(model.get("section_layers", BASE["section_layers"]))
        for grid in dict.fromkeys([(1, 1, 1), (sections, 1, 1), (sections, 1, 2)]):
            usual = ON_TENSOR_RANKS if grid[2] == 2 else IN_ONE_PROCESS if grid == (1, 1, 1) else VARIANTS
            size = 2 if (name, grid) == ("four combined sections", (4, 1, 1)) else 4  # as many micro-batches as stages
            cases.append(
                Case(f"{name} on {label(grid)}", model, grid, micro_batch_size=size, nightly=name not in usual)
            )
    return cases


def _several_sections_per_stage() -> list[Case]:
    four = VARIANTS["four combined sections"] | {"share_section_weights": True, "tie_word_embeddings": True}
    return [
        Case("four sections on two stages", VARIANTS["four sections"], (2, 1, 1)),
        Case("four sections on two stages of two tensor ranks", VARIANTS["four sections"], (2, 1, 2)),
        Case("four sections with shared, tied and combined weights on two stages", four, (2, 1, 1)),
        Case("four sections with shared, tied and combined weights on two stages, replicated", four, (2, 2, 1)),
        Case("four sequential sections on two stages", {"section_layers": [1, 1, 2, 1], "connection": "sequential"},
             (2, 1, 1)),
    ]  # fmt: skip


def _checkpointing() -> list[Case]:
    everything = VARIANTS["three sections with everything"]
    return [
        Case("checkpointing on 1x1x1", {}, (1, 1, 1), checkpointing="layer"),
        Case("checkpointing on 2x1x1", {}, (2, 1, 1), checkpointing="layer"),
        Case("checkpointing, shared on 2x1x2", VARIANTS["shared"], (2, 1, 2), checkpointing="layer"),
        Case("checkpointing on 2x2x2", {}, (2, 2, 2), checkpointing="layer"),
        Case("checkpointing, everything on 3x1x2", everything, (3, 1, 2), checkpointing="layer"),
        Case("checkpointing, sequential on 2x1x1", VARIANTS["sequential"], (2, 1, 1), checkpointing="layer"),
    ]


def _batching_and_optimizer() -> list[Case]:
    """Micro-batches of other sizes, and the optimizer as the package sets it by default."""
    return [
        Case("one micro-batch on 2x1x1", {}, (2, 1, 1), micro_batch_size=8),
        Case("micro-batches of one on 2x1x1", {}, (2, 1, 1), micro_batch_size=1),
        Case("default optimizer on 2x1x1", {}, (2, 1, 1), max_grad_norm=1.0, eps=1e-8),
        Case("tied, replicated on 2x2x1", VARIANTS["tied"], (2, 2, 1)),
        Case("shared and tied on 2x2x2", SHARED_AND_TIED, (2, 2, 2)),
        Case("no clipping on 1x2x2", {}, (1, 2, 2), max_grad_norm=0.0),
    ]


def _marked(cases: list[Case]) -> list[Case]:
    """The cases, with those of `NIGHTLY` marked."""
    return [replace(case, nightly=case.nightly or case.name in NIGHTLY) for case in cases]


CASES = _marked(_grids() + _variants() + _several_sections_per_stage() + _checkpointing() + _batching_and_optimizer())
"""Runs in fp32 that must equal the reference."""

BF16_CASES = _marked(
    [
        Case(f"bf16, {name} on {label(grid)}", VARIANTS.get(name, {}), grid, precision="bf16")
        for name, grid in (
            ("default", (1, 1, 1)),
            ("default", (2, 1, 1)),
            ("tied", (2, 1, 2)),
            ("three sections with everything", (3, 1, 1)),
            ("default", (2, 2, 1)),
        )
    ]
    + [Case("bf16, shared and tied on 2x2x1", SHARED_AND_TIED, (2, 2, 1), precision="bf16")]
)
"""Runs in bf16, near the fp32 reference."""

SEVERAL_BLOCKS = Case(
    "160 tokens, heads of 64",
    {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "max_position_embeddings": 160},
    (1, 1, 1),
    sequence_length=160,
)
"""Attention kernels of a GPU work on this sequence in several blocks. A hand-off has 80 KiB in bf16."""

FAULTY_CASES = _marked(
    [
        Case(f"{fault}, {name} on {label(grid)}", VARIANTS.get(name, {}), grid, precision=precision, fault=fault)
        for fault, name, grid, precision in (
            ("tied gradients stay apart", "tied", (2, 1, 1), "fp32"),
            ("tied gradients stay apart", "shared", (2, 1, 1), "fp32"),
            ("tied gradients stay apart", "default", (2, 1, 1), "bf16"),
            ("memory is not shifted", "default", (1, 1, 1), "fp32"),
            ("memory is not shifted", "default", (2, 1, 1), "fp32"),
            ("memory is not shifted", "default", (2, 1, 1), "bf16"),
            ("replicas read the same samples", "default", (1, 2, 1), "fp32"),
            ("tensor ranks keep their partial gradients", "default", (1, 1, 2), "fp32"),
            ("clipped by half the norm", "default", (2, 1, 1), "fp32"),
            ("norm counts copies twice", "tied", (2, 1, 1), "fp32"),
        )
    ]
)
"""Runs with a planted fault that the comparison must notice."""

BAD_STEP = 1
BAD_STEP_CASES = _marked([
    Case(f"a gradient is infinite on {label(grid)}, {precision}", {}, grid, precision=precision,
         fault="a gradient is infinite")
    for grid in ((2, 1, 1), (1, 2, 1))
    for precision in ("fp32", "bf16")
])  # fmt: skip
"""Runs in which the first stage meets an infinite gradient in step `BAD_STEP`."""

GPU_CASES = [
    replace(case, name=f"{case.name}, cuda", device="cuda", nightly=False)
    for case in CASES + BF16_CASES
    if case.world_size == 1
]
"""The runs of one process again, on a CUDA device."""


def for_each(cases: list[Case], is_nightly: Callable[[Case], bool] = lambda case: case.nightly) -> pytest.MarkDecorator:
    """Run a test with each of these cases, with the nightly ones in `make test-all` alone."""
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * is_nightly(case)) for case in cases]
    )
