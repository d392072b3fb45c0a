"""Scores of tokens, and the best one of each row: noise, penalties and the likeliest token.

Every program leaves a message, the best score of its tokens and its id. Messages of blocks and of ranks look the same,
float64 [number, rows, 2], and `merge_kernel` serves both. Scores are computed in fp64 in the order of the plain path,
and must be compiled without fused multiplication and addition, which rounds differently.
"""

import triton
import triton.language as tl

# Columns of the tables of the slots, 64 bits each: three integers, then float64.
SEED = tl.constexpr(0)
TOP_K = tl.constexpr(1)
IS_BIASED = tl.constexpr(2)
TOP_P = tl.constexpr(3)
MIN_P = tl.constexpr(4)
TEMPERATURE = tl.constexpr(5)
REPETITION = tl.constexpr(6)
PRESENCE = tl.constexpr(7)
FREQUENCY = tl.constexpr(8)
NOISY = tl.constexpr(9)
TRUNCATED = tl.constexpr(10)
COLUMNS = tl.constexpr(11)

# SplitMix64 on signed integers, as in the plain path; a shift repeats the sign bit, which the mask removes.
_STEP = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_FIRST_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
_SECOND_FACTOR = tl.constexpr(0x94D049BB133111EB - (1 << 64))
_MASK_30 = tl.constexpr((1 << 34) - 1)
_MASK_27 = tl.constexpr((1 << 37) - 1)
_MASK_31 = tl.constexpr((1 << 33) - 1)
_MASK_52 = tl.constexpr((1 << 52) - 1)
_TWO_TO_MINUS_52 = tl.constexpr(2.0**-52)

_LARGEST = tl.constexpr((1 << 63) - 1)
MINUS_INF = tl.constexpr(float("-inf"))


@triton.jit
def _mix(bits):
    """The finalizer of SplitMix64."""
    bits = (bits ^ ((bits >> 30) & _MASK_30)) * _FIRST_FACTOR
    bits = (bits ^ ((bits >> 27) & _MASK_27)) * _SECOND_FACTOR
    return bits ^ ((bits >> 31) & _MASK_31)


@triton.jit
def noise_of(seed, position, ids):
    """Gumbel noise of a row's tokens. Shapes: ids int64 [n], result float64 [n]."""
    row = _mix(_mix(seed * _STEP) + position * _STEP)
    bits = (_mix(row + ids * _STEP) >> 12) & _MASK_52
    uniform = (bits.to(tl.float64) + 0.5) * _TWO_TO_MINUS_52
    return -tl.log(-tl.log(uniform))


