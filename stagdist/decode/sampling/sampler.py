"""Chooses tokens from logits that are sharded over ranks: few candidates are sent, all ranks get the same token.

A step has two halves. `Sampler.candidates` turns a rank's slice of the logits into a short message, and
`Sampler.choose` turns the messages of all ranks into tokens. A message depends on the parameters of its rows:

- the likeliest token: one candidate of each rank (two with margins);
- sampling: the same, of logits with noise, since noise belongs to (seed, position, token);
- top-k: the k best of each rank; top-p and min-p without top-k: the complete slice.

With log-probabilities, each rank adds the log-sum-exp and the best of its unchanged logits. Ties go to the lowest id.
The host never waits for the device.

A captured step cannot depend on the host. `Sampler.choose_in_graph` does the same work in one of a few modes, with
parameters that it reads from tables on the device, which `admit` and `retire` change between steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagdist.decode.layers.weights import Device
from stagdist.decode.request import SamplingParams
from stagdist.decode.sampling.candidates import MINUS_INF, best_of, margins_of, merged, message, truncated
from stagdist.decode.sampling.logits_processor import LogitsProcessor
from stagdist.decode.sampling.noise import gumbel
from stagdist.decode.sampling.sampling_plan import Mode, SamplingPlan, is_plain, mode_of, plan_sampling
from stagdist.decode.sampling.slot_tables import SlotTables

if TYPE_CHECKING:
    from stagdist.decode.kernels.sampling import SamplingKernels

_NO_TOKEN = -1  # where a vocabulary has fewer tokens than log-probabilities were requested, or a row has no request


@dataclass
class Choice:
    """Tokens of one step, the same on every rank.

    Attributes:
        tokens: int64 [B].
        logprobs: float64 [B, 1 + 2n], n being the most that any row asked for: of the chosen token, then the ids of
            the n likeliest tokens, then theirs; where the vocabulary has fewer, id -1 and minus infinity. None when no
            row asked.
        margins: float64 [B], distance of the chosen token's deciding score to the second best one's, infinite when
            there was none; None unless the sampler was made for them. Tokens that truncation left out do not count.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    margins: Tensor | None = None


