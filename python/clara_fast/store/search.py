"""Exact search over a snapshot: run after run of blocks of keys, the best of all merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clara_fast import ops
from clara_fast.ops.cosine_topk import descending_topk
from clara_fast.ops.cosine_topk_parts import cosine_topk_parts
from clara_fast.store.blocks import KeySource, Run, blocks_of
from clara_fast.store.formats import take
from clara_fast.store.snapshot import Snapshot

KEYS = ("memory", "pooled")
_MERGE_COLUMNS = 4096


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
    # Each rank has shards that follow each other: they are compared in long runs.
    count = len(snapshot.shards)
    shards = range(count * rank // world, count * (rank + 1) // world)
    for run in source.read(blocks_of(snapshot, kind, shards, source.block_bytes, allowed)):
        scores, places = _best(queries, run, k)
        found.add(scores, places + run.blocks[0].place)
    scores, places = found.best(len(queries))
    if world > 1:
        scores, places = _gathered(scores, places, k, group)
    return scores, torch.from_numpy(_rows_of_places(snapshot, places.numpy()))


def _best(queries: Tensor, run: Run, k: int) -> tuple[Tensor, Tensor]:
    """Scores of the best of a run, and their numbers among its keys."""
    if run.blocks[0].is_sparse:
        return _best_gathered(queries, run, k)
    values, scales = zip(*run.keys, strict=True)
    return cosine_topk_parts(
        queries,
        values,
        min(k, sum(block.count for block in run.blocks)),
        key_scales=None if scales[0] is None else scales,
        allowed=[None if block.mask is None else block.mask.to(queries.device) for block in run.blocks],
        release=run.release,
    )


def _best_gathered(queries: Tensor, run: Run, k: int) -> tuple[Tensor, Tensor]:
    """The same for a sparse block, of which no more is read than may be found."""
    (block,), ((values, scales),) = run.blocks, run.keys
    assert block.mask is not None, "it is sparse"
    rows = block.mask.nonzero()[:, 0].to(queries.device)
    chosen = None if scales is None else scales[rows]
    scores, found = ops.cosine_topk(queries, take(values, rows), min(k, block.count), key_scales=chosen)
    return scores, rows[found]


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
        # Equal scores stand in the order of places here, which is kept: runs ascend, and the operator orders ties.
        self.parts = [descending_topk(scores, places, min(self.k, scores.shape[1]))]
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
    return descending_topk(scores, places, min(k, scores.shape[1]))


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
