"""Layout of decoding: sections, stages, lag and head. Pure integers, no torch."""

from dataclasses import dataclass
from typing import Literal

from stagdist.config.parts import ModelConfig
from stagdist.errors import ConfigError

HeadLayout = Literal["last", "sharded"]
HEAD_LAYOUTS: tuple[HeadLayout, ...] = ("last", "sharded")


@dataclass(frozen=True)
class Topology:
    """How the sections of a model are placed on pipeline stages.

    Attributes:
        num_sections: p.
        num_stages: pipeline stages; divides p.
        staggered: False for the sequential baseline.
        stagger: positions by which a section's memory lags.
        combined: the head reads a combination of all section outputs.
        head: `last`: the last stage holds the head; `sharded`: all stages share the vocabulary.
        recurrent: decoding skips section 1 (one stage, two sections).
        batched: sections with shared weights run as rows of one batch (one stage).

    Raises:
        ConfigError: the sections do not fit on the stages.
    """

    num_sections: int
    num_stages: int = 1
    staggered: bool = True
    stagger: int = 1
    combined: bool = False
    head: HeadLayout = "last"
    recurrent: bool = False
    batched: bool = False

    def __post_init__(self) -> None:
        if self.num_stages < 1 or self.num_sections % self.num_stages:
            raise ConfigError(
                f"{self.num_stages} stages cannot hold {self.num_sections} sections evenly; the number of stages must "
                f"divide {self.num_sections}: start fewer processes or set --tensor-parallel-size"
            )

    @property
    def last_stage(self) -> int:
        """Index of the last stage."""
        return self.num_stages - 1

    def sections(self, stage: int) -> range:
        """Sections of a stage."""
        each = self.num_sections // self.num_stages
        return range(stage * each, (stage + 1) * each)

    @property
    def lag(self) -> int:
        """Number of steps from a section output to its use in the next section."""
        return self.stagger if self.staggered else 0


@dataclass(frozen=True)
class Limits:
    """Sizes that are fixed when an engine starts.

    Attributes:
        num_slots: requests decoded together.
        max_context: positions of a request.
        chunk_size: positions of a prefill chunk, at most.
        prefix_caching: prompts reuse caches of a common prefix.
        inter_token_target_s: chunks are so small that a step with a chunk takes no longer, if possible.
    """

    num_slots: int
    max_context: int
    chunk_size: int
    prefix_caching: bool = True
    inter_token_target_s: float | None = None


def topology_for(
    model: ModelConfig, num_stages: int, head: HeadLayout = "last", *, recurrent: bool = False
) -> Topology:
    """The topology of a model on `num_stages` stages.

    Raises:
        ConfigError: the sections do not fit, or recurrent decoding is asked of a model that does not define it.
    """
    topology = Topology(
        num_sections=model.num_sections,
        num_stages=num_stages,
        staggered=model.staggered,
        stagger=model.stagger,
        combined=model.combine_sections,
        head=head,
        recurrent=recurrent,
        batched=num_stages == 1 and model.share_section_weights and model.stagger > 0 and not recurrent,
    )
    if recurrent:
        _check_recurrent(model, num_stages)
    return topology


def _check_recurrent(model: ModelConfig, num_stages: int) -> None:
    requirements = {
        "the sections do not share weights": model.share_section_weights,
        f"the model has {model.num_sections} sections, not 2": model.num_sections == 2,
        "section outputs are combined": not model.combine_sections,
        "stagger is 0": model.stagger != 0,
        f"there are {num_stages} stages, not 1": num_stages == 1,
    }
    if problems := [problem for problem, met in requirements.items() if not met]:
        raise ConfigError(
            "recurrent decoding is defined for two sections with shared weights on one stage; here "
            + ", ".join(problems)
        )
