"""Exact search over a snapshot: block after block of mapped keys, the best of all merged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from clara_fast import ops
from clara_fast.store import pages
from clara_fast.store.files import FileFacts
from clara_fast.store.formats import take
from clara_fast.store.manifest import ShardEntry
from clara_fast.store.shard import Shard
from clara_fast.store.snapshot import Snapshot

Keys = tuple[Tensor, Tensor | None]
KEYS = ("memory", "pooled")
# Large enough that starting on one costs nothing, small enough that what is resident stays small.
BLOCK_BYTES = 128 << 20
# What stays mapped between searches, by default: all of a small store, and a share of a large one that does not grow.
RESIDENT_BYTES = 96 << 20
# Where fewer rows than one in so many may be found, they are gathered; else all are compared, and more are kept.
_SPARSE = 4
_MERGE_COLUMNS = 4096


@dataclass(frozen=True)
class Block:
    """Some rows of shard ``number``; the first is row ``place`` of the snapshot if deleted ones are counted."""

    number: int
    shard: Shard
    rows: slice
    place: int
    kind: str

    @property
    def name(self) -> tuple[FileFacts, int, str]:
        """The same for the same keys, also after a refresh."""
        return self.shard.entry.memory, self.rows.start, self.kind

    def keys(self) -> Keys:
        """``[n, R]`` as it is stored, mapped, and the scales ``[n]`` or ``[n, m]`` of 8-bit keys."""
        if was_closed := not self.shard.is_open:
            self.shard.bring(self.kind, self.rows)
        stored = self.shard.rows
        values = stored.memory.flatten(1) if self.kind == "memory" else stored.pooled
        scales = stored.scales if self.kind == "memory" else stored.pooled_scales
        assert values is not None, "checked by topk"
        values = values[self.rows]
        if not was_closed and not pages.cached(values):
            self.shard.bring(self.kind, self.rows)
        return values, None if scales is None else scales[self.rows]


class KeySource(Protocol):
    """Where keys are when they are compared: see :class:`clara_fast.store.device_keys.DeviceKeys`."""

    device: torch.device

    def read(self, blocks: Iterable[Block]) -> Iterator[tuple[Block, Tensor, Tensor | None]]:
        """Each block with its keys and scales on the device, in order; valid until the next is asked for."""
        ...

    def keep_only(self, shards: Iterable[ShardEntry]) -> None:
        """Let go of keys whose shard's memories are in none of ``shards``."""
        ...


class MappedKeys:
    """Keys read in place through the memory map.

    Pages that were read stay mapped, up to ``resident_bytes``, and the next search finds them; the others are let go
    once compared and are mapped anew when they come again, which costs little where they are huge pages and up to
    twice the time of the search where the cache holds small ones. Either way they are the system's cache, not copies.
    """

    device = torch.device("cpu")

    def __init__(self, resident_bytes: int | None = None) -> None:
        self._room = RESIDENT_BYTES if resident_bytes is None else checked_room(resident_bytes)
        self._used = 0
        self._kept: dict[tuple[FileFacts, int, str], int] = {}

    def keep_only(self, shards: Iterable[ShardEntry]) -> None:
        files = {entry.memory for entry in shards}
        self._kept = {name: size for name, size in self._kept.items() if name[0] in files}
        self._used = sum(self._kept.values())

    def read(self, blocks: Iterable[Block]) -> Iterator[tuple[Block, Tensor, Tensor | None]]:
        for block in blocks:
            keys = block.keys()
            yield block, *keys
            if block.name in self._kept:
                continue
            size = size_of(keys)
            if self._used + size <= self._room:
                self._kept[block.name] = size
                self._used += size
            else:
                forget(keys)


def checked_room(resident_bytes: int) -> int:
    """``resident_bytes``, which must not be negative."""
    if resident_bytes < 0:
        raise ValueError(f"resident_bytes ({resident_bytes}) must not be negative")
    return resident_bytes


def size_of(keys: Keys) -> int:
    """Bytes of keys and their scales."""
    return sum(part.numel() * part.element_size() for part in keys if part is not None)


def forget(keys: Keys) -> None:
    """Let the mapped pages of keys and their scales go from this process."""
    for part in keys:
        if part is not None:
            pages.forget(part)


