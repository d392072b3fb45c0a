"""Cache entries of the rows of a call: what they write, and what attention reads.

Every cache has one more entry than it holds positions. Rows of a step without a request write to it; it is never read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stagdist.config.parts import ModelConfig
from stagdist.decode.layers.weights import Device
from stagdist.model.rotary import Rotary


class Angles:
    """Rotary table laid out for decoding: the sign of the rotated half is in the sines.

    Shapes: cos and sin [positions, D].
    """

    def __init__(self, model: ModelConfig, device: Device):
        cos, sin = Rotary(model)(model.max_position_embeddings, device.dtype)
        signs = torch.ones_like(sin)
        signs[:, : model.head_width // 2] = -1
        self.cos, self.sin = cos.to(device.name), (sin * signs).to(device.name)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings. Shapes: states [..., D], cos and sin broadcast to it."""
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin)


class ChunkCells:
    """Consecutive positions of one request: a chunk of its prompt, or one step when it is alone.

    Args:
        row: row of the caches.
        start: first position.
        length: number of positions (S).
        remembered: the memory holds the positions before this one already; they are not written.
    """

    def __init__(self, angles: Angles, row: int, start: int, length: int, remembered: int = 0):
        self.row, self.start, self.length = row, start, length
        self.end = start + length
        self._fresh = min(max(start, remembered), self.end)  # first position whose memory is written
        self._newest = max(start, remembered) - 1  # newest position in the memory before the call
        self.cos = angles.cos[start : self.end, None]
        self.sin = angles.sin[start : self.end, None]
        self.positions = range(start, self.end)
        self.self_mask: Tensor | None = None
        if length > 1 and start > 0:
            entries = torch.arange(self.end, device=angles.cos.device)
            self.self_mask = _visible(entries[start:], entries, None)
        self.causal = start == 0 and length > 1
        self.memory_mask: Tensor | None = None
        self.memory_causal = False

    def store_self(self, cache: Tensor, new: Tensor) -> Tensor:
        """Write keys and values of one layer and return the visible entries.

        Shapes: cache [2, B, K, S, D], new [1, S', 2, K, D] -> [2, 1, K, positions, D].
        """
        cache[:, self.row, :, self.start : self.end] = new[0].permute(1, 2, 0, 3)
        return cache[:, self.row : self.row + 1, :, : self.end]

    def store_memory(self, cache: Tensor, new: Tensor) -> Tensor:
        """Write the memory's keys and values of all layers and return the visible entries; sets `memory_mask`.

        Shapes: cache [L, 2, B, C, W + 1, D], new [1, S', L, 2, C, D] -> [L, 2, 1, C, entries, D].
        """
        new = new[0].permute(1, 2, 3, 0, 4)[:, :, :, self._fresh - self.start :]  # [L, 2, C, S', D]
        window = cache.shape[4] - 1
        own = cache[:, :, self.row, :, :window]
        if self.end <= window:
            own[:, :, :, self._fresh : self.end] = new
            self.memory_mask, self.memory_causal = self.self_mask, self.causal
            return own[:, :, None, :, : self.end]
        if self.length == 1 and self._newest < self.end:
            own[:, :, :, self._fresh % window : self._fresh % window + new.shape[3]] = new
            self.memory_mask, self.memory_causal = None, False
            return own[:, :, None]
        return self._store_around(own, new, window)

    def _store_around(self, own: Tensor, new: Tensor, window: int) -> Tensor:
        """Write a chunk that exceeds the ring buffer; it attends to the old entries and its own."""
        device = own.device
        entries = torch.arange(window, device=device)
        # The newest position in each entry; negative if there is none.
        held = self._newest - (self._newest - entries) % window
        chunk = torch.arange(self.start, self.end, device=device)
        fresh = chunk[self._fresh - self.start :]
        seen = torch.cat((own, new), dim=3)
        positions = torch.cat((held, fresh))
        self.memory_mask = _visible(chunk, positions, window) & (positions >= 0)
        self.memory_causal = False
        if kept := min(window, len(fresh)):
            own[:, :, :, fresh[-kept:] % window] = new[:, :, :, -kept:]
        return seen[:, :, None]


