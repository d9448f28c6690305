"""Reading a store: opening, looking up, searching. What changes one is in :mod:`clara_fast.store.memory_store`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from clara_fast.store import search
from clara_fast.store.blocks import KeySource, MappedKeys
from clara_fast.store.checking import problems_of
from clara_fast.store.device_keys import DeviceKeys
from clara_fast.store.documents import Document, Hit
from clara_fast.store.errors import StoreDamagedError, StoreMismatchError
from clara_fast.store.filters import Where, allowed
from clara_fast.store.ids import Ids
from clara_fast.store.locks import ReaderPin
from clara_fast.store.manifest import MANIFEST_FILE, Manifest, ModelFacts
from clara_fast.store.snapshot import Snapshot

if TYPE_CHECKING:
    from clara_fast.store.pooled_index import PooledIndex


class Writer(Protocol):
    """What a store asks of the model that writes it (a :class:`clara_fast.Clara`)."""

    config: Any

    @property
    def fingerprint(self) -> str: ...


class StoreReader:
    """A store for reading, as one manifest describes it; see :class:`clara_fast.store.MemoryStore`."""

    def __init__(self, path: Path, manifest: Manifest, pin: ReaderPin) -> None:
        self.path = path
        self._pin = pin
        self._accepted: WeakSet[Any] = WeakSet()
        self._keys: KeySource = MappedKeys()
        self._snapshot = Snapshot(path, manifest)

    @classmethod
    def open(cls, path: str | os.PathLike[str], model: Writer | None = None) -> Self:
        """Open a store; nothing but its manifest is read, whatever its size.

        Args:
            path: the folder.
            model: if given, it must be the one that wrote the store.

        Raises:
            StoreNotFoundError: there is no store.
            StoreError: a newer version wrote it.
            StoreDamagedError: its manifest is damaged.
            StoreMismatchError: another model wrote it.
        """
        path = Path(path)
        manifest = Manifest.read(path)  # first: where there is no store, nothing shall be made
        store = cls(path, manifest, ReaderPin(path))
        store._adopt(store._newest(manifest))
        if model is not None:
            store.check_model(model)
        return store

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        """Whether ``path`` holds a store."""
        return (Path(path) / MANIFEST_FILE).is_file()

    def refresh(self) -> bool:
        """See what has been written since this store was opened; returns whether anything has.

        Rows may then number other documents: after deletions the later ones move down.
        """
        before = self._manifest
        self._adopt(self._newest(Manifest.read(self.path)))
        return self._manifest != before

    def check_model(self, model: Writer) -> None:
        """Raise :class:`StoreMismatchError` unless ``model`` is the one that wrote the store.

        A model is looked at once: its fingerprint reads every weight of the compressor.
        """
        if model in self._accepted:
            return
        facts = self.model
        if model.fingerprint != facts.fingerprint:
            where = f", {facts.loaded_from['name_or_path']}" if "name_or_path" in facts.loaded_from else ""
            raise StoreMismatchError(
                f"{self.path} was written by another model (fingerprint {facts.fingerprint}{where}), "
                f"not by this one ({model.fingerprint}): "
                "use that model, or compress the corpus again into a new store"
            )
        self._accepted.add(model)

    def __len__(self) -> int:
        return len(self._snapshot)

    def __iter__(self) -> Iterator[Document]:
        return iter(self._snapshot)

    @property
    def model(self) -> ModelFacts:
        """Fingerprint and whereabouts of the model that wrote the store."""
        return self._manifest.model

    @property
    def ids(self) -> Ids:
        """A mapping of every document's id to its row, in row order; see :class:`Ids`."""
        return self._snapshot.ids

    def memory(self, rows: Sequence[int] | Tensor) -> Tensor:
        """Memories ``[len(rows), m, D]`` on the CPU, in the order asked for.

        They are in the store's dtype, or float32 where that has scales.
        """
        return self._snapshot.memory(self._snapshot.checked(rows))

    def documents(self, rows: Sequence[int] | Tensor) -> list[Document]:
        """The documents at ``rows``, in the order asked for."""
        return self._snapshot.documents(self._snapshot.checked(rows))

    def search(
        self,
        queries: Tensor,
        k: int,
        *,
        where: Where | None = None,
        keys: str = "memory",
        group: Any = None,
        index: PooledIndex | None = None,
        candidates: int | None = None,
    ) -> list[list[Hit]]:
        """The ``k`` documents whose memories have the highest cosine with each query.

        Args:
            queries: ``[B, m, D]`` or ``[B, m * D]``.
            k: at most the number of documents.
            where: find only documents for which this holds, and fewer than ``k`` if there are fewer:
                ``{"lang": "en", "topic": ["a", "b"], "year": {">=": 1990, "<": 2000}}`` over the metadata, ``id``,
                ``title`` and ``text``, or a ``pyarrow.compute.Expression``.
            keys: compare whole memories, or ``"pooled"``: means over the memory tokens, of queries and documents.
            group: of ``torch.distributed``: its ranks search a share of the shards each, for the same arguments, and
                all return the same.
            index: of :meth:`open_index`: compare only what it proposes, in time that hardly grows with the store.
            candidates: how much it proposes for each query; default 20 for each of ``k``, and 100 at least. Where no
                more documents than that fulfil ``where``, all of them are compared.

        Returns:
            for each query its hits, best first.

        Raises:
            ValueError: ``k`` or the shape of ``queries`` is out of range, a query is not finite, ``where`` does not
                apply, or the store keeps no pooled keys.
            StoreError: ``index`` was built from other documents.
            StoreDamagedError: a shard cannot be read.
        """
        options = {"where": where, "keys": keys, "group": group, "index": index, "candidates": candidates}
        return self._hits(self._snapshot, queries, k, **options)

    def search_with_memory(self, queries: Tensor, k: int, **options: Any) -> list[tuple[list[Hit], Tensor]]:
        """:meth:`search`, with the memories ``[k, m, D]`` of each query's hits as :meth:`memory` gives them.

        Both are of one state of the store, whoever refreshes it meanwhile.
        """
        snapshot = self._snapshot
        found = self._hits(snapshot, queries, k, **options)
        return [(hits, snapshot.memory(np.array([hit.row for hit in hits], dtype=np.int64))) for hits in found]

    def _hits(self, snapshot: Snapshot, queries: Tensor, k: int, **options: Any) -> list[list[Hit]]:
        scores, rows = self._topk(snapshot, queries, k, **options)
        wanted = np.unique(rows.numpy())
        found = dict(zip(wanted.tolist(), snapshot.documents(wanted), strict=True))
        return [
            [Hit(score=score, **vars(found[row])) for score, row in zip(*pair, strict=True)]
            for pair in zip(scores.tolist(), rows.tolist(), strict=True)
        ]

    def topk(
        self,
        queries: Tensor,
        k: int,
        *,
        where: Where | None = None,
        keys: str = "memory",
        group: Any = None,
        index: PooledIndex | None = None,
        candidates: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`search` without the documents: scores ``[B, k]`` float32, descending; rows ``[B, k]`` int64.

        Exact over all shards, unless there is an ``index``; equal scores go to the lower row. Both are on the CPU.
        """
        options = {"where": where, "keys": keys, "group": group, "index": index, "candidates": candidates}
        return self._topk(self._snapshot, queries, k, **options)

    def _topk(
        self,
        snapshot: Snapshot,
        queries: Tensor,
        k: int,
        where: Where | None = None,
        keys: str = "memory",
        group: Any = None,
        index: PooledIndex | None = None,
        candidates: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        queries = self._flat_queries(queries, keys)
        if not len(snapshot):
            raise ValueError(f"{self.path} holds no documents to search")
        if k < 1:
            raise ValueError(f"k ({k}) must be at least 1")
        if k > len(snapshot):
            raise ValueError(f"k ({k}) must be at most the number of documents ({len(snapshot)})")
        if index is not None and (keys != "memory" or group is not None):
            raise ValueError("a search with an index takes no keys or group: it is exact search that does")
        if index is None and candidates is not None:
            raise ValueError(f"candidates ({candidates}) is for a search with an index")
        masks = allowed(snapshot, where) if where is not None else None
        if masks is not None:
            k = min(k, sum(int(mask.sum()) for mask in masks))
            if k == 0:
                return torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        if index is not None:
            return index.topk(snapshot, queries, k, candidates, masks)
        return search.topk(snapshot, queries, k, source=self._keys, kind=keys, allowed=masks, group=group)

    def open_index(self, *, effort: int | None = None) -> PooledIndex:
        """The index beside the store. Only read one that was built here: FAISS trusts the files it reads.

        Args:
            effort: lists that a search visits (IVF), or neighbours (HNSW); more find more, and take longer.

        Raises:
            ImportError: the extra ``faiss`` is missing.
            StoreError: there is none, or it was built from other documents.
            StoreDamagedError: it is not what was written.
        """
        from clara_fast.store.pooled_index import PooledIndex

        return PooledIndex.open(self).with_effort(effort)

    def as_retriever(
        self, model: Writer, framework: str = "langchain", *, k: int = 5, parents: bool = False, **options: Any
    ) -> Any:
        """This store as a retriever of ``"langchain"`` or ``"llamaindex"`` (extras of these names).

        Args:
            model: encodes the questions (a :class:`clara_fast.Clara`).
            k: documents for each question, at most.
            parents: give whole documents in the place of their chunks, each once, and so perhaps fewer than ``k``.
            options: of :meth:`search`: ``where``, ``index``, ``candidates``, ...

        Raises:
            ImportError: the framework is missing.
            StoreMismatchError: another model wrote the store.
        """
        from clara_fast.store.retrievers import make_retriever

        return make_retriever(self, model, framework, k, parents, options)

    def to(self, device: torch.device | str, *, resident_bytes: int | None = None) -> Self:
        """Search on ``device`` from now on; results stay on the CPU.

        Keys are copied to a GPU when they are first searched and stay, as many as fit; the rest is streamed through at
        every search. On a CPU they are read in place, and as many pages stay mapped.

        Args:
            device: ``"cpu"`` or a GPU.
            resident_bytes: what may stay; default: 80 % of what is free on a GPU now, on a CPU 32 MiB. Beside that
                two blocks of at most 96 MiB are resident during a search, whatever the size of the store.
        """
        place = torch.device(device)
        self._keys = MappedKeys(resident_bytes) if place.type == "cpu" else DeviceKeys(place, resident_bytes)
        return self

    def stats(self) -> dict[str, Any]:
        """Counts, geometry, sizes in bytes, and the model that wrote the store; reads only the manifest."""
        manifest = self._manifest
        memory_bytes = sum(shard.memory.bytes for shard in manifest.shards)
        document_bytes = sum(shard.documents.bytes for shard in manifest.shards)
        return {
            "path": str(self.path),
            "format_version": manifest.version,
            "documents": manifest.rows,
            "deleted": sum(shard.rows - shard.live for shard in manifest.shards),
            "shards": len(manifest.shards),
            "num_memory": manifest.num_memory,
            "hidden_size": manifest.hidden_size,
            "dtype": manifest.dtype,
            "pooled_keys": manifest.pooled_keys,
            "memory_bytes": memory_bytes,
            "document_bytes": document_bytes,
            "bytes_per_document": (memory_bytes + document_bytes) / manifest.rows if manifest.rows else 0.0,
            "model": asdict(manifest.model),
        }

    def verify(self) -> dict[str, Any]:
        """Read every byte of every shard and hold it against the manifest.

        Returns:
            :meth:`stats` and the ``seconds`` it took.

        Raises:
            StoreDamagedError: a line per damaged file in ``problems``, the shards' names in ``shards``.
        """
        started = time.perf_counter()
        problems, damaged = problems_of(self._snapshot)
        if problems:
            rest = "" if len(problems) == 1 else f" (and {len(problems) - 1} more damaged files)"
            raise StoreDamagedError(problems[0] + rest, problems, damaged)
        return {**self.stats(), "seconds": time.perf_counter() - started}

    @property
    def _manifest(self) -> Manifest:
        return self._snapshot.manifest

    def _adopt(self, manifest: Manifest) -> None:
        """Take over a manifest, keeping what is open of the shards that stay."""
        self._pin.move(manifest.generation)
        if manifest != self._manifest:
            self._snapshot = Snapshot(self.path, manifest, before=self._snapshot)
            self._keys.keep_only(manifest.shards)

    def _newest(self, manifest: Manifest) -> Manifest:
        """The manifest on disk, pinned: what it names stays."""
        while True:
            self._pin.move(manifest.generation)
            again = Manifest.read(self.path)
            if again.generation == manifest.generation:
                return again
            manifest = again

    def _flat_queries(self, queries: Tensor, keys: str) -> Tensor:
        m, width = self._snapshot.shape
        if keys not in search.KEYS:
            raise ValueError(f"keys ({keys!r}) must be one of {', '.join(map(repr, search.KEYS))}")
        if keys == "pooled" and not self._manifest.pooled_keys:
            raise ValueError(
                f"keys ('pooled'): {self.path} keeps none; make a store that does: "
                f"clara-fast convert {self.path} --pooled-keys --out NEW"
            )
        if queries.shape[1:] not in ((m, width), (m * width,)):
            raise ValueError(f"queries must be [B, {m}, {width}] or [B, {m * width}], not {list(queries.shape)}")
        flat = queries.detach().flatten(1).to("cpu")
        if flat.dtype == torch.float64 or keys == "pooled":  # no kernel compares float64
            flat = flat.float()
        if keys == "pooled":
            flat = flat.view(-1, m, width).mean(1)
        if not bool(flat.isfinite().all()):
            raise ValueError("queries hold NaN or Inf, or numbers too large for float32")
        return flat
