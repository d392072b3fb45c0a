"""Chooses tokens from logits that are sharded over ranks: few candidates are sent, all ranks get the same token.

A step has two halves. `Sampler.candidates` turns a rank's slice of the logits into a short message, and
`Sampler.choose` turns the messages of all ranks into tokens. A message depends on the parameters of its rows:

- the likeliest token: one candidate of each rank (two with margins);
- sampling: the same, of logits with noise, since noise belongs to (seed, position, token);
- top-k: the k best of each rank; top-p and min-p without top-k: the complete slice.

With log-probabilities, each rank adds the log-sum-exp and the best of its unchanged logits. Ties go to the lowest id.
The host never waits for the device, except in the first step after an `admit` or `retire`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stagdist.decode.layers.weights import Device
from stagdist.decode.noise import gumbel
from stagdist.decode.request import SamplingParams
from stagdist.decode.sampling_plan import SamplingPlan, is_plain, plan_sampling

_MAX_PLANS = 64
_MINUS_INF = float("-inf")
_NO_TOKEN = -1  # fills the message of a slice that has fewer tokens than the message has columns


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

    tokens: torch.Tensor
    logprobs: torch.Tensor | None = None
    margins: torch.Tensor | None = None


class Sampler:
    """Chooses the tokens of all slots on one rank, which holds a slice of the vocabulary.

    Args:
        num_slots: requests decoded at the same time at most; a slot without a request takes the likeliest token.
        vocab_size: real tokens, without padding.
        first_token: id of the first logit of this rank.
        num_tokens: logits of this rank; those past the vocabulary are padding and never looked at. May be 0.
        slice_size: the largest `num_tokens` of any rank, the same number on all of them.
        device: where the logits are.
        want_margins: also give the distance between the best and the second best score.

    Raises:
        ValueError: the slice does not fit.
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
    ) -> None:
        real = max(0, min(num_tokens, vocab_size - first_token))
        if first_token < 0 or num_tokens < 0 or not slice_size > 0 or real > slice_size:
            raise ValueError(
                f"a slice of {num_tokens} tokens from {first_token} of {vocab_size} does not fit slices of {slice_size}"
            )
        self._vocab_size = vocab_size
        self._first = first_token
        self._size = real
        self._slice_size = min(slice_size, vocab_size)
        self._device = device
        self._want_margins = want_margins
        self._params: list[SamplingParams | None] = [None] * num_slots
        self._num_special = 0
        self._ids = torch.arange(first_token, first_token + real, device=device.name)
        self._seen: torch.Tensor | None = None  # bool [slots, tokens], made for the first request that needs it
        self._plans: dict[tuple[int, ...], SamplingPlan | None] = {}

    def admit(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        """Assign a slot to a request, replacing its previous one."""
        self.retire(slot)
        self._params[slot] = params
        self._num_special += not is_plain(params)
        if params.repetition_penalty != 1:
            self._mark_prompt(slot, prompt_ids)

    def retire(self, slot: int) -> None:
        """Free a slot; does nothing if it is free."""
        if not 0 <= slot < len(self._params):
            raise ValueError(f"slot {slot} is none of 0 to {len(self._params) - 1}")
        params, self._params[slot] = self._params[slot], None
        self._num_special -= params is not None and not is_plain(params)
        self._plans.clear()

    def num_logprobs(self, slots: Sequence[int]) -> int | None:
        """Return the most log-probabilities that a request in these slots asks for; None if no request does."""
        asked = [self._params[slot] for slot in slots]
        return max((each.logprobs for each in asked if each and each.logprobs is not None), default=None)

    def width(self, slots: Sequence[int]) -> int:
        """Return the columns of a message of `candidates` for these slots, the same on all ranks."""
        plan = self._plan(slots)
        return 2 if plan is None else plan.width

    def likeliest_alone(self, logits: torch.Tensor, slots: Sequence[int]) -> Choice | None:
        """Return the choice if it is the argmax of this rank's logits; None otherwise.

        Equals `candidates` and `choose`, without a message.
        """
        if self._plan(slots) is not None or self._size != self._vocab_size:
            return None
        local = logits if logits.shape[1] == self._size else logits[:, : self._size]
        return Choice(local.max(-1).indices)

    def candidates(self, logits: torch.Tensor, slots: Sequence[int], positions: torch.Tensor) -> torch.Tensor:
        """Return this rank's message to the others.

        Args:
            logits: of this rank's slice, any floating type [B, V], V at least its real tokens.
            slots: the slot of each row.
            positions: of the tokens to be chosen, int64 [B].

        Shapes: result float64 [B, width].
        """
        plan = self._plan(slots)
        local = logits if logits.shape[1] == self._size else logits[:, : self._size]
        if plan is None:
            return self._likeliest(local)
        message = self._empty_message(len(slots), plan)
        if self._size:
            self._fill(message, local.double(), plan, positions)
        return message

    def choose(self, gathered: torch.Tensor, slots: Sequence[int], positions: torch.Tensor) -> Choice:
        """Choose tokens from the messages of all R ranks, in the order of their slices.

        Shapes: gathered float64 [R, B, width]; positions int64 [B].
        """
        plan = self._plan(slots)
        if plan is None:
            if gathered.shape[0] == 1:
                return Choice(gathered[0, :, 1].long())
            best = gathered[:, :, 0].argmax(0, keepdim=True)  # the first of equals: slices are in order
            return Choice(gathered[:, :, 1].gather(0, best)[0].long())
        count = plan.num_candidates
        scores = _merge(gathered[:, :, :count])
        ids = _merge(gathered[:, :, count : 2 * count]).long()
        # Sorted only for truncation: log-probabilities look their token up by id, in any order.
        kept, kept_ids = _truncate(scores, ids, plan, positions) if plan.any_truncated else (scores, ids)
        best_score = kept.amax(-1, keepdim=True)
        tokens = torch.where(kept == best_score, kept_ids, self._vocab_size).amin(-1)
        tokens = tokens.clamp(0, self._vocab_size - 1)  # NaN logits must not give an id past the end
        return Choice(
            tokens,
            None if plan.num_logprobs is None else _logprobs(gathered, plan, ids, tokens),
            _margins(kept) if self._want_margins else None,
        )

    def observe(self, tokens: torch.Tensor, slots: Sequence[int]) -> None:
        """Count chosen tokens, int64 [B], as seen by the repetition penalty of their slots."""
        plan = self._plan(slots)
        if plan is not None and plan.any_penalty and self._size:
            assert self._seen is not None
            local = tokens - self._first
            mine = (local >= 0) & (local < self._size)
            place = plan.slots, local.clamp(0, self._size - 1)
            self._seen[place] = self._seen[place] | mine

    def _plan(self, slots: Sequence[int]) -> SamplingPlan | None:
        """None: every row takes its likeliest token and asks for nothing else."""
        if self._num_special == 0 and not self._want_margins:
            return None
        key = tuple(slots)
        if key not in self._plans:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            params = [self._params[slot] for slot in slots]
            self._plans[key] = plan_sampling(
                key, params, self._device, self._vocab_size, self._slice_size, self._want_margins
            )
        return self._plans[key]

    def _mark_prompt(self, slot: int, prompt_ids: Sequence[int]) -> None:
        if self._seen is None:
            self._seen = torch.zeros(len(self._params), self._size, dtype=torch.bool, device=self._device.name)
        mine = sorted({token - self._first for token in prompt_ids if 0 <= token - self._first < self._size})
        self._seen[slot] = False
        if mine:
            self._seen[slot].index_fill_(0, self._device.upload(mine, torch.int64), True)

    def _likeliest(self, local: torch.Tensor) -> torch.Tensor:
        """Return [best logit, its id] of each row with few operations, because this runs at every step."""
        message = torch.empty(local.shape[0], 2, dtype=torch.float64, device=local.device)
        if self._size == 0:
            message[:, 0], message[:, 1] = _MINUS_INF, 0.0
            return message
        values, index = local.max(-1)
        message[:, 0] = values
        message[:, 1] = index + self._first if self._first else index
        return message

    def _empty_message(self, batch: int, plan: SamplingPlan) -> torch.Tensor:
        message = torch.full((batch, plan.width), _MINUS_INF, dtype=torch.float64, device=self._device.name)
        message[:, plan.num_candidates : 2 * plan.num_candidates] = _NO_TOKEN
        if plan.num_logprobs is not None:
            message[:, plan.width - plan.num_likeliest :] = _NO_TOKEN
        return message

    def _fill(self, message: torch.Tensor, raw: torch.Tensor, plan: SamplingPlan, positions: torch.Tensor) -> None:
        """Write scores, ids, [unchanged logits, log-sum-exp, likeliest logits, their ids]."""
        count = plan.num_candidates
        values, index = _best(self._score(raw, plan, positions), count)
        found = index.shape[1]
        message[:, :found] = values
        message[:, count : count + found] = index + self._first
        if plan.num_logprobs is None:
            return
        message[:, 2 * count : 2 * count + found] = raw.gather(1, index)
        message[:, 3 * count] = raw.logsumexp(-1)
        if plan.num_likeliest:
            values, index = _best(raw, plan.num_likeliest)
            start = 3 * count + 1
            message[:, start : start + index.shape[1]] = values
            start += plan.num_likeliest
            message[:, start : start + index.shape[1]] = index + self._first

    def _score(self, raw: torch.Tensor, plan: SamplingPlan, positions: torch.Tensor) -> torch.Tensor:
        """Logits with penalty and temperature, and with noise where nothing is truncated: [B, V]."""
        scores = raw
        if plan.any_penalty:
            assert self._seen is not None
            changed = torch.where(scores > 0, scores / plan.penalty, scores * plan.penalty)
            # A row without a penalty may see what its slot's last request left behind: dividing by 1 changes nothing.
            scores = torch.where(self._seen[plan.slots], changed, scores)
        if plan.any_scaled:
            scores = scores / plan.temperature
        if plan.any_noisy:
            scores = scores + gumbel(plan.seeds, positions, self._ids).mul_(plan.noisy)
        return scores


def _merge(pieces: torch.Tensor) -> torch.Tensor:
    """[R, B, C] to [B, R * C], slices in order."""
    return pieces.transpose(0, 1).flatten(1)


def _best(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scores of each row, the lowest index first among equals, in the order of the index: [B, count].

    `topk` alone takes any of the equals at the edge. Fewer where a row has fewer.
    """
    size = scores.shape[1]
    if count == 1:
        return scores.max(-1, keepdim=True)
    if count >= size:
        return scores, torch.arange(size, device=scores.device).expand_as(scores)
    edge = scores.topk(count, sorted=False).values.amin(-1, keepdim=True)
    above, level = scores > edge, scores == edge
    room = count - above.sum(-1, keepdim=True)
    kept = above | (level & (level.cumsum(-1) <= room))
    # The kept ones are counted to their columns; all others meet in one more column, which is cut off.
    column = torch.where(kept, kept.cumsum(-1) - 1, count)
    index = torch.zeros(scores.shape[0], count + 1, dtype=torch.int64, device=scores.device)
    index.scatter_(1, column, torch.arange(size, device=scores.device).expand_as(column))
    index = index[:, :count]
    return scores.gather(1, index), index


def _truncate(
    scores: torch.Tensor, ids: torch.Tensor, plan: SamplingPlan, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with noise of what top-k, top-p and min-p leave, minus infinity for the rest; rows without pass through.

    Shapes: all [B, R * C]; ids ascending among equal scores.
    """
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    rank = torch.arange(scores.shape[1], device=scores.device)
    share = torch.where(rank < plan.top_k, (scores - scores[:, :1]).exp(), 0.0)
    # One running sum serves as mass and as total, so that padding at the end cannot change what is kept.
    mass = share.cumsum(-1)
    before = torch.nn.functional.pad(mass[:, :-1], (1, 0))
    kept = (rank < plan.top_k) & (before < plan.top_p * mass[:, -1:]) & (share >= plan.min_p)
    noisy = torch.where(kept, scores + gumbel(plan.seeds, positions, ids), _MINUS_INF)
    return torch.where(plan.truncated, noisy, scores), ids


def _margins(scores: torch.Tensor) -> torch.Tensor:
    """Best minus second best of each row."""
    if scores.shape[1] < 2:
        return torch.full(scores.shape[:1], float("inf"), dtype=scores.dtype, device=scores.device)
    best = scores.topk(2).values
    return best[:, 0] - best[:, 1]


def _logprobs(gathered: torch.Tensor, plan: SamplingPlan, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[of the token, ids of the likeliest, theirs] of each row."""
    count, asked, sent = plan.num_candidates, plan.num_logprobs, plan.num_likeliest
    assert asked is not None
    raw = _merge(gathered[:, :, 2 * count : 3 * count])
    start = 3 * count + 1
    total = gathered[:, :, start - 1].logsumexp(0).unsqueeze(-1)
    chosen = torch.where(ids == tokens.unsqueeze(-1), raw, _MINUS_INF).amax(-1, keepdim=True) - total
    if asked == 0:
        return chosen
    best, order = _merge(gathered[:, :, start : start + sent]).sort(dim=-1, descending=True, stable=True)
    best_ids = _merge(gathered[:, :, start + sent :]).gather(1, order)
    missing = max(0, asked - best.shape[1])
    best = torch.nn.functional.pad(best[:, :asked] - total, (0, missing), value=_MINUS_INF)
    best_ids = torch.nn.functional.pad(best_ids[:, :asked], (0, missing), value=float(_NO_TOKEN))
    return torch.cat([chosen, best_ids, best], dim=1)
