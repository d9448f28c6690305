"""A store as one manifest describes it: the list of its live documents, and reading from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clara_fast.store import pages
from clara_fast.store.documents import Document
from clara_fast.store.errors import StoreError
from clara_fast.store.formats import FORMATS, Rows, take
from clara_fast.store.ids import Ids
from clara_fast.store.manifest import SHARD_FOLDER, Manifest
from clara_fast.store.shard import Shard


class Snapshot:
    """What a reader sees until it looks again. Rows number the live documents, shard after shard.

    Args:
        path: of the store.
        manifest: what is in it.
        before: a snapshot of the same store, whose open shards are taken over.
        folder: where the shards' files are, if not where a store has them.
    """

    def __init__(
        self, path: Path, manifest: Manifest, before: Snapshot | None = None, *, folder: Path | None = None
    ) -> None:
        if manifest.dtype not in FORMATS:
            raise StoreError(f"{path} holds {manifest.dtype} memories, which this clara_fast cannot read: upgrade it")
        self.path = path
        self.manifest = manifest
        self.format = FORMATS[manifest.dtype]
        self.shape = (manifest.num_memory, manifest.hidden_size)
        known = {shard.entry: shard for shard in before.shards} if before else {}
        folder = folder or path / SHARD_FOLDER
        self.shards: list[Shard] = [
            known.get(entry) or Shard(folder, entry, self.shape, self.format) for entry in manifest.shards
        ]
        # Row of each shard's first live document, and behind it the number of documents.
        self.starts = np.cumsum([0, *(entry.live for entry in manifest.shards)])

    @cached_property
    def ids(self) -> Ids:
        """Ids and rows."""
        return Ids(self.shards)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __iter__(self) -> Iterator[Document]:
        for shard, start in zip(self.shards, self.starts.tolist()):
            live = shard.row_of_live(np.arange(shard.entry.live))
            yield from shard.documents(live.tolist(), start)

    def located(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Where ``rows`` lie: for each shard its number, the places in ``rows``, and the shard's rows."""
        owners = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(owners).tolist():
            places = np.nonzero(owners == number)[0]
            yield number, places, self.shards[number].row_of_live(rows[places] - self.starts[number])

    def memory(self, rows: np.ndarray) -> Tensor:
        """Memories ``[len(rows), m, D]``: the store's numbers, or float32 where they are kept in 8 bits."""
        dtype = torch.float32 if self.format.largest else self.format.dtype
        out = torch.empty((len(rows), *self.shape), dtype=dtype)
        for number, places, members in self.located(rows):
            stored = self.shards[number].rows
            chosen = torch.from_numpy(members)
            scales = None if stored.scales is None else stored.scales[chosen]
            out[torch.from_numpy(places)] = self.format.decode(take(stored.memory, chosen), scales)
        return out

    def documents(self, rows: np.ndarray) -> list[Document]:
        """The documents at ``rows``, in the order asked for."""
        found: dict[int, Document] = {}
        for number, _, members in self.located(np.unique(rows)):
            shard, start = self.shards[number], int(self.starts[number])
            found.update((document.row, document) for document in shard.documents(members.tolist(), start))
        return [found[row] for row in rows.tolist()]

    def live_blocks(self, number: int, size: int, first: int = 0, count: int | None = None) -> Iterator[Rows]:
        """Live rows of a shard as they are stored, from ``first`` on ``count`` or all, at most ``size`` at a time."""
        shard = self.shards[number]
        stop = shard.entry.live if count is None else first + count
        for start in range(first, stop, size):
            live = np.arange(start, min(start + size, stop))
            members = shard.row_of_live(live)
            stored = shard.rows
            yield stored[torch.from_numpy(members) if len(shard.deleted) else slice(int(live[0]), int(live[-1]) + 1)]
            pages.forget(stored.memory[int(members[0]) : int(members[-1]) + 1])

    def checked(self, rows: Sequence[int] | Tensor | np.ndarray) -> np.ndarray:
        """Rows as int64, each of them in the store.

        Raises:
            IndexError: one is not.
            TypeError: they are no integers.
        """
        if isinstance(rows, Tensor):
            rows = rows.cpu().numpy()
        listed = np.asarray(rows if isinstance(rows, np.ndarray) else list(rows)).reshape(-1)
        if len(listed) and listed.dtype.kind not in "iu":
            raise TypeError(f"rows must be integers, not {listed.dtype}")
        listed = listed.astype(np.int64)
        outside = listed[(listed < 0) | (listed >= len(self))]
        if len(outside):
            raise IndexError(f"rows: {outside[0]} must be in [0, {len(self)}), the store's documents")
        return listed
