"""A snapshot's keys in blocks, and reading them in place through the memory map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clara_fast.store import pages
from clara_fast.store.files import FileFacts
from clara_fast.store.manifest import ShardEntry
from clara_fast.store.shard import Shard
from clara_fast.store.snapshot import Snapshot

Keys = tuple[Tensor, Tensor | None]
# What stays mapped between searches, by default: a small store.
RESIDENT_BYTES = 32 << 20
# Threads search a block together and let it go: as many as two are resident at a time. Long, since letting one go
# interrupts every thread; mapping it anew costs less than what is saved by larger blocks.
BLOCK_BYTES = 96 << 20
# What one call compares, which cannot be interrupted.
RUN_BYTES = 1 << 30
# Where fewer rows than one in so many may be found, they are gathered; else all are read.
_SPARSE = 4


@dataclass(frozen=True)
class Block:
    """Some rows of a shard.

    Attributes:
        place: row of the snapshot that the first is if deleted ones are counted.
        kind: ``"memory"`` or ``"pooled"``.
        size: bytes of the keys and their scales.
        count: how many rows may be found, at least one.
        mask: bool ``[n]``, which they are; None for all.
    """

    shard: Shard
    rows: slice
    place: int
    kind: str
    size: int
    count: int
    mask: Tensor | None

    @property
    def name(self) -> tuple[FileFacts, int, str]:
        """The same for the same keys, also after a refresh."""
        return self.shard.entry.memory, self.rows.start, self.kind

    @property
    def is_sparse(self) -> bool:
        """Whether so few rows may be found that the others are better not read."""
        return self.count * _SPARSE <= self.rows.stop - self.rows.start

    @cached_property
    def keys(self) -> Keys:
        """``[n, R]`` as it is stored, mapped, and the scales ``[n]`` or ``[n, m]`` of 8-bit keys."""
        stored = self.shard.rows
        values = stored.memory.flatten(1) if self.kind == "memory" else stored.pooled
        scales = stored.scales if self.kind == "memory" else stored.pooled_scales
        assert values is not None, "checked by StoreReader.topk"
        return values[self.rows], None if scales is None else scales[self.rows]

    def bring(self) -> bool:
        """Have the keys in the system's cache; returns whether they were not there, as far as can be told."""
        if self.shard.is_open and pages.cached(self.keys[0]):
            return False
        self.shard.bring(self.kind, self.rows)
        return True


@dataclass
class Run:
    """Blocks that are compared in one go, in order, with the keys of each: without gaps, or a sparse one alone.

    ``release`` says whether the pages under the keys need not stay, ``size`` how many bytes the keys have.
    """

    blocks: list[Block]
    keys: list[Keys]
    release: bool = False
    size: int = 0

    def takes(self, block: Block, release: bool) -> bool:
        """Whether ``block`` may be compared with these."""
        last = self.blocks[-1]
        return (
            last.place + last.rows.stop - last.rows.start == block.place
            and release == self.release
            and self.size + block.size <= RUN_BYTES
            and not (last.is_sparse or block.is_sparse)
        )


class KeySource(Protocol):
    """Where keys are when they are compared: see :class:`clara_fast.store.device_keys.DeviceKeys`."""

    device: torch.device

    def read(self, blocks: Iterable[Block]) -> Iterator[Run]:
        """The blocks in order with their keys and scales on the device, valid until the next run is asked for."""
        ...

    @property
    def block_bytes(self) -> int:
        """How large a block may be."""
        ...

    def keep_only(self, shards: Iterable[ShardEntry]) -> None:
        """Let go of keys whose shard's memories are in none of ``shards``."""
        ...


class MappedKeys:
    """Keys read in place through the memory map.

    Pages that were read stay mapped, up to ``resident_bytes``, and the next search finds them; the others are let go
    once compared and are mapped anew when they come again, which costs little where they are huge pages and one to
    two times the search where the cache holds small ones. Either way they are the system's cache, not copies.
    """

    device = torch.device("cpu")

    def __init__(self, resident_bytes: int | None = None) -> None:
        self._room = RESIDENT_BYTES if resident_bytes is None else checked_room(resident_bytes)
        self._kept: dict[tuple[FileFacts, int, str], int] = {}
        self._used = 0

    @property
    def block_bytes(self) -> int:
        return BLOCK_BYTES

    def keep_only(self, shards: Iterable[ShardEntry]) -> None:
        files = {entry.memory for entry in shards}
        self._kept = {name: size for name, size in list(self._kept.items()) if name[0] in files}
        self._used = sum(self._kept.values())

    def read(self, blocks: Iterable[Block]) -> Iterator[Run]:
        run: Run | None = None
        for block in blocks:
            was_missing = not block.is_sparse and block.bring()
            release = not self._stays(block)
            # What is missing in the cache may push out what was there before: that is compared first.
            if run is not None and (was_missing or not run.takes(block, release)):
                yield from _let_go_after(run)
                run = None
            run = run or Run([], [], release)
            run.blocks.append(block)
            run.keys.append(block.keys)
            run.size += block.size
        if run is not None:
            yield from _let_go_after(run)

    def _stays(self, block: Block) -> bool:
        if block.name not in self._kept:
            if self._used + block.size > self._room:
                return False
            self._kept[block.name] = block.size
            self._used += block.size
        return True


def _let_go_after(run: Run) -> Iterator[Run]:
    yield run
    if run.release:
        for keys in run.keys:
            forget(keys)


def checked_room(resident_bytes: int) -> int:
    """``resident_bytes``, which must not be negative."""
    if resident_bytes < 0:
        raise ValueError(f"resident_bytes ({resident_bytes}) must not be negative")
    return resident_bytes


def forget(keys: Keys) -> None:
    """Let the mapped pages of keys and their scales go from this process."""
    for part in keys:
        if part is not None:
            pages.forget(part)


def blocks_of(
    snapshot: Snapshot, kind: str, shards: Iterable[int], size: int, allowed: Sequence[np.ndarray] | None = None
) -> Iterator[Block]:
    """The rows of some shards in order, in blocks of at most ``size`` bytes; those of which no row may be found are
    left out.

    Args:
        allowed: per shard ``[rows]`` bool, which rows may be found; all live ones if None.
    """
    places = np.cumsum([0, *(shard.entry.rows for shard in snapshot.shards)]).tolist()
    tokens, width = snapshot.shape if kind == "memory" else (1, snapshot.shape[1])
    row_bytes = tokens * (width * snapshot.format.dtype.itemsize + (4 if snapshot.format.largest else 0))
    step = max(1, size // row_bytes)
    for number in shards:
        shard = snapshot.shards[number]
        live = None if shard.entry.deleted is None else shard.live_mask()
        mask = live if allowed is None else allowed[number]
        count = -(-shard.entry.rows // step)
        even = -(-shard.entry.rows // count)  # no short block at the end
        for start in range(0, shard.entry.rows, even):
            rows = slice(start, min(start + even, shard.entry.rows))
            length = rows.stop - rows.start
            found = length if mask is None else int(np.count_nonzero(mask[rows]))
            if found:
                part = None if mask is None or found == length else torch.from_numpy(mask[rows])
                yield Block(shard, rows, places[number] + start, kind, length * row_bytes, found, part)