@triton.jit
def key_of(values):
    """Integers in the order of float64 numbers: equal for zeros of either sign, NaN above all."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int64, bitcast=True)
    return tl.where(values != values, _LARGEST, bits ^ ((bits >> 63) & _LARGEST))


@triton.jit
def value_of(key):
    """The number of a key; NaN for the largest."""
    return (key ^ ((key >> 63) & _LARGEST)).to(tl.float64, bitcast=True)


@triton.jit
def best_of(keys, ids):
    """The largest key and the lowest of its ids. Shapes: int64 [n] each."""
    best = tl.max(keys, 0)
    return best, tl.min(tl.where(keys == best, ids, _LARGEST), 0)


@triton.jit
def leave_message(messages, number, rows, row, key, token):
    """Store a message."""
    place = messages + (number * rows + row) * 2
    tl.store(place, value_of(key))
    tl.store(place + 1, token.to(tl.float64))


@triton.jit
def best_message(messages, number, rows, row, vocab_size, COUNT: tl.constexpr):
    """The best of the messages of a row: key and id."""
    index = tl.arange(0, COUNT)
    place = messages + (index * rows + row) * 2
    values = tl.load(place, mask=index < number, other=MINUS_INF)
    ids = tl.load(place + 1, mask=index < number, other=0.0).to(tl.int64)
    return best_of(key_of(values), tl.where(index < number, ids, vocab_size))


@triton.jit
def likeliest_kernel(logits, messages, logits_row, size, first, rows, vocab_size, BLOCK: tl.constexpr):
    """One program: the likeliest token of one block of a row."""
    row, block = tl.program_id(0), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + row.to(tl.int64) * logits_row + at, mask=at < size, other=MINUS_INF).to(tl.float64)
    key, token = best_of(key_of(values), tl.where(at < size, first + at, vocab_size).to(tl.int64))
    leave_message(messages, block, rows, row, key, token)


@triton.jit
def score_kernel(
    logits, positions, table, may_end, ends, bias, seen, counts, scores, messages,
    logits_row, size, first, rows, vocab_size, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: scores of one block of a row, stored unless `scores` is None, and the best of them.

    Rows without a parameter do not read what belongs to it.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    real, ids = at < size, (first + at).to(tl.int64)
    integers, in_tables = table + row * COLUMNS, row.to(tl.int64) * size + at
    floats = integers.to(tl.pointer_type(tl.float64), bitcast=True)
    position = tl.load(positions + row)
    values = tl.load(logits + row.to(tl.int64) * logits_row + at, mask=real, other=MINUS_INF).to(tl.float64)
    if position < tl.load(may_end + row):
        values = tl.where(tl.load(ends + in_tables, mask=real, other=0) != 0, MINUS_INF, values)
    if tl.load(integers + IS_BIASED) != 0:
        values += tl.load(bias + in_tables, mask=real, other=0.0)
    repetition = tl.load(floats + REPETITION)
    if repetition != 1:
        changed = tl.where(values > 0, values / repetition, values * repetition)
        values = tl.where(tl.load(seen + in_tables, mask=real, other=0) != 0, changed, values)
    presence, frequency = tl.load(floats + PRESENCE), tl.load(floats + FREQUENCY)
    if (presence != 0) | (frequency != 0):
        count = tl.load(counts + in_tables, mask=real, other=0)
        values = values - frequency * count.to(tl.float64) - tl.where(count > 0, presence, 0.0)
    temperature = tl.load(floats + TEMPERATURE)
    if temperature != 1:
        values = values / temperature
    if tl.load(floats + NOISY) != 0:
        values += noise_of(tl.load(integers + SEED), position, ids)
    if scores is not None:
        tl.store(scores + in_tables, values, mask=real)
    key, token = best_of(key_of(tl.where(real, values, MINUS_INF)), tl.where(real, ids, vocab_size))
    leave_message(messages, block, rows, row, key, token)


@triton.jit
def merge_kernel(
    messages, merged, tokens, positions, table, seen, counts,
    number, rows, size, first, vocab_size, COUNT: tl.constexpr, RECORDS: tl.constexpr,
):  # fmt: skip
    """One program: the best of a row's messages, left as one message in `merged`, or in `tokens` where that is None.

    Args:
        RECORDS: the scores have penalties, which see the token next. NaN scores then give the last token, as in the
            plain path.
    """
    row = tl.program_id(0)
    key, token = best_message(messages, number, rows, row, vocab_size, COUNT)
    if merged is not None:
        leave_message(merged, 0, rows, row, key, token)
    else:
        token = tl.minimum(token, vocab_size - 1)
        if RECORDS:
            token = tl.where(key == _LARGEST, vocab_size - 1, token)
            floats = (table + row * COLUMNS).to(tl.pointer_type(tl.float64), bitcast=True)
            local = token - first
            place = row.to(tl.int64) * size + local
            mine = (tl.load(positions + row) > 0) & (local >= 0) & (local < size)
            penalized = (tl.load(floats + PRESENCE) != 0) | (tl.load(floats + FREQUENCY) != 0)
            tl.store(seen + place, 1, mask=mine & (tl.load(floats + REPETITION) != 1))
            count = tl.load(counts + place, mask=mine & penalized, other=0)
            tl.store(counts + place, count + 1, mask=mine & penalized)
        tl.store(tokens + row, token)
