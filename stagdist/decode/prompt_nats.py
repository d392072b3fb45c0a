"""Loss of every token of a text, computed by the prompt path of the decoding engine."""

from functools import lru_cache

import torch
from torch import Tensor

from stagdist.checkpoint.weight_source import WeightSource
from stagdist.decode.control import Admission
from stagdist.decode.layers.weights import Device, Shard, WeightFormat, WeightLoader, check_weight_format
from stagdist.decode.request import SamplingParams
from stagdist.decode.runtime.hosted_sections import Call, StageSections
from stagdist.decode.runtime.readout import Readout
from stagdist.decode.runtime.setup import StageSetup
from stagdist.decode.topology import Limits, topology_for
from stagdist.parallel.device import choose_attention
from stagdist.parallel.layout import ParameterSpec

_SCORED = SamplingParams(max_new_tokens=0, prompt_logprobs=0)


class PromptNats:
    """A complete model on one device, with the layers, weights and scores of the decoding engine.

    Args:
        window: positions of a row, at most.

    Raises:
        ConfigError: the weights do not work in the dtype.
    """

    def __init__(self, source: WeightSource, device: str, dtype: torch.dtype, window: int, weights: WeightFormat):
        check_weight_format(weights, dtype)
        choose_attention(training=False)
        model, where = source.model, Device(device, dtype)
        weight = lru_cache(maxsize=1)(source.weight)

        def read(spec: ParameterSpec, dim: int, start: int, stop: int) -> Tensor:
            return weight(spec).narrow(dim, start, stop - start)

        self._topology = topology_for(model, 1)
        held = WeightLoader(model, read, Shard(), where, weights).stage(self._topology, 0)
        setup = StageSetup(model, self._topology, Limits(1, window, window), where, held)
        self._sections, self._readout = StageSections(setup), Readout(setup)

    def __call__(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Nats of every label. Shapes: int64 [B, S] each -> fp64 [B, S]."""
        return torch.stack([self._row(*row) for row in zip(input_ids, labels, strict=True)])

    def _row(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        prompt = self._sections.prompt(0, Admission(tuple(input_ids.tolist()), _SCORED))
        call = Call([0], [len(input_ids)], prompt=prompt, ends=True)
        for section in self._topology.sections(0):
            self._sections.run_chunk(call, section)
        if self._topology.combined:
            self._readout.combine(call.outputs, None)
        self._readout.score(call.outputs[self._topology.num_sections - 1], labels, 0)
        scores = self._readout.scores.logprobs
        assert scores is not None
        return -scores[:, 0]
