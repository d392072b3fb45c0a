"""The world that a rank of a test belongs to, cut into one grid after the other."""

import os

from stagdist.parallel.grid import Grid
from stagdist.parallel.groups import Groups, build_groups
from stagdist.parallel.world import choose_device
from stagdist.training.engine.distributed import start_distributed


class World:
    """Joins the ranks of this launch, on the device that DS_ACCELERATOR names, when the first grid is asked for."""

    def __init__(self, timeout_s: float, *, deterministic: bool = False) -> None:
        self._timeout_s, self._deterministic = timeout_s, deterministic
        self._groups: Groups | None = None

    def groups(self, sizes: tuple[int, int, int]) -> Groups:
        """Process groups of a grid pipe x data x tensor; those of the grid before are given up."""
        grid = Grid(*sizes)
        if self._groups is None:
            device = choose_device(os.environ["DS_ACCELERATOR"], int(os.environ["LOCAL_RANK"]))
            self._groups = start_distributed(grid, device, self._timeout_s, deterministic=self._deterministic)
        elif self._groups.grid != grid:
            self._groups = build_groups(grid, self._timeout_s)
        return self._groups
