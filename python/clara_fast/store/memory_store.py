"""`MemoryStore`: the folder of shards as one list of documents with memories."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from weakref import WeakSet

import torch
from torch import Tensor

from clara_fast.store import life, search, transfer
from clara_fast.store.checking import problems_of
from clara_fast.store.device_keys import DeviceKeys
from clara_fast.store.documents import Document, Hit, document_rows
from clara_fast.store.errors import StoreDamagedError, StoreError, StoreMismatchError, listing
from clara_fast.store.files import TEMPORARY
from clara_fast.store.filters import Where, allowed
from clara_fast.store.formats import format_of
from clara_fast.store.ids import Ids
from clara_fast.store.locks import READERS_LOCK, WRITER_LOCK, ReaderPin, WriterLock
from clara_fast.store.manifest import MANIFEST_FILE, SHARD_FOLDER, Manifest, ModelFacts
from clara_fast.store.snapshot import Snapshot


class Writer(Protocol):
    """What a store asks of the model that writes it (a :class:`clara_fast.Clara`)."""

    config: Any

    @property
    def fingerprint(self) -> str: ...


class MemoryStore:
    """Memories ``[N, m, D]`` with their documents, in shards on disk.

    A store is opened with :meth:`create` or :meth:`open`. Reading needs no lock: a reader sees the documents that
    were there when it opened, or at its last :meth:`refresh`, whatever a writer does meanwhile. The first change
    takes the writer's lock, which is held until :meth:`close`, the end of a ``with`` block or of the process.
    A change is on disk when its method returns; if it raises, the store is as it was before.

    Rows number the documents in the order they were added; ids are their lasting names. Iterating yields every
    :class:`Document` in row order.
    """

    def __init__(self, path: Path, manifest: Manifest, pin: ReaderPin) -> None:
        self.path = path
        self._lock: WriterLock | None = None
        self._pin = pin
        self._accepted: WeakSet[Any] = WeakSet()
        self._keys: search.KeySource = search.MappedKeys()
        self._snapshot = Snapshot(path, manifest)

    # Opening

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

    @classmethod
    def open_or_create(cls, path: str | os.PathLike[str], model: Writer, **options: Any) -> Self:
        """:meth:`open` the store at ``path`` if there is one, else :meth:`create` it with ``options``."""
        return cls.open(path, model) if cls.exists(path) else cls.create(path, model, **options)

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

    # Reading

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
        self, queries: Tensor, k: int, *, where: Where | None = None, keys: str = "memory", group: Any = None
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

        Returns:
            for each query its hits, best first.

        Raises:
            ValueError: ``k`` or the shape of ``queries`` is out of range, a query is not finite, ``where`` does not
                apply, or the store keeps no pooled keys.
            StoreDamagedError: a shard cannot be read.
        """
        scores, rows = self.topk(queries, k, where=where, keys=keys, group=group)
        wanted = sorted(set(rows.flatten().tolist()))
        found = dict(zip(wanted, self.documents(wanted), strict=True))
        return [
            [Hit(score=score, **vars(found[row])) for score, row in zip(*pair, strict=True)]
            for pair in zip(scores.tolist(), rows.tolist(), strict=True)
        ]

    def topk(
        self, queries: Tensor, k: int, *, where: Where | None = None, keys: str = "memory", group: Any = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`search` without the documents: scores ``[B, k]`` float32, descending; rows ``[B, k]`` int64.

        Exact over all shards; equal scores go to the lower row. Both are on the CPU.
        """
        snapshot = self._snapshot
        queries = self._flat_queries(queries, keys)
        if k < 1:
            raise ValueError(f"k ({k}) must be at least 1")
        if k > len(self):
            raise ValueError(f"k ({k}) must be at most the number of documents ({len(self)})")
        masks = allowed(snapshot, where) if where is not None else None
        if masks is not None:
            k = min(k, sum(int(mask.sum()) for mask in masks))
        return search.topk(snapshot, queries, k, source=self._keys, kind=keys, allowed=masks, group=group)

    def to(self, device: torch.device | str, *, resident_bytes: int | None = None) -> Self:
        """Search on ``device`` from now on; results stay on the CPU.

        Keys are copied there when they are first searched and stay, as many as fit; the rest is streamed through at
        every search.

        Args:
            device: ``"cpu"``: read in place; or a GPU.
            resident_bytes: what may stay on a GPU; default: 80 % of what is free there now.
        """
        place = torch.device(device)
        self._keys = search.MappedKeys() if place.type == "cpu" else DeviceKeys(place, resident_bytes)
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

    # Changing

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

    # Copying

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

    # Inside

    @property
    def _manifest(self) -> Manifest:
        return self._snapshot.manifest

    def _adopt(self, manifest: Manifest) -> None:
        """Take over a manifest, keeping what is open of the shards that stay."""
        self._pin.move(manifest.generation)
        if manifest != self._manifest:
            self._snapshot = Snapshot(self.path, manifest, before=self._snapshot)
            if isinstance(self._keys, DeviceKeys):
                self._keys.keep_only(manifest.shards)

    def _newest(self, manifest: Manifest) -> Manifest:
        """The manifest on disk, pinned: what it names stays."""
        while True:
            self._pin.move(manifest.generation)
            again = Manifest.read(self.path)
            if again.generation == manifest.generation:
                return again
            manifest = again

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
    ) -> tuple[list[dict[str, str]], Any]:
        if len(ids) != len(documents):
            raise ValueError(f"documents ({len(documents)}) must be as many as ids ({len(ids)})")
        life.check_shape(self._snapshot, len(ids), memory)
        rows = document_rows(ids, documents)
        return rows, life.encoded(self._snapshot, list(ids), memory)

    def _rows_of(self, ids: Sequence[str]) -> Any:
        found = self.ids.rows_of(ids)
        if missing := [name for name, row in zip(ids, found.tolist(), strict=True) if row < 0]:
            raise ValueError(f"ids not in the store: {listing(missing)}")
        return found

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
        if not bool(flat.isfinite().all()):
            raise ValueError("queries hold NaN or Inf")
        return flat if keys == "memory" else flat.float().view(-1, m, width).mean(1)


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