class StepCells:
    """One position of each of several requests, in rows 0 to B - 1 of the caches.

    Args:
        positions: int64 [B], on the device; -1 for rows without a request.
        longest: number of cache entries to read; above every position.
        uniform: every row attends to all these entries, so no mask is needed.
        repeats: rows per request (sections as rows of one batch).
    """

    def __init__(self, angles: Angles, positions: Tensor, longest: int, *, uniform: bool = False, repeats: int = 1):
        positions = positions.repeat_interleave(repeats) if repeats > 1 else positions
        self._entries = positions  # -1 is the last entry, which holds no position
        self._placed = positions.clamp(min=0)
        self.longest, self._uniform = longest, uniform
        self.rows = torch.arange(len(positions), device=positions.device)
        self.cos = angles.cos[self._placed][:, None, None]
        self.sin = angles.sin[self._placed][:, None, None]
        self.self_mask: Tensor | None = None if uniform else self._filled(longest)
        self.causal = self.memory_causal = False
        self.memory_mask: Tensor | None = None

    def _filled(self, entries: int) -> Tensor:
        """Return which entries are filled for each row. Shapes: bool [B, 1, 1, entries]."""
        held = torch.arange(entries, device=self._placed.device) <= self._placed[:, None]
        return held[:, None, None]

    def store_self(self, cache: Tensor, new: Tensor) -> Tensor:
        """As `ChunkCells.store_self`. Shapes: new [B, 1, 2, K, D] -> [2, B, K, longest, D]."""
        cache[:, self.rows, :, self._entries] = new[:, 0]
        return cache[:, : len(self.rows), :, : self.longest]

    def store_memory(self, cache: Tensor, new: Tensor) -> Tensor:
        """As `ChunkCells.store_memory`. Shapes: new [B, 1, L, 2, C, D] -> [L, 2, B, C, entries, D]."""
        window = cache.shape[4] - 1
        cache[:, :, self.rows, :, self._entries.where(self._entries < 0, self._entries % window)] = new[:, 0]
        entries = min(self.longest, window)
        # Once the ring buffer is full, every entry holds one of the last `window` positions.
        self.memory_mask = None if self._uniform else self._filled(entries)
        return cache[:, :, : len(self.rows), :, :entries]


class DeviceCells:
    """One position of each of several requests, for kernels that find their entries on the device.

    Attributes:
        angles: cosines and sines of all positions, [positions, D].
        positions: int64 [B], on the device; -1 for rows without a request. Read when the kernels run.
        repeats: rows per request (sections as rows of one batch).
        addresses: of positions, cosines and sines.
    """

    def __init__(self, angles: Angles, positions: Tensor, *, repeats: int = 1):
        self.angles = angles.cos, angles.sin
        self.positions, self.repeats = positions, repeats
        self.addresses = positions.data_ptr(), angles.cos.data_ptr(), angles.sin.data_ptr()


Cells = ChunkCells | StepCells
AnyCells = Cells | DeviceCells
"""`LayerMath` takes the first two kinds, kernels the third."""


def step_cells(angles: Angles, positions: Sequence[int], device: Device, repeats: int = 1) -> Cells:
    """Return the cells of a step; a single row is written without indices. Rows without a request have position -1."""
    if len(positions) == 1 and repeats == 1:
        return ChunkCells(angles, 0, positions[0], 1)
    tensor = device.upload(positions, torch.int64)
    uniform = len({position for position in positions if position >= 0}) == 1
    return StepCells(angles, tensor, max(positions) + 1, uniform=uniform, repeats=repeats)


def _visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return which positions each query may attend to. Shapes: [S], [entries] -> bool [S, entries]."""
    distance = queries[:, None] - keys[None, :]
    near = distance >= 0
    return near if window is None else near & (distance < window)
