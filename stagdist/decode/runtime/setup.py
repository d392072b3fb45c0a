"""What all parts of a stage share: said once when the stage is built."""

from dataclasses import dataclass

from stagdist.config.parts import ModelConfig
from stagdist.decode.layers.runner import Lap
from stagdist.decode.layers.weights import Device, StageWeights
from stagdist.decode.runtime.transport import Transport
from stagdist.decode.topology import Limits, Topology


@dataclass(frozen=True)
class StageSetup:
    """Everything that sections, readout and executor of one rank have in common.

    Attributes:
        limits: slots, positions and chunk size.
        weights: of this rank.
        transport: communicators; None in a world of one.
        want_margins: also compute the difference between the best and the second best score of every choice.
        keep_logits: keep the logits of the last step, on ranks that hold a part of the head.
        lap: called with its name when a phase inside a section ends.
    """

    model: ModelConfig
    topology: Topology
    limits: Limits
    device: Device
    weights: StageWeights
    transport: Transport | None = None
    want_margins: bool = False
    keep_logits: bool = False
    lap: Lap | None = None

    @property
    def index(self) -> int:
        """The stage."""
        return 0 if self.transport is None else self.transport.stage

    @property
    def tensor_size(self) -> int:
        """Ranks that share every matrix."""
        return 1 if self.transport is None else self.transport.grid.tensor

    @property
    def link(self) -> Transport:
        """The communicators, where the schedule has a message to another rank."""
        assert self.transport is not None, "a message to another rank in a world of one"
        return self.transport
