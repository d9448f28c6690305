"""One shard, read in place: memories through a memory map, documents by row groups."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clara_fast.store import pages
from clara_fast.store.documents import Document
from clara_fast.store.errors import StoreDamagedError
from clara_fast.store.files import FileFacts, file_sha256
from clara_fast.store.formats import Format, Rows
from clara_fast.store.manifest import ShardEntry
from clara_fast.store.shard_files import ROWS_PER_GROUP, SCHEMA, id_digests

# What safetensors allows.
_LONGEST_HEADER = 100_000_000
# What a hit's text costs is mostly the parsing of its file's footer, of a megabyte or two when parsed.
_FOOTERS = 16


class Shard:
    """A shard for reading; its files are opened when first used, so a damaged one harms no other.

    Rows are counted from the shard's first and include the deleted ones.

    Args:
        folder: of the shards.
        entry: what the manifest says of it.
        shape: ``(m, D)`` of a memory.
        format: of the stored memories.
    """

    def __init__(self, folder: Path, entry: ShardEntry, shape: tuple[int, int], format: Format) -> None:
        self.folder = folder
        self.entry = entry
        self.format = format
        self._shape = shape

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        tensors = self._open(self.entry.memory)
        n, m, width = self.entry.rows, *self._shape
        expected = {"memory": (self.format.dtype, (n, m, width)), "id_digests": (torch.int64, (n, 2))}
        expected["pooled"] = (self.format.dtype, (n, width))
        expected |= {"scales": (torch.float32, (n, m)), "pooled_scales": (torch.float32, (n,))}
        required = {"memory"} | ({"scales"} if self.format.largest else set())
        for name in required - tensors.keys():
            raise self._damaged(self.entry.memory, f"it holds no {name!r}")
        for name in expected.keys() & tensors.keys():
            found = (tensors[name].dtype, tuple(tensors[name].shape))
            if found != expected[name]:
                raise self._damaged(
                    self.entry.memory,
                    f"{name!r} holds {found[0]} {found[1]}, not {expected[name][0]} {expected[name][1]}",
                )
        return tensors

    @property
    def is_open(self) -> bool:
        """Whether the file of memories is."""
        return "_tensors" in self.__dict__

    @property
    def rows(self) -> Rows:
        """All rows, mapped: a page is read when it is touched. Not to be written to."""
        tensors = self._tensors
        return Rows(*(tensors.get(name) for name in ("memory", "scales", "pooled", "pooled_scales")))  # type: ignore[arg-type]

    @cached_property
    def deleted(self) -> np.ndarray:
        """Rows that are no longer there, ascending, int64."""
        deletion = self.entry.deleted
        if deletion is None:
            return np.empty(0, dtype=np.int64)
        rows = self._open(deletion.facts).get("deleted", torch.empty(0)).numpy().astype(np.int64)
        fits = len(rows) == deletion.rows and rows.ndim == 1 and bool((np.diff(rows) > 0).all())
        if not fits or rows[0] < 0 or rows[-1] >= self.entry.rows:
            raise self._damaged(deletion.facts, f"it does not list {deletion.rows} of {self.entry.rows} rows")
        return rows

    @cached_property
    def _gaps(self) -> np.ndarray:
        # How many live rows stand before each deleted one.
        return self.deleted - np.arange(len(self.deleted))

    def row_of_live(self, live: np.ndarray) -> np.ndarray:
        """The rows that live rows number ``live`` are."""
        return live + np.searchsorted(self._gaps, live, side="right") if len(self.deleted) else live

    def live_of_row(self, rows: np.ndarray) -> np.ndarray:
        """The other way round, for rows that are not deleted."""
        return rows - np.searchsorted(self.deleted, rows) if len(self.deleted) else rows

    def live_mask(self) -> np.ndarray:
        """``[rows]`` bool, False where deleted."""
        mask = np.ones(self.entry.rows, dtype=bool)
        mask[self.deleted] = False
        return mask

    def documents(self, rows: Sequence[int], start: int = 0) -> Iterator[Document]:
        """The documents at ``rows``, which must be ascending; ``start`` is the store's row of the first live one."""
        numbers = self.live_of_row(np.asarray(rows, dtype=np.int64)) + start
        for group, members in groupby(
            zip(rows, numbers.tolist(), strict=True), key=lambda pair: pair[0] // ROWS_PER_GROUP
        ):
            table = self.table(group=int(group))
            for row, number in members:
                values = {name: table.column(name)[row - int(group) * ROWS_PER_GROUP].as_py() for name in SCHEMA.names}
                values["metadata"] = json.loads(values["metadata"])
                yield Document(row=number, **values)

    def table(self, columns: list[str] | None = None, group: int | None = None) -> pa.Table:
        """Columns of all rows, or of one row group."""
        facts = self.entry.documents
        self._check_size(facts)
        try:
            path = self._path(facts)
            about = _footer(path, facts)
            with pq.ParquetFile(path, metadata=about, memory_map=True, page_checksum_verification=True) as file:
                if file.metadata.num_rows != self.entry.rows or file.schema_arrow.names != SCHEMA.names:
                    raise self._damaged(facts, f"it does not hold {self.entry.rows} rows of {SCHEMA.names}")
                return file.read(columns) if group is None else file.read_row_group(group, columns)
        except (pa.ArrowException, OSError) as error:
            _footer.cache_clear()  # it may be what is damaged, and the file mended by now
            raise self._damaged(facts, str(error).splitlines()[0]) from None

    def id_digests(self) -> np.ndarray:
        """``[live rows, 2]``: see :func:`clara_fast.store.shard_files.id_digests`."""
        stored = self._tensors.get("id_digests")
        digests = stored.numpy() if stored is not None else id_digests(self.ids())
        return digests[self.live_mask()] if len(self.deleted) else digests

    def ids(self) -> list[str]:
        """Ids of all rows, deleted ones too."""
        return self.table(["id"]).column("id").to_pylist()

    def bring(self, name: str, rows: slice) -> None:
        """Have rows of one of the tensors in the system's cache: see :func:`clara_fast.store.pages.bring`.

        Best asked for before the file is open: what opening brings comes in small pages.
        """
        path = self._path(self.entry.memory)
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # told when the file is opened
            pages.bring(path, 0, 1)
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, _LONGEST_HEADER)))
            header.pop("__metadata__", None)
            for about in header.values():  # opening touches where each tensor begins
                pages.bring(path, 8 + length + about["data_offsets"][0], 1)
            begin, end = header[name]["data_offsets"]
            width = (end - begin) // self.entry.rows
            pages.bring(path, 8 + length + begin + rows.start * width, (rows.stop - rows.start) * width)

    def problems(self) -> list[str]:
        """What is wrong with the shard's files, read in full; empty if nothing is."""
        found = []
        probes = [(self.entry.memory, self._probe_memory), (self.entry.documents, self._probe_documents)]
        if self.entry.deleted is not None:
            probes.append((self.entry.deleted.facts, self._probe_deleted))
        for facts, probe in probes:
            try:
                self._check_size(facts)
                pages.bring(self._path(facts), 0, facts.bytes)  # as a search wants it, when it comes to that
                if file_sha256(self._path(facts)) != facts.sha256:
                    raise self._damaged(facts, "its checksum is not the manifest's")
                probe()
            except StoreDamagedError as error:
                found.append(str(error))
            except OSError as error:
                found.append(str(self._damaged(facts, error.strerror or str(error))))
        return found

    def _probe_memory(self) -> None:
        self.__dict__.pop("_tensors", None)  # what is mapped may be an older file than what the name now means
        _ = self._tensors

    def _probe_documents(self) -> None:
        _footer.cache_clear()
        names = self.ids()
        stored = self.__dict__.get("_tensors", {}).get("id_digests")
        if stored is not None and not np.array_equal(stored.numpy(), id_digests(names)):
            raise self._damaged(self.entry.memory, f"its ids are not those of {self.entry.documents.file}")

    def _probe_deleted(self) -> None:
        self.__dict__.pop("deleted", None)
        _ = self.deleted

    def _open(self, facts: FileFacts) -> dict[str, Tensor]:
        self._check_size(facts)
        try:
            with safe_open(self._path(facts), framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise self._damaged(facts, str(error)) from None

    def _check_size(self, facts: FileFacts) -> None:
        try:
            size = self._path(facts).stat().st_size
        except FileNotFoundError:
            raise self._damaged(facts, "the file is missing") from None
        except OSError as error:
            raise self._damaged(facts, error.strerror or str(error)) from None
        if size != facts.bytes:
            raise self._damaged(facts, f"it has {size} bytes, not {facts.bytes}")

    def _path(self, facts: FileFacts) -> Path:
        return self.folder / facts.file

    def _damaged(self, facts: FileFacts, what: str) -> StoreDamagedError:
        message = (
            f"{self._path(facts)} is damaged: {what}; copy it back, or drop the shard's {self.entry.live} "
            "documents (clara-fast inspect STORE --repair) and compress them again"
        )
        return StoreDamagedError(message, shards=[self.entry.name])


@lru_cache(maxsize=_FOOTERS)
def _footer(path: Path, facts: FileFacts) -> pq.FileMetaData:
    """Where the row groups of a file of documents lie."""
    with pq.ParquetFile(path, memory_map=True) as file:
        return file.metadata
