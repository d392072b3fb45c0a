"""Attention of one position of each row over a cache whose filled length is read from the device.

The entries of a row are split among programs, as many as its length needs. The last one to end merges their results.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stagdist.decode.kernels.products import sum_type

SMALLEST_SPLIT = 64
"""Fewest entries of a split of several."""
PROGRAMS = 264
"""Programs that fill a GPU: two for each multiprocessor of a large one."""
TILE_ELEMENTS = 8192
"""Elements of the products of queries and keys that a program holds at a time."""


def num_splits(rows: int, key_heads: int, entries: int) -> int:
    """Return the number of splits of up to `entries` entries for each of `key_heads` heads of `rows` rows."""
    return max(1, min(PROGRAMS // (rows * key_heads), triton.cdiv(entries, SMALLEST_SPLIT)))


@dataclass(frozen=True)
class Partials:
    """Where splits leave their results for the last one. Calls that run at the same time need different ones.

    Shapes: sums [rows * heads * splits, D], stats [rows * heads * splits, 2], done int32 [rows * key heads].

    Attributes:
        sums: of weighted values.
        stats: largest score, and sum of the weights.
        done: how many splits have ended; zero between calls.
    """

    sums: Tensor
    stats: Tensor
    done: Tensor

    @classmethod
    def allocate(cls, splits: int, done: int, width: int, dtype: torch.dtype, device: str) -> "Partials":
        """Allocate room for `splits` results of vectors of `width` and `done` counters."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            torch.zeros(splits, width, dtype=exact, device=device),
            torch.zeros(splits, 2, dtype=exact, device=device),
            torch.zeros(done, dtype=torch.int32, device=device),
        )


