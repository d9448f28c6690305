"""`MemoryStore`: the folder of shards as one list of documents with memories."""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self
from weakref import WeakSet

import torch
from torch import Tensor

from clara_fast import ops
from clara_fast.store.documents import Document, Hit, document_rows
from clara_fast.store.errors import StoreDamagedError, StoreError, StoreMismatchError, listing
from clara_fast.store.files import LOCK_FILE, TEMPORARY, WriterLock
from clara_fast.store.manifest import MANIFEST_FILE, SHARD_FILE, SHARD_FOLDER, VERSION, Manifest, ModelFacts
from clara_fast.store.shard import DTYPES, Shard, write_shard


class Writer(Protocol):
    """What a store asks of the model that writes it (a :class:`clara_fast.Clara`)."""

    config: Any

    @property
    def fingerprint(self) -> str: ...


class MemoryStore:
    """Memories ``[N, m, D]`` with their documents, in shards on disk.

    A store is opened with :meth:`create` or :meth:`open`. Reading needs no lock, and a reader sees the shards
    that were complete when it opened. The first :meth:`add` takes the writer's lock, which is held until
    :meth:`close`, the end of a ``with`` block or the end of the process. Iterating yields every
    :class:`Document` in row order.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._lock: WriterLock | None = None
        self._ids: dict[str, int] | None = None
        self._accepted: WeakSet[Any] = WeakSet()
        self._adopt(manifest)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        model: Writer,
        *,
        dtype: str = "bfloat16",
        loaded_from: Mapping[str, str] | None = None,
    ) -> Self:
        """Make an empty store in a new or empty folder, and hold its writer's lock.

        Args:
            path: the folder.
            model: gives the fingerprint and the geometry.
            dtype: of the stored memories: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
            loaded_from: arguments of ``Clara.from_pretrained`` that load ``model`` again, for commands.

        Raises:
            FileExistsError: ``path`` already holds a store or other files.
            ValueError: ``dtype`` is unknown.
            StoreLockedError: another process is creating a store there.
            StoreError: the folder cannot be written.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype ({dtype!r}) must be one of {', '.join(map(repr, DTYPES))}")
        path = Path(path)
        manifest = Manifest(
            model=ModelFacts(model.fingerprint, dict(loaded_from or {})),
            num_memory=model.config.num_memory,
            hidden_size=model.config.hidden_size,
            dtype=dtype,
        )
        store = cls(path, manifest)
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{path} is a file; a store is a folder")
        with _explained(path):
            path.mkdir(parents=True, exist_ok=True)
            store._lock = WriterLock(path)
            if (path / MANIFEST_FILE).exists():
                raise FileExistsError(f"{path} already holds a store; open it to add to it")
            ours = {LOCK_FILE, SHARD_FOLDER, MANIFEST_FILE + TEMPORARY}
            if foreign := sorted(entry.name for entry in path.iterdir() if entry.name not in ours):
                raise FileExistsError(f"{path} is no store and not empty ({listing(foreign)}); choose a new folder")
            store._shard_folder.mkdir(exist_ok=True)
            store._remove_leftovers()
            manifest.write(path)
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str], model: Writer | None = None) -> Self:
        """Open a store; the cost does not depend on how many documents it holds.

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
        store = cls(path, Manifest.read(path))
        if model is not None:
            store.check_model(model)
        return store

    @classmethod
    def open_or_create(cls, path: str | os.PathLike[str], model: Writer, **options: Any) -> Self:
        """:meth:`open` the store at ``path`` if there is one, else :meth:`create` it with ``options``."""
        return cls.open(path, model) if cls.exists(path) else cls.create(path, model, **options)

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        """Whether ``path`` holds a store."""
        return (Path(path) / MANIFEST_FILE).is_file()

    def check_model(self, model: Writer) -> None:
        """Raise :class:`StoreMismatchError` unless ``model`` is the one that wrote the store.

        A model is looked at once: its fingerprint reads every weight of the compressor.
        """
        if model in self._accepted:
            return
        facts = self._manifest.model
        if model.fingerprint != facts.fingerprint:
            where = f", {facts.loaded_from['name_or_path']}" if "name_or_path" in facts.loaded_from else ""
            raise StoreMismatchError(
                f"{self.path} was written by another model (fingerprint {facts.fingerprint}{where}), "
                f"not by this one ({model.fingerprint}): "
                "use that model, or compress the corpus again into a new store"
            )
        self._accepted.add(model)

    def __len__(self) -> int:
        return self._manifest.rows

    def __iter__(self) -> Iterator[Document]:
        for shard in list(self._shards):
            yield from shard.documents(range(shard.start, shard.start + shard.entry.rows))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def lock(self) -> None:
        """Take the writer's lock now rather than at the first :meth:`add`; see what others added before.

        Raises:
            StoreLockedError: another writer holds the store.
            StoreError: the folder cannot be written.
        """
        if self._lock is not None:
            return
        with _explained(self.path):
            self._lock = WriterLock(self.path)
        try:
            # Another writer may have added shards since this store was opened.
            self._ids = None
            self._adopt(Manifest.read(self.path))
            with _explained(self.path):
                self._shard_folder.mkdir(exist_ok=True)
                self._remove_leftovers()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the writer's lock back. Reading, and adding again, stay possible."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def model(self) -> ModelFacts:
        """Fingerprint and whereabouts of the model that wrote the store."""
        return self._manifest.model

    @property
    def ids(self) -> Mapping[str, int]:
        """Every document's id and row, in row order; read from the shards when first asked for."""
        if self._ids is None:
            names = (name for shard in self._shards for name in shard.ids())
            self._ids = {name: row for row, name in enumerate(names)}
        return MappingProxyType(self._ids)

    def add(self, ids: Sequence[str], documents: Sequence[str | Mapping[str, Any]], memory: Tensor) -> None:
        """Write one shard; when this returns it is on disk, and if it raises the store is as it was before.

        Args:
            ids: ``n`` lasting names, none of them in the store yet.
            documents: ``n`` texts, or ``{"title", "text", "metadata"}`` with title and metadata optional.
            memory: ``[n, m, D]``, any floating dtype, any device; rounded to the store's dtype.

        Raises:
            ValueError: lengths or shapes disagree, an id is taken, a text is empty, a memory is not finite.
            StoreLockedError: another writer holds the store.
            StoreError: the disk refuses.
        """
        shape = (self._manifest.num_memory, self._manifest.hidden_size)
        if len(ids) != len(documents):
            raise ValueError(f"documents ({len(documents)}) must be as many as ids ({len(ids)})")
        if memory.shape != (len(ids), *shape):
            raise ValueError(f"memory must be [{len(ids)}, {shape[0]}, {shape[1]}], not {list(memory.shape)}")
        rows = document_rows(ids, documents)
        stored = memory.detach().to("cpu", DTYPES[self._manifest.dtype]).contiguous()
        finite = stored.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            bad = [name for name, fine in zip(ids, finite.tolist(), strict=True) if not fine]
            raise ValueError(f"memory of {listing(bad)} holds NaN or Inf in {self._manifest.dtype}")
        self.lock()
        if taken := [name for name in ids if name in self.ids]:
            raise ValueError(f"ids already in the store: {listing(taken)}")
        if not rows:
            return
        try:
            with _explained(self.path):
                name = f"{self._manifest.next_shard:05d}"
                entry = write_shard(self._shard_folder, name, rows, stored, self._manifest.dtype)
                manifest = self._manifest.with_shard(entry)
                manifest.write(self.path)
        except BaseException:
            # An interrupt may fall on either side of the rename that decides, so ask the disk which it was.
            self._ids = None
            self._adopt(Manifest.read(self.path))
            self._remove_leftovers()
            raise
        known = self._ids
        self._adopt(manifest)
        if known is not None:
            known.update((name, len(known)) for name in ids)

    def search(self, queries: Tensor, k: int) -> list[list[Hit]]:
        """The ``k`` documents whose memories have the highest cosine with each query.

        Args:
            queries: ``[B, m, D]`` or ``[B, m * D]``.
            k: at most the number of documents.

        Returns:
            for each query its hits, best first.

        Raises:
            ValueError: ``k`` or the shape of ``queries`` is out of range, or a query is not finite.
            StoreDamagedError: a shard cannot be read.
        """
        scores, rows = self.topk(queries, k)
        wanted = sorted(set(rows.flatten().tolist()))
        found = dict(zip(wanted, self.documents(wanted), strict=True))
        return [
            [Hit(score=score, **vars(found[row])) for score, row in zip(*pair, strict=True)]
            for pair in zip(scores.tolist(), rows.tolist(), strict=True)
        ]

    def topk(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """:meth:`search` without the documents: scores ``[B, k]`` float32, descending; rows ``[B, k]`` int64.

        Exact over all shards, on the CPU; equal scores go to the lower row.
        """
        queries = self._flat_queries(queries)
        if k < 1:
            raise ValueError(f"k ({k}) must be at least 1")
        if k > len(self):
            raise ValueError(f"k ({k}) must be at most the number of documents ({len(self)})")
        parts = []
        for shard in self._shards:
            scores, indices = ops.cosine_topk(queries, shard.keys, min(k, shard.entry.rows))
            parts.append((scores, indices + shard.start))
        scores, rows = (torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))
        # Equal scores stand in row order here (shards ascend, the op orders ties): a stable sort keeps it.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return scores[:, :k].contiguous(), rows.gather(1, order[:, :k])

    def memory(self, rows: Sequence[int] | Tensor) -> Tensor:
        """Memories ``[len(rows), m, D]`` in the store's dtype, on the CPU, in the order asked for."""
        rows = self._checked(rows)
        shape = (len(rows), self._manifest.num_memory, self._manifest.hidden_size)
        out = torch.empty(shape, dtype=DTYPES[self._manifest.dtype])
        for place, row in enumerate(rows):
            shard = self._shard_of(row)
            out[place] = shard.memory[row - shard.start]
        return out

    def documents(self, rows: Sequence[int] | Tensor) -> list[Document]:
        """The documents at ``rows``, in the order asked for."""
        rows = self._checked(rows)
        found: dict[int, Document] = {}
        for shard, members in groupby(sorted(set(rows)), key=self._shard_of):
            found.update((document.row, document) for document in shard.documents(list(members)))
        return [found[row] for row in rows]

    def verify(self) -> dict[str, Any]:
        """Read every byte of every shard and hold it against the manifest.

        Returns:
            :meth:`stats` and the ``seconds`` it took.

        Raises:
            StoreDamagedError: a line per damaged file in ``problems``, the shards' names in ``shards``.
        """
        started = time.perf_counter()
        problems, damaged = [], []
        seen: dict[str, int] = {}
        for shard in self._shards:
            found = shard.problems()
            names = [] if found else shard.ids()
            if twice := [name for row, name in enumerate(names, shard.start) if seen.setdefault(name, row) != row]:
                found = [f"{self.path}: shard {shard.entry.name} repeats the ids {listing(twice)}"]
            if found:
                problems += found
                damaged.append(shard.entry.name)
        if problems:
            rest = "" if len(problems) == 1 else f" (and {len(problems) - 1} more damaged files)"
            raise StoreDamagedError(problems[0] + rest, problems, damaged)
        return {**self.stats(), "seconds": time.perf_counter() - started}

    def repair(self) -> list[str]:
        """Give up damaged shards, so that the rest is searchable and their documents can be added again.

        Returns:
            the names of the shards that were dropped. Rows of later shards move down; ids stay.
        """
        try:
            self.verify()
        except StoreDamagedError as error:
            self.lock()
            manifest = self._manifest.without(set(error.shards))
            with _explained(self.path):
                manifest.write(self.path)
            self._ids = None
            self._adopt(manifest)
            self._remove_leftovers()
            return error.shards
        return []

    def stats(self) -> dict[str, Any]:
        """Counts, geometry, sizes in bytes, and the model that wrote the store; reads only the manifest."""
        manifest = self._manifest
        memory_bytes = sum(shard.memory.bytes for shard in manifest.shards)
        document_bytes = sum(shard.documents.bytes for shard in manifest.shards)
        return {
            "path": str(self.path),
            "format_version": VERSION,
            "documents": manifest.rows,
            "shards": len(manifest.shards),
            "num_memory": manifest.num_memory,
            "hidden_size": manifest.hidden_size,
            "dtype": manifest.dtype,
            "memory_bytes": memory_bytes,
            "document_bytes": document_bytes,
            "bytes_per_document": (memory_bytes + document_bytes) / manifest.rows if manifest.rows else 0.0,
            "model": asdict(manifest.model),
        }

    @property
    def _shard_folder(self) -> Path:
        return self.path / SHARD_FOLDER

    def _adopt(self, manifest: Manifest) -> None:
        """Take over a manifest, keeping what is mapped of the shards that stay."""
        open_shards = {shard.entry: shard for shard in getattr(self, "_shards", [])}
        shape, dtype = (manifest.num_memory, manifest.hidden_size), DTYPES.get(manifest.dtype)
        if dtype is None:
            raise StoreError(
                f"{self.path} holds {manifest.dtype} memories, which this clara_fast cannot read: upgrade it"
            )
        self._shards: list[Shard] = []
        start = 0
        for entry in manifest.shards:
            shard = open_shards.get(entry)
            if shard is None or shard.start != start:
                shard = Shard(self._shard_folder, entry, start, shape, dtype)
            self._shards.append(shard)
            start += entry.rows
        self._starts = [shard.start for shard in self._shards]
        self._manifest = manifest

    def _remove_leftovers(self) -> None:
        """Delete what a killed writer left; only files with names of our own, only under the lock."""
        (self.path / (MANIFEST_FILE + TEMPORARY)).unlink(missing_ok=True)
        listed = {facts.file for shard in self._manifest.shards for facts in shard.files}
        for file in self._shard_folder.iterdir():
            if SHARD_FILE.fullmatch(file.name.removesuffix(TEMPORARY)) and file.name not in listed:
                file.unlink(missing_ok=True)

    def _flat_queries(self, queries: Tensor) -> Tensor:
        m, width = self._manifest.num_memory, self._manifest.hidden_size
        if queries.shape[1:] not in ((m, width), (m * width,)):
            raise ValueError(f"queries must be [B, {m}, {width}] or [B, {m * width}], not {list(queries.shape)}")
        flat = queries.detach().flatten(1).to("cpu")
        if not bool(flat.isfinite().all()):
            raise ValueError("queries hold NaN or Inf")
        return flat

    def _checked(self, rows: Sequence[int] | Tensor) -> list[int]:
        listed = [int(row) for row in (rows.tolist() if isinstance(rows, Tensor) else rows)]
        for row in listed:
            if not 0 <= row < len(self):
                raise IndexError(f"rows: {row} must be in [0, {len(self)}), the store's documents")
        return listed

    def _shard_of(self, row: int) -> Shard:
        return self._shards[bisect_right(self._starts, row) - 1]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of writing into one sentence; the store itself is never left half-written."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        raise StoreError(
            f"cannot write to {path}: {error.strerror or error}{file}; nothing was left half-written"
        ) from error
