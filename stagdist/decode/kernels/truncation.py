"""Top-k, top-p and min-p without sorting: a search for the lowest score that is kept, then noise for what is kept.

Tokens in the order of their scores, ties by id, are kept from the best one on while two conditions hold: fewer than
top-k tokens come before, and their shares sum to less than top-p of all shares, where the share of a token is its
probability relative to the best one's. The last token kept is found by narrowing an interval of scores: a pass counts
the tokens of each block above pivots in the interval, and sums their shares; the next pass reads the results of all
blocks and continues between two pivots. Each program repeats that small decision, so that no program waits for another.

A row with top-k is searched twice, for the edge of top-k and, with the sum of its shares, for that of top-p.
"""

import triton
import triton.language as tl

from stagdist.decode.kernels.scores import (
    COLUMNS,
    MIN_P,
    MINUS_INF,
    SEED,
    TOP_K,
    TOP_P,
    TRUNCATED,
    best_message,
    best_of,
    key_of,
    leave_message,
    noise_of,
    value_of,
)

PIVOTS = tl.constexpr(16)
STATE = tl.constexpr(8)
WINDOW = tl.constexpr(64.0)
"""Tokens so far below the best one are never chosen: Gumbel noise of 52 bits differs by less than 41. Their shares
change no sum in fp64."""

# What a row is searched for.
_FIRST_TOP_P = tl.constexpr(0)  # top-p, before the sum of all shares is known
_TOP_K = tl.constexpr(1)
_TOP_P = tl.constexpr(2)


@triton.jit
def _pivots(low, high, IN_KEYS: tl.constexpr):
    """Numbers from low to high, evenly spaced: in value, or in keys, which ends after 16 passes for any scores."""
    index = tl.arange(0, PIVOTS)
    if IN_KEYS:
        step = tl.maximum((key_of(high) >> 4) - (key_of(low) >> 4), 1)
        between = value_of(tl.minimum(key_of(low) + index * step, key_of(high)))
    else:
        between = tl.minimum(low + (high - low) * (index.to(tl.float64) * (1 / (PIVOTS - 1))), high)
    return tl.where(index == PIVOTS - 1, high, between)


@triton.jit
def _tally(scores, start, stop, low, high, best, IN_KEYS: tl.constexpr, CHUNK: tl.constexpr):
    """Of a row's scores in [low, high]: how many reach each pivot, their shares, and the largest below the pivot.

    Shapes: result float64 [PIVOTS] each.
    """
    pivots = _pivots(low, high, IN_KEYS)[None, :]
    counts = tl.zeros([CHUNK, PIVOTS], tl.int32)
    shares = tl.zeros([CHUNK, PIVOTS], tl.float64)
    below = tl.full([CHUNK, PIVOTS], MINUS_INF, tl.float64)
    at = start + tl.arange(0, CHUNK)
    following = tl.load(scores + at, mask=at < stop, other=float("nan"))
    for _ in range(start, stop, CHUNK):
        values, at = following, at + CHUNK
        following = tl.load(scores + at, mask=at < stop, other=float("nan"))  # comes while these are compared
        inside = (values >= low) & (values <= high)
        if tl.max(inside.to(tl.int32), 0) > 0:  # rarely after the first passes
            share = tl.where(inside, tl.exp(values - best), 0.0)[:, None]
            value = tl.where(inside, values, float("nan"))[:, None]
            reach = value >= pivots
            counts += reach.to(tl.int32)
            shares += tl.where(reach, share, 0.0)
            below = tl.where((value < pivots) & (value > below), value, below)
    return tl.sum(counts, 0).to(tl.float64), tl.sum(shares, 0), tl.max(below, 0)


@triton.jit
def _at(index, place, values):
    """One entry, 0 if there is no such place."""
    return tl.sum(tl.where(index == place, values, 0.0), 0)


