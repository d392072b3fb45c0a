"""The grid of ranks: rank <-> (pipe, data, tensor), tensor fastest. Pure integers, no torch.

The order is that of DeepSpeed's `PipeModelDataParallelTopology`, which is checked against it when training starts, and
of megatron-core's default.
"""

from dataclasses import dataclass

from stagdist.config.run_config import RunConfig
from stagdist.errors import ConfigError


@dataclass(frozen=True)
class Coordinate:
    """Position of one rank on the three axes, from 0."""

    pipe: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Grid:
    """Sizes of the three axes.

    Raises:
        ConfigError: an axis is smaller than 1.
    """

    pipe: int
    data: int
    tensor: int

    def __post_init__(self) -> None:
        if min(self.pipe, self.data, self.tensor) < 1:
            raise ConfigError(f"every axis of the grid must be at least 1, got {self}")

    def __str__(self) -> str:
        return f"pipe {self.pipe} x data {self.data} x tensor {self.tensor}"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipe * self.data * self.tensor

    def coordinate(self, rank: int) -> Coordinate:
        """Coordinate of a rank.

        Raises:
            ConfigError: the rank is outside the grid.
        """
        if not 0 <= rank < self.world_size:
            raise ConfigError(f"rank {rank} is outside a grid of {self.world_size} ranks ({self})")
        outer, tensor = divmod(rank, self.tensor)
        pipe, data = divmod(outer, self.data)
        return Coordinate(pipe, data, tensor)

    def rank(self, pipe: int, data: int, tensor: int) -> int:
        """Rank at a coordinate."""
        return (pipe * self.data + data) * self.tensor + tensor

    def tensor_groups(self) -> list[list[int]]:
        """Ranks that split the same matrices."""
        return [[self.rank(p, d, t) for t in range(self.tensor)] for p in range(self.pipe) for d in range(self.data)]

    def data_groups(self) -> list[list[int]]:
        """Ranks that hold the same weights and average their gradients."""
        return [[self.rank(p, d, t) for d in range(self.data)] for p in range(self.pipe) for t in range(self.tensor)]

    def pipe_groups(self) -> list[list[int]]:
        """Ranks that pass activations to each other, in the order of their stages."""
        return [[self.rank(p, d, t) for p in range(self.pipe)] for d in range(self.data) for t in range(self.tensor)]


def grid_for(config: RunConfig, world_size: int) -> Grid:
    """The grid of a configuration on `world_size` ranks; data parallelism takes the remaining ranks.

    Raises:
        ConfigError: the world size does not fit; lists every reason.
    """
    if problems := config.world_problems(world_size):
        raise ConfigError("; ".join(problems))
    pipe, tensor = config.pipeline_parallel_size, config.parallel.tensor_parallel_size
    return Grid(pipe, world_size // (pipe * tensor), tensor)
