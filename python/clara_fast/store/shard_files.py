"""Writing the files of a shard: numbers in safetensors, documents in Parquet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from clara_fast.store.files import Staged, sync_folder
from clara_fast.store.formats import Format, Rows
from clara_fast.store.manifest import Deletion, ShardEntry

SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("id", "title", "text", "metadata")])
# Reading one hit decodes one row group: small enough to be quick, large enough to compress.
ROWS_PER_GROUP = 128
_ALIGNMENT = 64
_DIGEST_BYTES = 16


def write_shard(
    folder: Path,
    name: str,
    table: pa.Table,
    blocks: Iterable[Rows],
    shape: tuple[int, int],
    format: Format,
    *,
    about: Mapping[str, str] | None = None,
) -> ShardEntry:
    """Write both files of a shard and sync them; the caller makes it count by writing the manifest.

    Args:
        folder: of the shards.
        name: such as ``"00000"``.
        table: the documents, of ``SCHEMA``.
        blocks: their memories in ``format``, as many rows in all, a part at a time.
        shape: ``(m, D)`` of a memory.
        about: kept in the header of the memories' file.
    """
    digests = id_digests(table.column("id").to_pylist())
    staged = [
        Staged(folder / f"{name}.safetensors", _numbers(blocks, digests, shape, format, about or {})),
        Staged(folder / f"{name}.parquet", [_parquet(table)]),
    ]
    for file in staged:
        file.publish()
    sync_folder(folder)
    return ShardEntry(table.num_rows, staged[0].facts, staged[1].facts)


def write_deletion(folder: Path, name: str, rows: np.ndarray) -> Deletion:
    """Write the list of a shard's deleted rows: ascending, distinct, counted from the shard's first."""
    deleted = torch.from_numpy(rows.astype(np.int32))
    header = _header({"deleted": ("I32", [len(rows)])}, {"deleted": 4 * len(rows)}, {})
    staged = Staged(folder / f"{name}.deleted-{len(rows)}.safetensors", [header, _bytes(deleted)])
    staged.publish()
    sync_folder(folder)
    return Deletion(len(rows), staged.facts)


def documents_table(rows: Sequence[Mapping[str, str]]) -> pa.Table:
    """Rows of :func:`clara_fast.store.documents.document_rows` as a table."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def id_digests(names: Iterable[str]) -> np.ndarray:
    """``[n, 2]`` int64: what ids are looked up by. 128 bits of BLAKE2b: no two ids share them."""
    joined = b"".join(hashlib.blake2b(name.encode(), digest_size=_DIGEST_BYTES).digest() for name in names)
    return np.frombuffer(joined, dtype="<i8").reshape(-1, 2)


def _numbers(
    blocks: Iterable[Rows], digests: np.ndarray, shape: tuple[int, int], format: Format, about: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    # By hand rather than with safetensors.torch.save: the shard is never held whole, and the padded header puts the
    # memories on a cache line, so that no vector load of a scan is split.
    stream = iter(blocks)
    count = len(digests)
    first = next(stream)
    after: dict[str, list[Tensor]] = {}
    layout: dict[str, tuple[str, list[int]]] = {"memory": (format.safetensors, [count, *shape])}
    if first.pooled is not None:
        layout["pooled"] = (format.safetensors, [count, shape[1]])
    layout["id_digests"] = ("I64", [count, 2])
    if first.scales is not None:
        layout["scales"] = ("F32", [count, shape[0]])
    if first.pooled_scales is not None:
        layout["pooled_scales"] = ("F32", [count])
    widths = {"memory": format.dtype.itemsize, "pooled": format.dtype.itemsize, "id_digests": 8}
    sizes = {name: widths.get(name, 4) * int(np.prod(dims)) for name, (_, dims) in layout.items()}
    yield _header(layout, sizes, about)
    done = 0
    for block in chain([first], stream):
        yield _bytes(block.memory)
        done += len(block.memory)
        for name in ("pooled", "scales", "pooled_scales"):
            if (part := getattr(block, name)) is not None:
                after.setdefault(name, []).append(part.clone())
    if done != count:
        raise ValueError(f"blocks hold {done} rows, the table {count}")
    for name in list(layout)[1:]:
        yield digests.tobytes() if name == "id_digests" else _bytes(torch.cat(after[name]))


def _header(layout: Mapping[str, tuple[str, list[int]]], sizes: Mapping[str, int], about: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(about)} if about else {}
    start = 0
    for name, (dtype, dims) in layout.items():
        entries[name] = {"dtype": dtype, "shape": dims, "data_offsets": [start, start + sizes[name]]}
        start += sizes[name]
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _parquet(table: pa.Table) -> memoryview:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=ROWS_PER_GROUP, compression="zstd", write_page_checksum=True)
    return memoryview(sink.getvalue())