@triton.jit
def _narrow(low, high, above, mass, quota, goal, best, counts, shares, below, top_k, top_p, IN_KEYS: tl.constexpr):
    """Narrow the interval [low, high] that holds the last score kept, or begin the second search.

    Args:
        above: scores over the interval.
        mass: sum of their shares.
        quota: a token is kept while the shares before it sum to less.
        counts, shares, below: of `_tally`, over all blocks.
    """
    index = tl.arange(0, PIVOTS)
    quota = tl.where(goal == _FIRST_TOP_P, top_p * _at(index, 0, shares), quota)
    goal = tl.where(goal == _FIRST_TOP_P, _TOP_P, goal)
    # The lowest pivot that is not passed, since a token just below it is kept.
    kept = (index > 0) & (above + counts < top_k) & (mass + shares < quota)
    place = tl.min(tl.where(kept, index, PIVOTS), 0)
    over = _at(index, place, counts)
    next_high = tl.where(place == PIVOTS, high, tl.max(tl.where(index == place, below, MINUS_INF), 0))
    next_low = _at(index, place - 1, _pivots(low, high, IN_KEYS))
    is_single = _at(index, place - 1, counts) - over == 1
    next_low = tl.where(is_single | (next_high == MINUS_INF), next_high, next_low)  # all are kept if none is left

    # With one score left, the interval holds its ties: the set of top-k is known, and so is the sum of its shares.
    is_open = low < high
    begins = (low >= high) & (goal == _TOP_K) & (top_p <= 1)  # without top-p, all of the set is kept
    total = mass + tl.minimum(top_k - above, _at(index, 0, counts)) * tl.exp(low - best)
    quota = tl.where(begins, top_p * total, quota)
    above = tl.where(is_open, above + over, tl.where(begins, 0.0, above))
    mass = tl.where(is_open, mass + _at(index, place, shares), tl.where(begins, 0.0, mass))
    goal = tl.where(is_open, goal, _TOP_P)
    low = tl.where(is_open, next_low, tl.where(begins, tl.maximum(low, best - WINDOW), low))
    high = tl.where(is_open, next_high, tl.where(begins, best, high))
    return low, high, above, mass, quota, goal


@triton.jit
def _begin(best, top_k, size):
    """The state of a row before its search."""
    is_finite = tl.abs(best) < float("inf")  # otherwise shares are not numbers, and no token is kept
    low, high = tl.where(is_finite, best - WINDOW, float("nan")), tl.where(is_finite, best, float("nan"))
    goal = tl.where(is_finite, tl.where(top_k < size, _TOP_K, _FIRST_TOP_P), _TOP_P)
    zero = tl.full([], 0.0, tl.float64)
    return low, high, zero, zero, zero + float("inf"), goal.to(tl.float64)


@triton.jit
def _load(state, partials, number, BLOCKS: tl.constexpr):
    """The state of a row in the pass before, and the sums over its blocks."""
    block, index = tl.arange(0, BLOCKS)[:, None], tl.arange(0, PIVOTS)[None, :]
    place = partials + block * (3 * PIVOTS) + index
    there = block < number
    counts = tl.sum(tl.load(place, mask=there, other=0.0), 0)
    shares = tl.sum(tl.load(place + PIVOTS, mask=there, other=0.0), 0)
    below = tl.max(tl.load(place + 2 * PIVOTS, mask=there, other=MINUS_INF), 0)
    low, high, above = tl.load(state), tl.load(state + 1), tl.load(state + 2)
    mass, quota, goal = tl.load(state + 3), tl.load(state + 4), tl.load(state + 5)
    return low, high, above, mass, quota, goal, counts, shares, below