@triton.jit
def rotated(states, cos, sin, d, mask, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """Load vectors and apply rotary embeddings. `states` points to vectors, `cos` and `sin` to the row of a position.

    `mask` broadcasts against the vectors; it must be false where `d >= WIDTH`.
    """
    plain = tl.load(states + d, mask=mask, other=0.0).to(ACC)
    partner = tl.load(states + (d + WIDTH // 2) % WIDTH, mask=mask, other=0.0).to(ACC)
    turned = tl.load(cos + d, mask=d < WIDTH, other=0.0).to(ACC)
    return plain * turned + partner * tl.load(sin + d, mask=d < WIDTH, other=0.0).to(ACC)


@triton.jit
def _merge(sums, stats, base, used, out, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
           WIDTH: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Merge the results of `used` splits of a group of query heads. Rows that pad the group repeat its last head."""
    g = tl.minimum(tl.arange(0, BLOCK_G)[:, None, None], GROUP - 1)
    d = tl.arange(0, BLOCK_D)[None, None, :]
    top = tl.full([BLOCK_G, 1, 1], float("-inf"), sums.dtype.element_ty)
    for start in range(0, used, CHUNK):
        s = start + tl.arange(0, CHUNK)[None, :, None]
        place = base + g * SPLITS + s
        score = tl.load(stats + place * 2, mask=s < used, other=float("-inf"), cache_modifier=".cg")
        top = tl.maximum(top, tl.max(score, 1, keep_dims=True))
    total = tl.zeros([BLOCK_G, 1, BLOCK_D], sums.dtype.element_ty)
    weights = tl.zeros([BLOCK_G, 1, 1], sums.dtype.element_ty)
    for start in range(0, used, CHUNK):
        s = start + tl.arange(0, CHUNK)[None, :, None]
        place = base + g * SPLITS + s
        score = tl.load(stats + place * 2, mask=s < used, other=float("-inf"), cache_modifier=".cg")
        scale = tl.exp(score - top)
        weight = tl.load(stats + place * 2 + 1, mask=s < used, other=0.0, cache_modifier=".cg")
        value = tl.load(sums + place * WIDTH + d, mask=(s < used) & (d < WIDTH), other=0.0, cache_modifier=".cg")
        weights += tl.sum(scale * weight, 1, keep_dims=True)
        total += tl.sum(scale * value, 1, keep_dims=True)
    mask = (tl.arange(0, BLOCK_G)[:, None, None] < GROUP) & (d < WIDTH)
    tl.store(out + g * WIDTH + d, (total / weights).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _split(query, new, cos, sin, keys, values, entry_stride, pos, first, stop, owns, SCALE: tl.constexpr,
           KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
           BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, STORES: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Attend to entries `first` to `stop`. Returns [G, 1, 1], [G, 1, 1] and [G, 1, D]: score, weights, sums.

    With STORES, `new` points to the new key of the head; its value is KEY_HEADS vectors later.
    """
    g = tl.arange(0, BLOCK_G)[:, None, None]
    e = tl.arange(0, BLOCK_E)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    q = rotated(query + g * WIDTH, cos, sin, d, (g < GROUP) & (d < WIDTH), WIDTH, ACC) * SCALE
    if STORES:
        new_key = rotated(new, cos, sin, d, d < WIDTH, WIDTH, ACC).to(keys.dtype.element_ty)
        new_value = tl.load(new + KEY_HEADS * WIDTH + d, mask=d < WIDTH, other=0.0)
        tl.store(keys + pos * entry_stride + d, new_key, mask=(d < WIDTH) & owns)
        tl.store(values + pos * entry_stride + d, new_value, mask=(d < WIDTH) & owns)
    top = tl.full([BLOCK_G, 1, 1], float("-inf"), ACC)
    weights = tl.zeros([BLOCK_G, 1, 1], ACC)
    sums = tl.zeros([BLOCK_G, 1, BLOCK_D], ACC)
    for start in range(first, stop, BLOCK_E):
        entry = start + e
        filled = entry < stop
        mask = filled & (d < WIDTH)
        if STORES:  # the new entry is not read back
            mask = mask & (entry < pos)
        key = tl.load(keys + entry * entry_stride + d, mask=mask, other=0.0)
        value = tl.load(values + entry * entry_stride + d, mask=mask, other=0.0)
        if STORES:
            key = tl.where(entry == pos, new_key, key)
            value = tl.where(entry == pos, new_value, value)
        score = tl.where(filled, tl.sum(q * key.to(ACC), 2, keep_dims=True), float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1, keep_dims=True))
        weight = tl.exp(score - higher)
        faded = tl.exp(top - higher)
        weights = weights * faded + tl.sum(weight, 1, keep_dims=True)
        sums = sums * faded + tl.sum(weight * value.to(ACC), 1, keep_dims=True)
        top = higher
    return top, weights, sums


@triton.jit
def attention_kernel(
    states, positions, cos, sin, cache, out, sums, stats, done,
    window, states_row, kind_stride, row_stride, head_stride, entry_stride,
    SCALE: tl.constexpr, REPEATS: tl.constexpr, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, SMALLEST: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, STORES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: one split of the entries of one key head of one row, for all query heads of that key head."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pos = tl.load(positions + row // REPEATS)
    length = tl.minimum(pos + 1, window).to(tl.int32)
    size = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_E) * BLOCK_E, SMALLEST)
    used = tl.maximum(tl.cdiv(length, size), 1)
    if split < used:
        first, stop = split * size, tl.minimum(split * size + size, length)
        angles = tl.maximum(pos, 0) * WIDTH
        keys = cache + row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
        query = states + row.to(tl.int64) * states_row + head * (GROUP * WIDTH)
        new = states + row.to(tl.int64) * states_row + (KEY_HEADS * GROUP + head) * WIDTH
        owns = (first <= pos) & (pos < stop)
        top, weights, total = _split(
            query, new, cos + angles, sin + angles, keys, keys + kind_stride, entry_stride, pos, first, stop, owns,
            SCALE, KEY_HEADS, GROUP, BLOCK_G, BLOCK_E, BLOCK_D, WIDTH, STORES, ACC,
        )  # fmt: skip
        heads = row * (KEY_HEADS * GROUP) + head * GROUP
        g, d = tl.arange(0, BLOCK_G)[:, None, None], tl.arange(0, BLOCK_D)[None, None, :]
        mask = (g < GROUP) & (d < WIDTH)
        if used == 1:
            result = total / tl.where(weights > 0, weights, 1.0)  # a row without a request has no entries
            tl.store(out + heads * WIDTH + g * WIDTH + d, result.to(out.dtype.element_ty), mask=mask)
        else:
            place = (heads + g) * SPLITS + split
            tl.store(stats + place * 2, top, mask=g < GROUP)
            tl.store(stats + place * 2 + 1, weights, mask=g < GROUP)
            tl.store(sums + place * WIDTH + d, total, mask=mask)
            tl.debug_barrier()  # all threads have stored before one of them counts
            if tl.atomic_add(done + row * KEY_HEADS + head, 1, sem="acq_rel") == used - 1:
                _merge(
                    sums,
                    stats,
                    heads * SPLITS,
                    used,
                    out + heads * WIDTH,
                    GROUP,
                    BLOCK_G,
                    BLOCK_D,
                    WIDTH,
                    SPLITS,
                    CHUNK,
                )
                tl.store(done + row * KEY_HEADS + head, 0)


def attend(
    states: Tensor,
    positions: Tensor,
    angles: tuple[Tensor, Tensor],
    cache: Tensor,
    heads: int,
    partials: Partials,
    *,
    stores: bool,
    repeats: int = 1,
    splits: int | None = None,
) -> Tensor:
    """Attention of one position of each row; rows without a request give zeros.

    Shapes: states [M, (N + 2 K) D] with queries, keys and values, if `stores`, or queries alone, [M, N D], not yet
    rotated; positions int64 [M / repeats], -1 without a request; angles: cosines and sines [positions, D] as in
    `Angles`; cache [2, M or more, K, entries + 1, D] with any strides but the last -> [M, N D].

    Args:
        heads: N.
        stores: write each row's new key and value to the entry of its position; else a row attends to
            min(position + 1, entries) entries.
        repeats: rows that share a position.
        splits: None: `num_splits`.
    """
    rows, key_heads, width = len(states), cache.shape[2], cache.shape[4]
    group, entries, block_d = heads // key_heads, cache.shape[3] - 1, triton.next_power_of_2(width)
    block_g = triton.next_power_of_2(group)
    splits = splits or num_splits(rows, key_heads, entries)
    out = states.new_empty(rows, heads * width)
    assert states.stride(1) == cache.stride(4) == 1 and positions.is_contiguous() and len(positions) * repeats == rows
    attention_kernel[(rows, key_heads, splits)](
        states, positions, *angles, cache, out, partials.sums, partials.stats, partials.done,
        entries, states.stride(0), *cache.stride()[:4],
        SCALE=width**-0.5, REPEATS=repeats, KEY_HEADS=key_heads, GROUP=group, WIDTH=width,
        SPLITS=splits, SMALLEST=SMALLEST_SPLIT, BLOCK_G=block_g,
        BLOCK_E=max(1, min(SMALLEST_SPLIT, TILE_ELEMENTS // (block_g * block_d))),
        BLOCK_D=block_d, CHUNK=max(1, min(triton.next_power_of_2(splits), 4096 // (block_g * block_d))),
        STORES=stores, ACC=sum_type(states.dtype), num_warps=4 if block_g * block_d <= 1024 else 8,
    )  # fmt: skip
    return out
