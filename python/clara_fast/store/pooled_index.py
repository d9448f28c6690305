"""Two-stage search: a FAISS index over pooled memories proposes documents, exact cosines on whole memories decide.

::

    STORE/index/index.json              what the index was built from, and the checksum of
    STORE/index/0123456789abcdef.faiss  the index itself

FAISS trusts the files it reads: a crafted one can run code. The checksum tells of damage, not of malice; read only an
index that was built here (rebuilding takes minutes), as no more is known of a foreign one than of a foreign program.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clara_fast import ops
from clara_fast.store import search
from clara_fast.store.blocks import MappedKeys
from clara_fast.store.errors import StoreDamagedError, StoreError
from clara_fast.store.files import Staged, file_sha256, sync_folder
from clara_fast.store.snapshot import Snapshot

if TYPE_CHECKING:
    from clara_fast.store.memory_store import MemoryStore
    from clara_fast.store.reading import StoreReader

INDEX_FOLDER = "index"
INDEX_FILE = "index.json"
_FAISS_FILE = re.compile(r"[0-9a-f]{16}\.faiss")
_BLOCK = 4096
_GATHERED_BYTES = 256 << 20
# FAISS asks for at least 39 vectors a list to train on, and uses no more than 256.
_FEWEST_PER_LIST, _MOST_PER_LIST = 39, 256
_FEWEST_CANDIDATES, _CANDIDATES_PER_HIT = 100, 20


@dataclass(frozen=True)
class IndexFacts:
    """Content of ``index.json``. ``contents`` is the identity of the rows that were indexed, ``kind`` FAISS's name."""

    kind: str
    rows: int
    contents: str
    file: str
    bytes: int
    sha256: str


