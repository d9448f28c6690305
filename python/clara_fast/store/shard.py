"""One shard: memories in safetensors, documents in Parquet, written whole and read in place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clara_fast.store.documents import Document
from clara_fast.store.errors import StoreDamagedError
from clara_fast.store.files import FileFacts, Staged, file_sha256, sync_folder
from clara_fast.store.manifest import ShardEntry

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SAFETENSORS_NAME = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("id", "title", "text", "metadata")])
# Reading one hit decodes one row group: small enough to be quick, large enough to compress.
_ROWS_PER_GROUP = 128
_ALIGNMENT = 64


def write_shard(folder: Path, name: str, rows: list[dict[str, str]], memory: Tensor, dtype: str) -> ShardEntry:
    """Write both files of a shard and sync them; the caller makes it count by writing the manifest.

    Args:
        folder: of the shards.
        name: such as ``"00000"``.
        rows: ``{"id", "title", "text", "metadata"}`` per document.
        memory: ``[n, m, D]``, contiguous, on the CPU, in ``dtype``.
        dtype: a key of ``DTYPES``.
    """
    staged = [
        Staged(folder / f"{name}.safetensors", _safetensors(memory, dtype)),
        Staged(folder / f"{name}.parquet", [_parquet(rows)]),
    ]
    for file in staged:
        file.publish()
    sync_folder(folder)
    return ShardEntry(len(rows), *(file.facts for file in staged))


def _safetensors(memory: Tensor, dtype: str) -> Iterator[bytes | memoryview]:
    # By hand rather than with safetensors.torch.save: no second copy of the shard, and the padded header puts
    # the rows on a cache line, so that no vector load of a scan is split.
    data = memory.reshape(-1).view(torch.uint8).numpy().data
    entry = {"dtype": _SAFETENSORS_NAME[dtype], "shape": list(memory.shape), "data_offsets": [0, len(data)]}
    header = json.dumps({"memory": entry}).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    yield len(header).to_bytes(8, "little")
    yield header
    yield data


def _parquet(rows: list[dict[str, str]]) -> memoryview:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    pq.write_table(table, sink, row_group_size=_ROWS_PER_GROUP, compression="zstd", write_page_checksum=True)
    return memoryview(sink.getvalue())


class Shard:
    """A shard for reading; its files are opened when first used, so a damaged one harms no other.

    Args:
        folder: of the shards.
        entry: what the manifest says of it.
        start: row of the store that its first row is.
        shape: ``(m, D)`` of a memory.
        dtype: of the stored memories.
    """

    def __init__(self, folder: Path, entry: ShardEntry, start: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.folder = folder
        self.entry = entry
        self.start = start
        self._shape = (entry.rows, *shape)
        self._dtype = dtype

    @cached_property
    def memory(self) -> Tensor:
        """``[n, m, D]``, mapped: a page is read when it is touched. Not to be written to."""
        path = self._path(self.entry.memory)
        self._check_size(self.entry.memory)
        try:
            with safe_open(path, framework="pt") as file:
                memory: Tensor = file.get_tensor("memory")
        except (SafetensorError, OSError) as error:
            raise self._damaged(self.entry.memory, str(error)) from None
        if tuple(memory.shape) != self._shape or memory.dtype != self._dtype:
            found = f"{memory.dtype} {tuple(memory.shape)}"
            raise self._damaged(self.entry.memory, f"holds {found}, not {self._dtype} {self._shape}")
        return memory

    @property
    def keys(self) -> Tensor:
        """``[n, m * D]``: the same storage, one row per document."""
        return self.memory.flatten(1)

    def documents(self, rows: Sequence[int]) -> Iterator[Document]:
        """The documents at the store's ``rows``, which must be ascending and in this shard."""
        for group, members in groupby(rows, key=lambda row: (row - self.start) // _ROWS_PER_GROUP):
            table = self._read(group)
            first = self.start + group * _ROWS_PER_GROUP
            for row in members:
                values = {name: table.column(name)[row - first].as_py() for name in _SCHEMA.names}
                values["metadata"] = json.loads(values["metadata"])
                yield Document(row=row, **values)

    def ids(self) -> list[str]:
        """Ids of all rows."""
        return self._read(None, ["id"]).column("id").to_pylist()

    def problems(self) -> list[str]:
        """What is wrong with the shard's files, read in full; empty if nothing is."""
        found = []
        for facts, probe in ((self.entry.memory, self._probe_memory), (self.entry.documents, self.ids)):
            try:
                self._check_size(facts)
                if file_sha256(self._path(facts)) != facts.sha256:
                    raise self._damaged(facts, "its checksum is not the manifest's")
                probe()
            except StoreDamagedError as error:
                found.append(str(error))
            except OSError as error:
                found.append(str(self._damaged(facts, error.strerror or str(error))))
        return found

    def _probe_memory(self) -> None:
        self.__dict__.pop("memory", None)  # what is mapped may be an older file than what the name now means
        _ = self.memory

    def _read(self, group: int | None, columns: list[str] | None = None) -> pa.Table:
        facts = self.entry.documents
        self._check_size(facts)
        try:
            with pq.ParquetFile(self._path(facts), memory_map=True, page_checksum_verification=True) as file:
                if file.metadata.num_rows != self.entry.rows or file.schema_arrow.names != _SCHEMA.names:
                    raise self._damaged(facts, f"it does not hold {self.entry.rows} rows of {_SCHEMA.names}")
                return file.read(columns) if group is None else file.read_row_group(group, columns)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(facts, str(error).splitlines()[0]) from None

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
            f"{self._path(facts)} is damaged: {what}; copy it back, or drop the shard's {self.entry.rows} "
            "documents (clara-fast inspect STORE --repair) and compress them again"
        )
        return StoreDamagedError(message, shards=[self.entry.name])
