"""The common inputs of all parts of a stage."""

from dataclasses import dataclass

from stagdist.config.parts import ModelConfig
from stagdist.decode.layers.runner import Lap
from stagdist.decode.layers.weights import Device, StageWeights
from stagdist.decode.runtime.transport import Transport
from stagdist.decode.topology import Limits, Topology


@dataclass(frozen=True)
class StageSetup:
    """Inputs of the sections, the readout and the executor of one rank.

    Attributes:
        weights: of this rank.
        transport: communicators; None in a world of one.
        want_margins: also compute the difference between the best and the second best score of every choice.
        lap: called with its name when a phase inside a section ends.
        fixed: steps have fixed shapes and addresses, so that they can be graphs.
        kernels: the layers of steps of fixed shape, and the choice of their tokens, are Triton kernels.
        native: the layers of steps are compiled C++, on a CPU.
    """

    model: ModelConfig
    topology: Topology
    limits: Limits
    device: Device
    weights: StageWeights
    transport: Transport | None = None
    want_margins: bool = False
    lap: Lap | None = None
    fixed: bool = False
    kernels: bool = False
    native: bool = False

    @property
    def index(self) -> int:
        """Index of the stage."""
        return 0 if self.transport is None else self.transport.stage

    @property
    def tensor_size(self) -> int:
        """Number of ranks that share every matrix."""
        return 1 if self.transport is None else self.transport.grid.tensor

    @property
    def link(self) -> Transport:
        """The transport; fails in a world of one."""
        assert self.transport is not None, "a message to another rank in a world of one"
        return self.transport