class Sampler:
    """Chooses the tokens of all slots on one rank, which holds a slice of the vocabulary.

    Args:
        num_slots: requests decoded at the same time at most; the token of a slot without a request has no meaning.
        vocab_size: real tokens, without padding.
        first_token: id of the first logit of this rank.
        num_tokens: logits of this rank; those past the vocabulary are padding and never looked at. May be 0.
        slice_size: the largest `num_tokens` of any rank, the same number on all of them.
        device: where the logits are.
        want_margins: also give the distance between the best and the second best score.
        captured: keep the tables that `choose_in_graph` reads: for each slot, 10 bytes for each of the rank's tokens.
        kernels: `choose_in_graph` runs Triton kernels.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        vocab_size: int,
        first_token: int,
        num_tokens: int,
        slice_size: int,
        device: Device,
        want_margins: bool = False,
        captured: bool = False,
        kernels: bool = False,
    ) -> None:
        self._vocab_size, self._slice_size = vocab_size, min(slice_size, vocab_size)
        self._first, self._size = first_token, max(0, min(num_tokens, vocab_size - first_token))
        self._device, self._want_margins = device, want_margins
        self._is_complete = self._slice_size == vocab_size  # one rank holds the complete head
        self._params: list[SamplingParams | None] = [None] * num_slots
        self._num_special = 0  # requests that are not plain
        self._ids = torch.arange(first_token, first_token + self._size, device=device.name)
        self._processor = LogitsProcessor(num_slots, first_token, self._size, device, captured)
        self._tables = SlotTables(num_slots, vocab_size, device) if captured else None
        self._kernels = self._load_kernels() if kernels else None
        self._plans: dict[tuple[int, ...], SamplingPlan | None] = {}
        self._modes: dict[tuple[int, ...], Mode] = {}

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        """Assign a slot to a request, replacing its previous one.

        Call it just before the request's first token is chosen: every row of its slot that is chosen afterwards counts
        as a token of the request.
        """
        self._assign(slot, params)
        self._processor.admit(slot, params, prompt_ids)

    def retire(self, slot: int) -> None:
        """Free a slot; does nothing if it is free."""
        self._assign(slot, None)

    def _assign(self, slot: int, params: SamplingParams | None) -> None:
        before, self._params[slot] = self._params[slot], params
        self._num_special += params is not None and not is_plain(params)
        self._num_special -= before is not None and not is_plain(before)
        self._plans.clear()
        self._modes.clear()
        if self._tables is not None and params is not before:
            self._tables.set(slot, params)

    def num_logprobs(self, slots: Sequence[int]) -> int | None:
        """Return the most log-probabilities that a request in these slots asks for; None if no request does."""
        asked = [self._params[slot] for slot in slots]
        return max((each.logprobs for each in asked if each and each.logprobs is not None), default=None)

    def likeliest_alone(self, logits: Tensor, slots: Sequence[int]) -> Choice | None:
        """Return the choice if it is the argmax of this rank's logits; None otherwise.

        Equals `candidates` and `choose`, without a message.
        """
        if self._plan(slots) is not None or self._size != self._vocab_size:
            return None
        return Choice(self._real(logits).max(-1).indices)

    def candidates(self, logits: Tensor, slots: Sequence[int], positions: Tensor) -> Tensor:
        """Return this rank's message to the others.

        Args:
            logits: of this rank's slice, any floating type [B, V], V at least its real tokens.
            slots: the slot of each row.
            positions: of the tokens to be chosen, int64 [B].

        Shapes: result float64 [B, width], the same width on all ranks: scores and ids of the candidates and, if
        log-probabilities are requested, their unchanged logits, the log-sum-exp, and the likeliest logits with ids.
        """
        return self._candidates(logits, self._plan(slots), positions)

    def choose(self, gathered: Tensor, slots: Sequence[int], positions: Tensor) -> Choice:
        """Choose tokens from the messages of all R ranks, in the order of their slices; penalties see them next.

        Shapes: gathered float64 [R, B, width]; positions int64 [B].
        """
        plan = self._plan(slots)
        choice = self._choose(gathered, plan, positions)
        if plan is not None:
            self._processor.take(choice.tokens, plan)
        return choice

    def modes(self) -> tuple[Mode, ...]:
        """Return the modes of captured steps that choose tokens, the same on all ranks; none with margins."""
        if self._want_margins:
            return ()
        return (Mode.GREEDY, Mode.SAMPLED, Mode.TRUNCATED)[: 3 if self._is_complete else 2]

    def mode(self, slots: Sequence[int]) -> Mode:
        """Return what a step of these slots needs."""
        if self._num_special == 0 and not self._want_margins:
            return Mode.GREEDY
        key = tuple(slots)
        if key not in self._modes:
            params = [self._params[slot] for slot in key]
            self._modes[key] = mode_of(params, is_complete=self._is_complete, want_margins=self._want_margins)
        return self._modes[key]

    def choose_in_graph(
        self, mode: Mode, logits: Tensor, positions: Tensor, gather: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """Choose the tokens of slots 0 to B - 1, all on the device, so that the work can be captured and repeated.

        Args:
            mode: one of `modes()`.
            logits: of this rank's slice, any floating type [B, V], V at least its real tokens.
            positions: of the tokens to be chosen; 0 or less for a slot without a request, whose token has no meaning.
            gather: stacks the message of all R ranks that hold a part of the head, in the order of their slices:
                float64 [B, width] -> [R, B, width]. None for one rank.

        Shapes: positions int64 [B]; result int64 [B], the same on all ranks.
        """
        assert mode in self.modes(), f"{mode} is not for captured steps of this layout"
        assert self._tables is not None, "the sampler was made without tables for captured steps"
        plan = None
        if self._kernels is not None:
            if mode is Mode.GREEDY:
                return self._kernels.greedy(logits, gather)
            if mode is Mode.SAMPLED:
                return self._kernels.sampled(logits, positions, gather)
            return self._kernels.truncated(logits, positions)
        if mode is not Mode.GREEDY:
            truncates = mode is Mode.TRUNCATED
            plan = self._tables.plan(len(positions), self._slice_size if truncates else 1, truncates=truncates)
        elif gather is None:
            return self._real(logits).max(-1).indices
        candidates = self._candidates(logits, plan, positions)
        gathered = candidates[None] if gather is None else gather(candidates)
        tokens = self._choose(gathered, plan, positions).tokens
        if plan is not None:
            self._processor.take(torch.where(positions > 0, tokens, _NO_TOKEN), plan)
        return tokens

    def prompt_scores(self, logits: Tensor, targets: Tensor, count: int) -> Tensor:
        """Return this rank's message about tokens that are given: a block of rows of a prompt.

        Args:
            logits: of this rank's slice, any floating type [rows, V], V at least its real tokens.
            targets: the token that follows each row, int64 [rows].
            count: likeliest tokens to report.

        Shapes: result float64 [rows, 2 + 2 count]: the logit of the target, the log-sum-exp, and the likeliest logits
        with ids; minus infinity, and id -1, where the slice lacks them. `merge_prompt_scores` merges the messages of
        all ranks.
        """
        raw, local = self._real(logits).double(), (targets - self._first)[:, None]
        columns = [(raw.logsumexp(-1, keepdim=True), 1, MINUS_INF), *self._likeliest(raw, count, count)]
        if not self._size:
            return message([(raw, 1, MINUS_INF), *columns])
        of_target = raw.gather(1, local.clamp(0, self._size - 1))
        mine = (local >= 0) & (local < self._size)
        return message([(of_target.masked_fill(~mine, MINUS_INF), 1, 0), *columns])

    def _candidates(self, logits: Tensor, plan: SamplingPlan | None, positions: Tensor) -> Tensor:
        raw = self._real(logits)
        if plan is None:
            values, index = best_of(raw, 1)
            return message([(values, 1, MINUS_INF), (self._ids_of(index), 1, 0)])
        raw, count = raw.double(), plan.num_candidates
        values, index = best_of(self._score(raw, plan, positions), count)
        columns = [(values, count, MINUS_INF), (self._ids_of(index), count, 0)]
        if plan.num_logprobs is not None:
            columns += [(raw.gather(1, index), count, MINUS_INF), (raw.logsumexp(-1, keepdim=True), 1, MINUS_INF)]
            columns += self._likeliest(raw, plan.num_likeliest, plan.num_likeliest)
        return message(columns)

    def _choose(self, gathered: Tensor, plan: SamplingPlan | None, positions: Tensor) -> Choice:
        if plan is None:
            best = gathered[:, :, 0].argmax(0, keepdim=True)  # the first of equals has the lowest id
            return Choice(gathered[:, :, 1].gather(0, best)[0].long())
        count = plan.num_candidates
        scores, ids = merged(gathered[:, :, :count]), merged(gathered[:, :, count : 2 * count]).long()
        # Sorted only for truncation: log-probabilities look their token up by id, in any order.
        kept, kept_ids = (scores, ids) if plan.truncated is None else truncated(scores, ids, plan, positions)
        best_score = kept.amax(-1, keepdim=True)
        tokens = torch.where(kept == best_score, kept_ids, self._vocab_size).amin(-1)
        tokens = tokens.clamp(max=self._vocab_size - 1)  # NaN logits must not give an id past the end
        return Choice(
            tokens,
            None if plan.num_logprobs is None else _logprobs(gathered, plan, plan.num_logprobs, ids, tokens),
            margins_of(kept) if self._want_margins else None,
        )

    def _likeliest(self, raw: Tensor, count: int, width: int) -> list[tuple[Tensor, int, float]]:
        """Columns of a message: the largest logits of each row, and their ids."""
        values, index = best_of(raw, count) if count else (raw[:, :0], self._ids[:0].expand(len(raw), 0))
        return [(values, width, MINUS_INF), (self._ids_of(index), width, _NO_TOKEN)]

    def _plan(self, slots: Sequence[int]) -> SamplingPlan | None:
        """None: every row takes its likeliest token and asks for nothing else."""
        if self._num_special == 0 and not self._want_margins:
            return None
        key = tuple(slots)
        if key not in self._plans:
            self._plans[key] = plan_sampling(
                key,
                [self._params[slot] for slot in slots],
                self._device,
                vocab_size=self._vocab_size,
                slice_size=self._slice_size,
                want_margins=self._want_margins,
            )
        return self._plans[key]

    def _load_kernels(self) -> "SamplingKernels":
        from stagdist.decode.kernels.sampling import SamplingKernels, SamplingTables  # imports Triton

        assert self._tables is not None
        state = SamplingTables(self._tables.integers, **self._processor.tensors())
        return SamplingKernels(state, self._first, self._size, self._vocab_size)

    def _real(self, logits: Tensor) -> Tensor:
        """The logits without padding."""
        return logits if logits.shape[1] == self._size else logits[:, : self._size]

    def _ids_of(self, index: Tensor) -> Tensor:
        """The ids of tokens of this rank's slice."""
        return index + self._first if self._first else index

    def _score(self, raw: Tensor, plan: SamplingPlan, positions: Tensor) -> Tensor:
        """Logits with what the processor changes and temperature, and with noise where nothing is truncated: [B, V]."""
        scores = self._processor.apply(raw, plan, positions)
        if plan.temperature is not None:
            scores = scores / plan.temperature
        if plan.noisy is not None:
            scores = scores + gumbel(plan.seeds, positions, self._ids).mul_(plan.noisy)
        return scores