class PooledIndex:
    """A FAISS index over the mean of each document's memory tokens; see :meth:`clara_fast.MemoryStore.build_index`.

    Attributes:
        facts: what it was built from.
    """

    def __init__(self, facts: IndexFacts, index: Any) -> None:
        self.facts = facts
        self._index = index

    @classmethod
    def build(cls, store: MemoryStore, kind: str = "IVF") -> PooledIndex:
        """See :meth:`clara_fast.MemoryStore.build_index`."""
        faiss = _faiss()
        store.lock()
        snapshot = store._snapshot
        if not len(snapshot):
            raise ValueError(f"{store.path} holds no documents to index")
        kind = _full_kind(kind, len(snapshot))
        try:
            index = faiss.index_factory(snapshot.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
            if not index.is_trained:
                index.train(_training_keys(snapshot, index))
            for keys in _pooled_keys(snapshot):
                index.add(keys)
        except RuntimeError as error:
            said = str(error).split("Error: ")[-1].splitlines()[0]
            raise ValueError(f"kind ({kind!r}) cannot index these {len(snapshot)} documents: {said}") from None
        folder = store.path / INDEX_FOLDER
        try:
            folder.mkdir(exist_ok=True)
            temporary = folder / f"{os.getpid()}.tmp"
            faiss.write_index(index, str(temporary))
            checksum = file_sha256(temporary)
            facts = IndexFacts(
                kind, len(snapshot), contents(snapshot), f"{checksum[:16]}.faiss", temporary.stat().st_size, checksum
            )
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, folder / facts.file)
            Staged(folder / INDEX_FILE, [json.dumps(asdict(facts), indent=1).encode()]).publish()
            sync_folder(folder)
            for file in folder.iterdir():
                if (_FAISS_FILE.fullmatch(file.name) and file.name != facts.file) or file.suffix == ".tmp":
                    file.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:
            raise StoreError(f"cannot write the index of {store.path}: {error}") from None
        return cls(facts, index)

    @classmethod
    def open(cls, store: StoreReader) -> PooledIndex:
        """See :meth:`clara_fast.MemoryStore.open_index`."""
        faiss = _faiss()
        folder = store.path / INDEX_FOLDER
        facts = _read_facts(folder / INDEX_FILE)
        _check_fresh(facts, store._snapshot)
        file = folder / facts.file
        try:
            if file.stat().st_size != facts.bytes or file_sha256(file) != facts.sha256:
                raise _damaged(file, f"its size or checksum is not that of {INDEX_FILE}")
            index = faiss.read_index(str(file))
        except (OSError, RuntimeError) as error:
            raise _damaged(file, str(error).splitlines()[0]) from None
        if (index.ntotal, index.d) != (facts.rows, store._snapshot.shape[1]):
            raise _damaged(file, f"it holds {index.ntotal} vectors of {index.d}")
        return cls(facts, index)

    def with_effort(self, effort: int | None) -> PooledIndex:
        """This index, from now on visiting ``effort`` lists (IVF) or neighbours (HNSW); None: leave it as it is."""
        if effort is None:
            return self
        if effort < 1:
            raise ValueError(f"effort ({effort}) must be at least 1")
        inner, knob = self._knob()
        if inner is None:
            raise ValueError(f"effort ({effort}) does not apply to an index of kind {self.facts.kind!r}")
        setattr(inner, knob, effort)
        return self

    def topk(
        self,
        snapshot: Snapshot,
        queries: Tensor,
        k: int,
        candidates: int | None = None,
        allowed: Sequence[np.ndarray] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k best of what the index proposes.

        Args:
            snapshot: of the store that was indexed.
            queries: ``[B, m * D]``, finite, on the CPU.
            k: at most the number of documents that may be found.
            candidates: proposals for each query, at least ``k``; default 20 times as many, and 100 at least.
            allowed: per shard ``[rows]`` bool, which rows may be proposed; all live ones if None.

        Returns:
            scores ``[B, k]`` float32 and rows ``[B, k]``, equal scores with the lower row first. A query for which
            the index proposes fewer than ``k`` is compared with all documents that may be found, and all queries are
            where these are no more than ``candidates``.
        """
        _check_fresh(self.facts, snapshot)
        candidates = _number_of_candidates(candidates, k, len(snapshot))
        proposals = self._proposals(snapshot, queries, candidates, allowed)
        size = snapshot.shape[0] * snapshot.shape[1] * 4
        step = max(1, _GATHERED_BYTES // (size * candidates))
        found = []
        for start in range(0, len(queries), step):
            part = proposals[start : start + step]
            rows, places = np.unique(part[part >= 0], return_inverse=True)
            memory = snapshot.memory(rows).flatten(1)
            counts = (part >= 0).sum(1)
            for i, members in enumerate(np.split(places, np.cumsum(counts)[:-1])):
                query = queries[start + i : start + i + 1]
                if len(members) < k:
                    found.append(_exact(snapshot, query, k, allowed))
                    continue
                members = np.sort(members)  # rows ascend with their places: equal scores go to the lower row
                scores, best = ops.cosine_topk(query, memory[torch.from_numpy(members)], k)
                found.append((scores, torch.from_numpy(rows[members])[best]))
        if not found:
            return torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)
        scores, chosen = (torch.cat(parts) for parts in zip(*found, strict=True))
        return scores, chosen

    def _proposals(
        self, snapshot: Snapshot, queries: Tensor, candidates: int, allowed: Sequence[np.ndarray] | None
    ) -> np.ndarray:
        """``[B, candidates]`` rows, -1 where the index found no more."""
        mask = None if allowed is None else _live(snapshot, allowed)
        if mask is not None and int(mask.sum()) <= candidates:
            return np.broadcast_to(np.nonzero(mask)[0], (len(queries), int(mask.sum())))
        pooled = _unit(queries.float().view(-1, *snapshot.shape).mean(1))
        inner, knob = self._knob()
        if inner is not None and knob == "efSearch":  # a graph finds no more than it visits
            inner.efSearch = max(inner.efSearch, candidates)
        if mask is None:
            return np.asarray(self._index.search(pooled, candidates)[1])
        packed = np.packbits(mask, bitorder="little")  # held until the search is done: FAISS does not copy it
        try:
            _, rows = self._index.search(pooled, candidates, params=self._parameters(packed, mask))
        except RuntimeError:
            raise ValueError(
                f"where does not apply to an index of kind {self.facts.kind!r}, which FAISS cannot filter: "
                "search without the index, or build one of kind 'IVF' or 'HNSW'"
            ) from None
        return np.asarray(rows)

    def _parameters(self, packed: np.ndarray, mask: np.ndarray) -> Any:
        """FAISS's parameters of a search for the rows of ``mask`` only.

        The fewer of the rows these are, the more lists or neighbours are visited: so that as many are met that count.
        """
        faiss = _faiss()
        selector = faiss.IDSelectorBitmap(packed)
        inner, knob = self._knob()
        if inner is None:
            parameters = faiss.SearchParameters(sel=selector)
        else:
            most = inner.nlist if knob == "nprobe" else len(mask)
            effort = min(most, -(-int(getattr(inner, knob)) * len(mask) // int(mask.sum())))
            kind = faiss.SearchParametersIVF if knob == "nprobe" else faiss.SearchParametersHNSW
            parameters = kind(sel=selector, **{knob: effort})
        if isinstance(faiss.downcast_index(self._index), faiss.IndexPreTransform):
            parameters = faiss.SearchParametersPreTransform(index_params=parameters)
        return parameters

    def _knob(self) -> tuple[Any, str]:
        """What decides between speed and recall, and its name; None where nothing does."""
        faiss = _faiss()
        inner = faiss.downcast_index(self._index)
        if isinstance(inner, faiss.IndexPreTransform):
            inner = faiss.downcast_index(inner.index)
        if isinstance(inner, faiss.IndexIVF):
            return inner, "nprobe"
        return (inner.hnsw, "efSearch") if isinstance(inner, faiss.IndexHNSW) else (None, "")


def contents(snapshot: Snapshot) -> str:
    """Identity of a store's rows and their memories."""
    shards = [
        (entry.rows, entry.memory.sha256, entry.deleted.facts.sha256 if entry.deleted else "")
        for entry in snapshot.manifest.shards
    ]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def _check_fresh(facts: IndexFacts, snapshot: Snapshot) -> None:
    if facts.contents != contents(snapshot):
        raise StoreError(
            f"the index of {snapshot.path} is stale: it was built from other documents ({facts.rows}, now "
            f"{len(snapshot)}); build it again (clara-fast index {snapshot.path})"
        )


def _full_kind(kind: str, rows: int) -> str:
    """FAISS's name of ``kind``; ``"IVF"`` and ``"HNSW"`` get the numbers that suit ``rows`` documents."""
    if kind == "HNSW":
        return "HNSW32"
    if kind == "IVF" or kind.startswith("IVF,"):
        lists = max(1, min(int(4 * rows**0.5), rows // _FEWEST_PER_LIST))
        return f"IVF{lists}{kind[3:] or ',Flat'}"
    return kind


def _training_keys(snapshot: Snapshot, index: Any) -> np.ndarray:
    """Pooled memories from all over the store, as many as training looks at."""
    try:
        lists = _faiss().extract_index_ivf(index).nlist
    except RuntimeError:
        lists = _MOST_PER_LIST
    count = min(len(snapshot), max(_MOST_PER_LIST * lists, 1 << 14))
    rows = np.unique(np.linspace(0, len(snapshot) - 1, count).astype(np.int64))
    parts = (rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK))
    return np.concatenate([_unit(snapshot.memory(part).float().mean(1)) for part in parts])


def _pooled_keys(snapshot: Snapshot) -> Iterator[np.ndarray]:
    """Pooled memories of all rows in order, ``[n, D]`` at a time."""
    for number in range(len(snapshot.shards)):
        for rows in snapshot.live_blocks(number, _BLOCK):
            yield _unit(snapshot.format.decode(rows.memory, rows.scales).float().mean(1))


def _unit(vectors: Tensor) -> np.ndarray:
    return np.ascontiguousarray(F.normalize(vectors, dim=1).numpy())


def _live(snapshot: Snapshot, allowed: Sequence[np.ndarray]) -> np.ndarray:
    """``[documents]`` bool from masks of the shards' rows."""
    parts = [mask[shard.live_mask()] for mask, shard in zip(allowed, snapshot.shards, strict=True)]
    return np.concatenate([np.empty(0, dtype=bool), *parts])


def _exact(snapshot: Snapshot, query: Tensor, k: int, allowed: Sequence[np.ndarray] | None) -> tuple[Tensor, Tensor]:
    return search.topk(snapshot, query, k, source=MappedKeys(), allowed=allowed)


def _number_of_candidates(candidates: int | None, k: int, rows: int) -> int:
    if candidates is None:
        candidates = max(_CANDIDATES_PER_HIT * k, _FEWEST_CANDIDATES)
    elif candidates < k:
        raise ValueError(f"candidates ({candidates}) must be at least k ({k})")
    return min(candidates, rows)


def _read_facts(file: Path) -> IndexFacts:
    try:
        facts = IndexFacts(**json.loads(file.read_bytes()))
        # A name with a folder in it would let a foreign file reach outside the store.
        if not _FAISS_FILE.fullmatch(facts.file):
            raise ValueError(f"{facts.file!r} is not the name of an index")
    except (FileNotFoundError, NotADirectoryError):
        store = file.parent.parent
        raise StoreError(f"{store} has no index: build one (clara-fast index {store})") from None
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(file, str(error)) from None
    return facts


def _damaged(file: Path, what: str) -> StoreDamagedError:
    return StoreDamagedError(f"{file} is damaged: {what}; build the index again (clara-fast index)")


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ImportError("an index needs FAISS: pip install clara-fast[faiss]") from None
    return faiss