@triton.jit
def narrow_kernel(
    scores, table, messages, states, partials, next_states, next_partials,
    number, size, rows, blocks,
    FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: narrow the interval of a row, then tally one block of its scores for the next pass.

    Args:
        messages: of `score_kernel`, `number` for each row; the best one is the row's.
        states, partials: of the pass before; unused in the first one.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    integers = table + row * COLUMNS
    floats = integers.to(tl.pointer_type(tl.float64), bitcast=True)
    if tl.load(floats + TRUNCATED) != 0:
        key, _ = best_message(messages, number, rows, row, size, COUNT)
        best, top_k = value_of(key), tl.load(integers + TOP_K).to(tl.float64)
        if FIRST:
            low, high, above, mass, quota, goal = _begin(best, top_k, size)
        else:
            low, high, above, mass, quota, goal, counts, shares, below = _load(
                states + row * STATE, partials + row * blocks * (3 * PIVOTS), blocks, BLOCKS
            )
            low, high, above, mass, quota, goal = _narrow(
                low, high, above, mass, quota, goal, best, counts, shares, below,
                top_k, tl.load(floats + TOP_P), False,
            )  # fmt: skip
        if block == 0:
            state = next_states + row * STATE
            tl.store(state, low)
            tl.store(state + 1, high)
            tl.store(state + 2, above)
            tl.store(state + 3, mass)
            tl.store(state + 4, quota)
            tl.store(state + 5, goal)
        start = block * BLOCK
        counts, shares, below = _tally(
            scores + row.to(tl.int64) * size, start, tl.minimum(start + BLOCK, size), low, high, best, False, CHUNK
        )
        place = next_partials + (row * blocks + block) * (3 * PIVOTS) + tl.arange(0, PIVOTS)
        tl.store(place, counts)
        tl.store(place + PIVOTS, shares)
        tl.store(place + 2 * PIVOTS, below)


@triton.jit
def _ties_before(partials, high, edge, block, BLOCKS: tl.constexpr):
    """Tokens with the edge's score in the blocks before; these are in the last count if the edge was the last pivot.

    Otherwise it belongs to one token alone.
    """
    index = tl.arange(0, BLOCKS)
    ties = tl.load(partials + index * (3 * PIVOTS) + (PIVOTS - 1), mask=index < block, other=0.0)
    return tl.where(edge == high, tl.sum(ties, 0), 0.0)


@triton.jit
def _finish(scores, size, block_start, low, high, above, mass, quota, goal, best, top_k, top_p, CHUNK: tl.constexpr):
    """Narrow the interval to its end, over the complete row; only scores that are very uneven get here."""
    while (low < high) | ((goal == _TOP_K) & (top_p <= 1)):
        counts, shares, below = _tally(scores, 0, size, low, high, best, True, CHUNK)
        low, high, above, mass, quota, goal = _narrow(
            low, high, above, mass, quota, goal, best, counts, shares, below, top_k, top_p, True
        )
    ties = tl.full([], 0.0, tl.float64)
    for offset in range(0, block_start, CHUNK):
        values = tl.load(scores + offset + tl.arange(0, CHUNK))
        ties += tl.sum((values == low).to(tl.int32), 0).to(tl.float64)
    return low, above, mass, quota, ties


@triton.jit
def pick_kernel(
    scores, table, positions, score_messages, states, partials, messages,
    number, size, first, rows, vocab_size, blocks,
    COUNT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: the best token of a block among those that truncation keeps, with noise; or of all without it."""
    row, block = tl.program_id(0), tl.program_id(1)
    integers = table + row * COLUMNS
    floats = integers.to(tl.pointer_type(tl.float64), bitcast=True)
    row_scores, start = scores + row.to(tl.int64) * size, block * BLOCK
    is_truncated = tl.load(floats + TRUNCATED) != 0
    top_k, top_p, min_p = tl.load(integers + TOP_K).to(tl.float64), tl.load(floats + TOP_P), tl.load(floats + MIN_P)
    seed, position = tl.load(integers + SEED), tl.load(positions + row)
    best = value_of(best_message(score_messages, number, rows, row, size, COUNT)[0])
    edge, above, mass, quota, ties = top_p, top_p, top_p, top_p, top_p
    if is_truncated:
        row_partials = partials + row * blocks * (3 * PIVOTS)
        low, high, above, mass, quota, goal, counts, shares, below = _load(
            states + row * STATE, row_partials, blocks, BLOCKS
        )
        edge, limit, above, mass, quota, goal = _narrow(
            low, high, above, mass, quota, goal, best, counts, shares, below, top_k, top_p, False
        )
        ties = _ties_before(row_partials, high, edge, block, BLOCKS)
        if (edge < limit) | ((goal == _TOP_K) & (top_p <= 1)):
            edge, above, mass, quota, ties = _finish(
                row_scores, size, start, edge, limit, above, mass, quota, goal, best, top_k, top_p, CHUNK
            )
    best_key = key_of(tl.full([], MINUS_INF, tl.float64))
    token = tl.full([], 0, tl.int64) + vocab_size
    for offset in range(start, tl.minimum(start + BLOCK, size), CHUNK):
        at = offset + tl.arange(0, CHUNK)
        real, ids = at < size, (first + at).to(tl.int64)
        values = tl.load(row_scores + at, mask=real, other=MINUS_INF)
        if is_truncated:
            is_edge = real & (values == edge)
            before = ties + tl.cumsum(is_edge.to(tl.int32), 0).to(tl.float64) - 1
            fits = (above + before < top_k) & (mass + before * tl.exp(edge - best) < quota)
            kept = ((values > edge) | (is_edge & fits)) & (tl.exp(values - best) >= min_p)
            ties += tl.sum(is_edge.to(tl.int32), 0).to(tl.float64)
            noisy = values
            if tl.max(kept.to(tl.int32), 0) > 0:
                noisy = values + noise_of(seed, position, ids)
            values = tl.where(kept, noisy, MINUS_INF)
        key, lowest = best_of(key_of(values), tl.where(real, ids, vocab_size))
        token = tl.where(key > best_key, lowest, tl.where(key == best_key, tl.minimum(token, lowest), token))
        best_key = tl.maximum(key, best_key)
    leave_message(messages, block, rows, row, best_key, token)