def blocks_of(snapshot: Snapshot, kind: str, shards: Iterable[int]) -> Iterator[Block]:
    """The rows of some shards in order, cut into blocks."""
    places = np.cumsum([0, *(shard.entry.rows for shard in snapshot.shards)]).tolist()
    width = snapshot.shape[1] * (snapshot.shape[0] if kind == "memory" else 1)
    step = max(1, BLOCK_BYTES // (width * snapshot.format.dtype.itemsize))
    for number in shards:
        shard = snapshot.shards[number]
        count = -(-shard.entry.rows // step)
        even = -(-shard.entry.rows // count)  # no short block at the end
        for start in range(0, shard.entry.rows, even):
            yield Block(number, shard, slice(start, min(start + even, shard.entry.rows)), places[number] + start, kind)


def topk(
    snapshot: Snapshot,
    queries: Tensor,
    k: int,
    *,
    source: KeySource,
    kind: str = "memory",
    allowed: Sequence[np.ndarray] | None = None,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """The k best live rows for each query; equal scores go to the lower row.

    Args:
        queries: ``[B, R]``.
        k: at most the number of rows that may be found.
        source: reads the keys.
        kind: ``"memory"`` or ``"pooled"``.
        allowed: per shard ``[rows]`` bool, which rows may be found; all live ones if None.
        group: a ``torch.distributed`` group whose ranks call this with the same arguments and share the shards.

    Returns:
        scores ``[B, k]`` float32 and rows of the snapshot ``[B, k]`` int64, on the CPU.
    """
    world, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    found = _Found(k)
    queries = queries.to(source.device)
    blocks = blocks_of(snapshot, kind, range(rank, len(snapshot.shards), world))
    for block, keys, scales in source.read(_possible(blocks, allowed)):
        mask = _mask(block, allowed)
        part = _best(queries, keys, scales, k, None if mask is None else torch.from_numpy(mask).to(keys.device))
        if part is not None:
            found.add(part[0], part[1] + block.place)
    scores, places = found.best(len(queries))
    if world > 1:
        scores, places = _gathered(scores, places, k, group)
    return scores, torch.from_numpy(_rows_of_places(snapshot, places.numpy()))


def _mask(block: Block, allowed: Sequence[np.ndarray] | None) -> np.ndarray | None:
    """Which of the block's rows may be found; None for all of them."""
    if allowed is not None:
        mask = allowed[block.number][block.rows]
    elif block.shard.entry.deleted is None:
        return None
    else:
        mask = block.shard.live_mask()[block.rows]
    return None if mask.all() else mask


def _possible(blocks: Iterable[Block], allowed: Sequence[np.ndarray] | None) -> Iterator[Block]:
    """Blocks of which some row may be found: no other is read."""
    for block in blocks:
        mask = _mask(block, allowed)
        if mask is None or mask.any():
            yield block


def _best(
    queries: Tensor, keys: Tensor, scales: Tensor | None, k: int, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Scores and rows of the best of a block."""
    count = len(keys) if mask is None else int(mask.sum())
    k = min(k, count)
    if mask is None:
        return ops.cosine_topk(queries, keys, k, key_scales=scales)
    if count * _SPARSE <= len(keys):
        rows = mask.nonzero()[:, 0]
        scores, found = ops.cosine_topk(
            queries, take(keys, rows), k, key_scales=None if scales is None else scales[rows]
        )
        return scores, rows[found]
    # No copy: find some more than k among all rows, until every query has k that count.
    more = k * len(keys) // count + 8
    while True:
        scores, rows = ops.cosine_topk(queries, keys, min(more, len(keys)), key_scales=scales)
        counted = mask[rows]
        if more >= len(keys) or bool((counted.sum(1) >= k).all()):
            break
        more *= 4
    first = (~counted).to(torch.int8).argsort(dim=1, stable=True)[:, :k]
    return scores.gather(1, first), rows.gather(1, first)


class _Found:
    """Scores and places so far; merged now and then, places ascending among equal scores."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.parts: list[tuple[Tensor, Tensor]] = []
        self.columns = 0

    def add(self, scores: Tensor, places: Tensor) -> None:
        self.parts.append((scores, places))
        self.columns += scores.shape[1]
        if self.columns > _MERGE_COLUMNS + self.k:
            self._merge()

    def _merge(self) -> None:
        scores, places = (torch.cat(parts, dim=1) for parts in zip(*self.parts, strict=True))
        # Equal scores stand in row order here (blocks ascend, the operator orders ties): a stable sort keeps it.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        self.parts = [(scores[:, : self.k], places.gather(1, order[:, : self.k]))]
        self.columns = self.parts[0][0].shape[1]

    def best(self, batch: int) -> tuple[Tensor, Tensor]:
        """``[B, k]`` on the CPU; fewer columns where fewer were added."""
        if not self.parts:
            return torch.empty(batch, 0), torch.empty(batch, 0, dtype=torch.int64)
        self._merge()
        scores, places = self.parts[0]
        return scores.contiguous().cpu(), places.contiguous().cpu()


def _gathered(scores: Tensor, places: Tensor, k: int, group: Any) -> tuple[Tensor, Tensor]:
    """The best over all ranks, the same on each."""
    import torch.distributed as dist

    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, (scores, places), group=group)
    scores, places = (torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))
    # Ranks hold shards in turn: put places in order first, so that equal scores keep it.
    places, order = places.sort(dim=1)
    scores, best = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores[:, :k].contiguous(), places.gather(1, best[:, :k])


def _rows_of_places(snapshot: Snapshot, places: np.ndarray) -> np.ndarray:
    """Rows of the snapshot from places among all rows, deleted ones included."""
    if all(entry.deleted is None for entry in snapshot.manifest.shards):
        return places
    starts = np.cumsum([0, *(shard.entry.rows for shard in snapshot.shards)])
    owners = np.searchsorted(starts, places, side="right") - 1
    out = np.empty_like(places)
    for number in np.unique(owners).tolist():
        here = owners == number
        shard = snapshot.shards[number]
        out[here] = shard.live_of_row(places[here] - starts[number]) + snapshot.starts[number]
    return out
