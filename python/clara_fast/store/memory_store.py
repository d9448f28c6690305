"""`MemoryStore`: the folder of shards as one list of documents with memories."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from torch import Tensor

from clara_fast.store import life, transfer
from clara_fast.store.documents import document_rows
from clara_fast.store.errors import StoreDamagedError, StoreError, StoreMismatchError, listing
from clara_fast.store.files import TEMPORARY
from clara_fast.store.formats import Rows, format_of
from clara_fast.store.locks import READERS_LOCK, WRITER_LOCK, ReaderPin, WriterLock
from clara_fast.store.manifest import MANIFEST_FILE, SHARD_FOLDER, Manifest, ModelFacts
from clara_fast.store.reading import StoreReader, Writer
from clara_fast.store.snapshot import Snapshot

if TYPE_CHECKING:
    from clara_fast.store.pooled_index import PooledIndex


class MemoryStore(StoreReader):
    """Memories ``[N, m, D]`` with their documents, in shards on disk.

    A store is opened with :meth:`create` or :meth:`open`. Reading needs no lock: a reader sees the documents that
    were there when it opened, or at its last :meth:`refresh`, whatever a writer does meanwhile. The first change
    takes the writer's lock, which is held until :meth:`close`, the end of a ``with`` block or of the process.
    A change is on disk when its method returns; if it raises, the store is as it was before.

    Rows number the documents in the order they were added; ids are their lasting names. Iterating yields every
    :class:`Document` in row order.
    """

    _lock: WriterLock | None = None

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        model: Writer,
        *,
        dtype: str = "bfloat16",
        pooled_keys: bool = False,
        loaded_from: Mapping[str, str] | None = None,
    ) -> Self:
        """Make an empty store in a new or empty folder, and hold its writer's lock.

        Args:
            path: the folder.
            model: gives the fingerprint and the geometry.
            dtype: of the stored memories: ``"bfloat16"``, ``"float16"``, ``"float32"``, or with a scale for each memory
                token ``"int8"`` or ``"float8_e4m3fn"``.
            pooled_keys: keep the mean of each document's memory tokens too, for ``search(keys="pooled")``.
            loaded_from: arguments of ``Clara.from_pretrained`` that load ``model`` again, for commands.

        Raises:
            FileExistsError: ``path`` already holds a store or other files.
            ValueError: ``dtype`` is unknown.
            StoreLockedError: another process is creating a store there.
            StoreError: the folder cannot be written.
        """
        manifest = Manifest(
            model=ModelFacts(model.fingerprint, dict(loaded_from or {})),
            num_memory=model.config.num_memory,
            hidden_size=model.config.hidden_size,
            dtype=format_of(dtype).name,
            pooled_keys=pooled_keys,
        )
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{path} is a file; a store is a folder")
        with _explained(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = WriterLock(path)
            if (path / MANIFEST_FILE).exists():
                raise FileExistsError(f"{path} already holds a store; open it to add to it")
            ours = {WRITER_LOCK, READERS_LOCK, SHARD_FOLDER, MANIFEST_FILE + TEMPORARY}
            if foreign := sorted(entry.name for entry in path.iterdir() if entry.name not in ours):
                raise FileExistsError(f"{path} is no store and not empty ({listing(foreign)}); choose a new folder")
            store = cls(path, manifest, ReaderPin(path))
            store._lock = lock
            (path / SHARD_FOLDER).mkdir(exist_ok=True)
            store._remove_leftovers()
            manifest.write(path)
        store._adopt(manifest)
        return store

    @classmethod
    def open_or_create(cls, path: str | os.PathLike[str], model: Writer, **options: Any) -> Self:
        """:meth:`open` the store at ``path`` if there is one, else :meth:`create` it with ``options``."""
        return cls.open(path, model) if cls.exists(path) else cls.create(path, model, **options)

    def lock(self) -> None:
        """Take the writer's lock now rather than at the first change; see what others wrote before.

        Raises:
            StoreLockedError: another writer holds the store.
            StoreError: the folder cannot be written.
        """
        if self._lock is not None:
            return
        with _explained(self.path):
            self._lock = WriterLock(self.path)
        try:
            self.refresh()
            with _explained(self.path):
                (self.path / SHARD_FOLDER).mkdir(exist_ok=True)
                self._remove_leftovers()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the writer's lock back. Reading, and adding again, stay possible."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def build_index(self, kind: str = "IVF") -> PooledIndex:
        """Build an index for two-stage search and keep it beside the store, in the place of an older one.

        It holds the mean of each document's memory tokens; whole memories then decide among what it proposes.

        Args:
            kind: ``"IVF"`` or ``"HNSW"``, sized for this store, or a string of ``faiss.index_factory``, such as
                ``"IVF4096,SQ8"``; ``"IVF,SQ8"`` leaves the number of lists open.

        Raises:
            ImportError: the extra ``faiss`` is missing.
            ValueError: FAISS knows no such ``kind``, or the store holds too few documents for it.
            StoreLockedError: another writer holds the store.
        """
        from clara_fast.store.pooled_index import PooledIndex

        return PooledIndex.build(self, kind)

    def add(self, ids: Sequence[str], documents: Sequence[str | Mapping[str, Any]], memory: Tensor) -> None:
        """Write one shard of new documents.

        Args:
            ids: ``n`` lasting names, none of them in the store yet.
            documents: ``n`` texts, or ``{"title", "text", "metadata"}`` with title and metadata optional.
            memory: ``[n, m, D]``, any floating dtype, any device; rounded to the store's dtype.

        Raises:
            ValueError: lengths or shapes disagree, an id is taken, a text is empty, a memory is not finite.
            StoreLockedError: another writer holds the store.
            StoreError: the disk refuses.
        """
        rows, numbers = self._checked(ids, documents, memory)
        self.lock()
        found = self.ids.rows_of(ids)
        if taken := [name for name, row in zip(ids, found, strict=True) if row >= 0]:
            raise ValueError(f"ids already in the store: {listing(taken)}")
        if rows:
            before = self._snapshot
            self._commit(lambda snapshot: life.added(snapshot, rows, numbers))
            # Spares the next call reading all digests again.
            self._snapshot.__dict__["ids"] = before.ids.with_added(self._snapshot.shards[-1])

    def update(self, ids: Sequence[str], documents: Sequence[str | Mapping[str, Any]], memory: Tensor) -> None:
        """Give documents of the store another text and memory; readers see all the old or all the new ones.

        They move behind all others. Arguments and errors are those of :meth:`add`, but ids must be in the store.
        """
        rows, numbers = self._checked(ids, documents, memory)
        self.lock()
        places = self._rows_of(ids)
        if rows:
            self._commit(lambda snapshot: life.updated(snapshot, places, rows, numbers))
            self._remove_leftovers()

    def delete(self, ids: Sequence[str]) -> None:
        """Take documents out; later rows move down. :meth:`compact` gives the space back.

        Raises:
            ValueError: an id is not in the store; nothing is deleted then.
            StoreLockedError, StoreError: as for :meth:`add`.
        """
        if isinstance(ids, str):
            raise TypeError("ids must be a list of strings, not a string")
        self.lock()
        places = self._rows_of(ids)
        if len(places):
            self._commit(lambda snapshot: life.deleted(snapshot, places))
            self._remove_leftovers()

    def compact(self, *, shard_documents: int | None = None) -> int:
        """Rewrite shards with deleted rows and merge small neighbours; order and ids stay.

        One shard after the other, each a change of its own: it may be stopped and called again. The old files go
        when no reader that was opened before is left.

        Args:
            shard_documents: merge up to so many; default: what makes 256 MiB, at most 65536.

        Returns:
            how many shards were written.
        """
        most = life.shard_documents(self._snapshot, shard_documents)
        self.lock()
        written = 0
        while self._commit(lambda snapshot: life.compaction(snapshot, most)):
            self._remove_leftovers()
            written += 1
        return written

    def repair(self) -> list[str]:
        """Give up damaged shards, so that the rest is searchable and their documents can be added again.

        Returns:
            the names of the shards that were dropped. Rows of later shards move down; ids stay.
        """
        try:
            self.verify()
        except StoreDamagedError as error:
            dropped = set(error.shards)
            self.lock()
            self._commit(lambda s: s.manifest.with_shards(tuple(e for e in s.manifest.shards if e.name not in dropped)))
            self._remove_leftovers()
            return error.shards
        return []

    def convert(
        self,
        out: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        pooled_keys: bool | None = None,
        shard_documents: int | None = None,
    ) -> MemoryStore:
        """Copy the documents into a new store in another format, and compact; returns it, closed.

        Args:
            out: a new folder, which appears when all is copied.
            dtype, pooled_keys: as for :meth:`create`; default: as they are.
            shard_documents: as for :meth:`compact`.
        """
        manifest = self._manifest
        target = Manifest(
            model=manifest.model,
            num_memory=manifest.num_memory,
            hidden_size=manifest.hidden_size,
            dtype=manifest.dtype if dtype is None else format_of(dtype).name,
            pooled_keys=manifest.pooled_keys if pooled_keys is None else pooled_keys,
        )
        return _copied(self._snapshot, target, Path(out), shard_documents)

    def export(self, out: str | os.PathLike[str], *, shard_documents: int | None = None) -> int:
        """Write the documents into a new folder as pairs of safetensors and Parquet files that need no manifest.

        Returns:
            the number of pairs.
        """
        most = life.shard_documents(self._snapshot, shard_documents)
        with _explained(Path(out)):
            return transfer.export(self._snapshot, Path(out), most)

    @classmethod
    def import_from(
        cls, folder: str | os.PathLike[str], out: str | os.PathLike[str], model: Writer | None = None
    ) -> MemoryStore:
        """Make a store of what :meth:`export` wrote, or of files like those.

        Args:
            folder: with ``NAME.safetensors`` ("memory" ``[n, m, D]``) and ``NAME.parquet`` (id, title, text, metadata).
            out: a new folder for the store.
            model: that wrote the memories; needed where the files do not say it.

        Raises:
            StoreError, StoreDamagedError, StoreMismatchError: the files are not such, or another model's.
        """
        source = transfer.exported(Path(folder), model)
        transfer.check_import(source)
        return _copied(source, replace(source.manifest, shards=()), Path(out), None, model)

    def _commit(self, make: Callable[[Snapshot], Manifest | None]) -> bool:
        """Write what ``make`` writes, then its manifest; False if there was nothing to do."""
        self.lock()
        try:
            with _explained(self.path):
                manifest = make(self._snapshot)
                if manifest is None:
                    return False
                manifest.write(self.path)
        except BaseException:
            # An interrupt may fall on either side of the rename that decides, so ask the disk which it was.
            self._adopt(Manifest.read(self.path))
            with suppress(OSError):
                self._remove_leftovers()
            raise
        self._adopt(manifest)
        return True

    def _remove_leftovers(self) -> None:
        life.remove_leftovers(self.path, self._manifest, self._pin)

    def _checked(
        self, ids: Sequence[str], documents: Sequence[str | Mapping[str, Any]], memory: Tensor
    ) -> tuple[list[dict[str, str]], Rows]:
        if len(ids) != len(documents):
            raise ValueError(f"documents ({len(documents)}) must be as many as ids ({len(ids)})")
        life.check_shape(self._snapshot, len(ids), memory)
        rows = document_rows(ids, documents)
        return rows, life.encoded(self._snapshot, list(ids), memory)

    def _rows_of(self, ids: Sequence[str]) -> np.ndarray:
        found = self.ids.rows_of(ids)
        if missing := [name for name, row in zip(ids, found.tolist(), strict=True) if row < 0]:
            raise ValueError(f"ids not in the store: {listing(missing)}")
        return found


def _copied(
    source: Snapshot, target: Manifest, out: Path, shard_documents: int | None, model: Writer | None = None
) -> MemoryStore:
    """A new store at ``out`` with the documents of ``source``."""
    if model is not None and model.fingerprint != source.manifest.model.fingerprint:
        raise StoreMismatchError(
            f"{source.path} was written by another model (fingerprint {source.manifest.model.fingerprint}), "
            f"not by this one ({model.fingerprint})"
        )
    with _explained(out), transfer.new_folder(out) as folder:
        (folder / SHARD_FOLDER).mkdir()
        most = life.shard_documents(Snapshot(folder, target), shard_documents)
        transfer.write_copy(source, target, folder, most).write(folder)
    return MemoryStore.open(out)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of writing into one sentence; the store itself is never left half-written."""
    try:
        yield
    except (FileExistsError, StoreError):
        raise
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        raise StoreError(
            f"cannot write to {path}: {error.strerror or error}{file}; nothing was left half-written"
        ) from error