def merge_prompt_scores(gathered: Tensor, count: int) -> Tensor:
    """Merge the messages of `Sampler.prompt_scores` of all R ranks, in the order of their slices.

    Shapes: gathered float64 [R, rows, 2 + 2 count]; result float64 [rows, 1 + 2 count], columns as `Choice.logprobs`.
    """
    of_target, total, likeliest, ids = gathered.split([1, 1, count, count], dim=2)
    return _relative(of_target.amax(0), total.logsumexp(0), likeliest, ids, count)


def _logprobs(gathered: Tensor, plan: SamplingPlan, requested: int, ids: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of the chosen tokens."""
    count, sent = plan.num_candidates, plan.num_likeliest
    _, _, raw, total, likeliest, their_ids = gathered.split([count, count, count, 1, sent, sent], dim=2)
    chosen = torch.where(ids == tokens.unsqueeze(-1), merged(raw), MINUS_INF).amax(-1, keepdim=True)
    return _relative(chosen, total.logsumexp(0), likeliest, their_ids, requested)


def _relative(own: Tensor, total: Tensor, likeliest: Tensor, ids: Tensor, requested: int) -> Tensor:
    """[of the token, ids of the likeliest, theirs] of each row.

    Shapes: own and total [B, 1]; likeliest and ids [R, B, sent].
    """
    best, order = merged(likeliest).sort(dim=-1, descending=True, stable=True)
    best, best_ids = best[:, :requested] - total, merged(ids).gather(1, order)[:, :requested]
    return message([(own - total, 1, 0), (best_ids, requested, _NO_TOKEN), (best, requested, MINUS_INF)])
