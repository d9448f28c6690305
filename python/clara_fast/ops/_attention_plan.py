"""How a :class:`ContextLayout` is computed without a kernel of its own: pieces of segments of one shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

# Query rows per tile: scores stay in cache, and keys past the tile's last row are not touched.
TILE_ROWS = 128
# Tiles of one shape are computed as one batch up to so many score elements per head.
BATCH_SCORES = 1 << 16

Range = tuple[int, int]  # first row, number of rows


@dataclass(frozen=True)
class Segment:
    """Query rows and the key rows they see: all of the contexts, and their own up to the causal diagonal."""

    q_start: int
    q_len: int
    kv_start: int
    kv_len: int
    contexts: tuple[Range, ...]

    @property
    def shape(self) -> tuple[int, int, tuple[int, ...]]:
        return self.q_len, self.kv_len, tuple(length for _, length in self.contexts)

    @property
    def num_keys(self) -> int:
        return self.kv_len + sum(length for _, length in self.contexts)

    @property
    def key_ranges(self) -> list[Range]:
        """Contexts first, then its own; adjoining ranges merged."""
        merged: list[Range] = []
        for start, length in (*self.contexts, (self.kv_start, self.kv_len)):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            elif length:
                merged.append((start, length))
        return merged

    def tiles(self) -> list[Segment]:
        """Up to ``TILE_ROWS`` rows each, with the keys they see; none for rows that see nothing."""
        tiles = []
        first = 0 if self.contexts else max(self.q_len - self.kv_len, 0)
        while first < self.q_len:
            last = min(first + TILE_ROWS, self.q_len)
            # Rows that see contexts alone form a tile without own keys, so that what is hidden is a triangle.
            if first < self.q_len - self.kv_len:
                last = min(last, self.q_len - self.kv_len)
            own = max(self.kv_len - (self.q_len - last), 0)
            tiles.append(Segment(self.q_start + first, last - first, self.kv_start, own, self.contexts))
            first = last
        return tiles


class Rows:
    """Equally many rows of a packed tensor for each of ``count`` pieces; a view where evenly spaced."""

    def __init__(self, ranges_of: list[list[Range]], device: torch.device) -> None:
        starts = [ranges[0][0] for ranges in ranges_of]
        self.count = len(ranges_of)
        self.length = sum(length for _, length in ranges_of[0])
        self.start = starts[0]
        self.step = starts[1] - starts[0] if self.count > 1 else self.length
        self.index: Tensor | None = None
        self.even = all(later - earlier == self.step for earlier, later in pairwise(starts)) and self.step >= 0
        self.even = self.even and all(len(ranges) == 1 for ranges in ranges_of)
        if not self.even:
            rows = [torch.arange(start, start + length) for ranges in ranges_of for start, length in ranges]
            self.index = torch.cat(rows).to(device)

    def _view(self, source: Tensor) -> Tensor:
        row, *rest = source.stride()
        size = (self.count, self.length, *source.shape[1:])
        return source.as_strided(size, (self.step * row, row, *rest), source.storage_offset() + self.start * row)

    def take(self, source: Tensor) -> Tensor:
        """``[rows, ...] -> [count, length, ...]``."""
        if self.index is None:
            return self._view(source)
        return source.index_select(0, self.index).view(self.count, self.length, *source.shape[1:])

    def put(self, target: Tensor, values: Tensor) -> None:
        if self.index is None:
            self._view(target).copy_(values)
        else:
            target.index_copy_(0, self.index, values.flatten(0, 1).to(target.dtype))

    def add(self, target: Tensor, values: Tensor) -> None:
        if self.index is not None:
            target.index_add_(0, self.index, values.flatten(0, 1))
        elif self.step >= self.length:
            self._view(target).add_(values)
        else:
            for piece, own in enumerate(values):
                start = self.start + piece * self.step
                target[start : start + self.length].add_(own)


class Batch:
    """Segments or tiles of one shape, computed together."""

    def __init__(self, segments: list[Segment], device: torch.device) -> None:
        self.num_rows = segments[0].q_len
        self.num_own = segments[0].kv_len
        self.q = Rows([[(segment.q_start, segment.q_len)] for segment in segments], device)
        self.kv = Rows([segment.key_ranges for segment in segments], device)

    def queries(self, source: Tensor, heads: int) -> Tensor:
        """``[rows, Hq, E] -> [count * Hkv, groups * L, E]``, query heads of one key head side by side."""
        rows = self.q.take(source)
        rows = rows.view(self.q.count, self.num_rows, heads, rows.shape[2] // heads, -1).permute(0, 2, 3, 1, 4)
        return rows.reshape(self.q.count * heads, -1, rows.shape[4])

    def keys(self, source: Tensor) -> Tensor:
        """``[rows, Hkv, E] -> [count * Hkv, keys, E]``."""
        return self.kv.take(source).transpose(1, 2).flatten(0, 1)

    def put_queries(self, target: Tensor, values: Tensor) -> None:
        heads = values.shape[0] // self.q.count
        values = values.view(self.q.count, heads, -1, self.num_rows, values.shape[2]).permute(0, 3, 1, 2, 4)
        self.q.put(target, values.flatten(2, 3))

    def add_keys(self, target: Tensor, values: Tensor) -> None:
        heads = values.shape[0] // self.kv.count
        self.kv.add(target, values.view(self.kv.count, heads, -1, values.shape[2]).transpose(1, 2))

    def hide_future_(self, scores: Tensor) -> Tensor:
        """-inf in ``[count * Hkv, groups * L, keys]`` for row i past the i-th of the last L keys."""
        if self.num_own and self.num_rows > 1:
            square = scores.view(scores.shape[0], -1, self.num_rows, scores.shape[2])[..., -self.num_rows :]
            square += _future(scores.device, scores.dtype)[: self.num_rows, : self.num_rows]
        return scores


@lru_cache(maxsize=8)
def _future(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.full((TILE_ROWS, TILE_ROWS), -math.inf, device=device, dtype=dtype).triu_(1)


@dataclass(frozen=True, eq=False)
class Plan:
    """A layout as batches, and whether these cover query rows 0 .. ``num_rows`` without a hole.

    ``whole`` are plain segments, which a library kernel can compute: one row that sees all its keys, or a
    causal square. ``tiles`` are the rest.
    """

    whole: list[Batch]
    tiles: list[Batch]
    num_rows: int
    gapless: bool

    def covers(self, rows: int) -> bool:
        return self.gapless and self.num_rows == rows


def _is_whole(segment: Segment, from_rows: int, up_to_rows: int) -> bool:
    """Plain, and of as many rows as a library kernel is taken for: one, up to a few, or many."""
    if len(segment.key_ranges) != 1:
        return False
    if segment.q_len == 1:
        return True
    square = not segment.contexts and segment.q_len == segment.kv_len
    return square and not up_to_rows < segment.q_len < from_rows


def _group(segments: list[Segment]) -> list[list[Segment]]:
    groups: dict[tuple, list[Segment]] = {}
    for segment in segments:
        groups.setdefault(segment.shape, []).append(segment)
    return list(groups.values())


@lru_cache(maxsize=128)
def _make_plan(
    q_start: tuple,
    q_len: tuple,
    kv_start: tuple,
    kv_len: tuple,
    contexts: tuple,
    device: torch.device,
    whole_from: int,
    whole_up_to: int,
) -> Plan:
    whole: list[Segment] = []
    rest: list[Segment] = []
    for segment, others in enumerate(contexts):
        ranges = tuple((kv_start[other], kv_len[other]) for other in others if other >= 0 and kv_len[other])
        own = Segment(q_start[segment], q_len[segment], kv_start[segment], kv_len[segment], ranges)
        if own.q_len and _is_whole(own, whole_from, whole_up_to):
            whole.append(own)
        else:
            rest += own.tiles()

    whole_batches = []
    for segments in _group(whole):
        batch = Batch(segments, device)
        even = batch.q.even and batch.kv.even
        whole_batches += [batch] if even else [Batch([segment], device) for segment in segments]
    tile_batches = []
    for tiles in _group(rest):
        size = max(BATCH_SCORES // (tiles[0].q_len * tiles[0].num_keys), 1)
        tile_batches += [Batch(tiles[first : first + size], device) for first in range(0, len(tiles), size)]

    end = 0
    gapless = True
    for start, length in sorted((segment.q_start, segment.q_len) for segment in whole + rest):
        gapless = gapless and start == end
        end = start + length
    return Plan(whole_batches, tile_batches, end, gapless)


def make_plan(layout: tuple[Tensor, ...], whole_from: int, whole_up_to: int) -> Plan:
    """The plan of ``q_start, q_len, kv_start, kv_len, contexts``, kept for a call with the same values.

    Causal squares of ``whole_from`` rows or more, or ``whole_up_to`` or less, are for the library kernel.
    Reading the values costs microseconds on the CPU; for another device it waits for that device.
    """
    *lists, contexts = layout
    values = [tuple(tensor.tolist()) for tensor in lists]
    return _make_plan(*values, tuple(map(tuple, contexts.tolist())), contexts.device, whole_from, whole_up_to)
