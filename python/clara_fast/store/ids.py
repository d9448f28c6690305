"""Ids of a store: which row each has, without an object per document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa

from clara_fast.store.shard import Shard
from clara_fast.store.shard_files import id_digests


class Ids(Mapping[str, int]):
    """Row of each id, in row order when iterated.

    Iterating reads the documents' files. Looking up reads digests of the ids from the shards, once: 24 bytes a
    document stay in memory. Many at a time are looked up faster by :meth:`rows_of`.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = list(shards)
        self._len = sum(shard.entry.live for shard in self._shards)

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # First and second half of the digests, sorted by the first, and their rows.
        digests = [np.empty((0, 2), dtype=np.int64), *(shard.id_digests() for shard in self._shards)]
        first, second = np.concatenate(digests).T
        order = np.argsort(first, kind="stable")
        return first[order], second[order], order

    def with_added(self, shard: Shard) -> Ids:
        """The ids after ``shard`` has been added behind all others."""
        grown = Ids([*self._shards, shard])
        if "_index" in self.__dict__:
            first, second, rows = self._index
            digests = shard.id_digests()
            digests, new = digests[order := np.argsort(digests[:, 0], kind="stable")], order + len(self)
            places = np.searchsorted(first, digests[:, 0], side="right")
            grown.__dict__["_index"] = (
                np.insert(first, places, digests[:, 0]),
                np.insert(second, places, digests[:, 1]),
                np.insert(rows, places, new),
            )
        return grown

    def rows_of(self, names: Iterable[str]) -> np.ndarray:
        """The row of each name, -1 where the store does not hold it."""
        wanted = id_digests(names)
        first, second, rows = self._index
        found = np.full(len(wanted), -1, dtype=np.int64)
        places = np.searchsorted(first, wanted[:, 0])
        open_ = np.arange(len(wanted))
        # Once but for ids whose digests share their first half.
        while len(open_ := open_[places[open_] < len(first)]):
            open_ = open_[first[places[open_]] == wanted[open_, 0]]
            hit = open_[second[places[open_]] == wanted[open_, 1]]
            found[hit] = rows[places[hit]]
            open_ = open_[found[open_] < 0]
            places[open_] += 1
        return found

    def repeated(self) -> np.ndarray:
        """Rows whose id a lower row has already."""
        first, second, rows = self._index
        order = np.lexsort((rows, second, first))
        same = (np.diff(first[order]) == 0) & (np.diff(second[order]) == 0)
        return rows[order[1:][same]]

    def __getitem__(self, name: str) -> int:
        row = int(self.rows_of([name])[0]) if isinstance(name, str) else -1
        if row < 0:
            raise KeyError(name)
        return row

    def __iter__(self) -> Iterator[str]:
        for shard in self._shards:
            column = shard.table(["id"]).column("id")
            yield from (column.filter(pa.array(shard.live_mask())) if len(shard.deleted) else column).to_pylist()

    def __len__(self) -> int:
        return self._len
