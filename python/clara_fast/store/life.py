"""How a store changes: what is written first, and the manifest that then makes it count."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clara_fast.store.errors import listing
from clara_fast.store.files import TEMPORARY
from clara_fast.store.formats import Rows
from clara_fast.store.locks import ReaderPin
from clara_fast.store.manifest import MANIFEST_FILE, SHARD_FILE, SHARD_FOLDER, Manifest, ShardEntry
from clara_fast.store.shard_files import documents_table, write_deletion, write_shard
from clara_fast.store.snapshot import Snapshot

# Memories of a shard that compaction and conversion write: large enough that a scan need not stop often.
SHARD_BYTES = 256 << 20
_MOST_DOCUMENTS = 1 << 16


def check_shape(snapshot: Snapshot, count: int, memory: Tensor) -> None:
    """Raise ``ValueError`` unless ``memory`` is ``count`` memories of the store's shape."""
    m, width = snapshot.shape
    if memory.shape != (count, m, width):
        raise ValueError(f"memory must be [{count}, {m}, {width}], not {list(memory.shape)}")


def encoded(snapshot: Snapshot, names: list[str], memory: Tensor) -> Rows:
    """Memories ``[n, m, D]`` as the store keeps them.

    Raises:
        ValueError: a number that it cannot keep.
    """
    values = memory.detach().to("cpu")
    rows = Rows.encoded(values, snapshot.format, pooled=snapshot.manifest.pooled_keys)
    kept = values.float() if snapshot.format.largest else rows.memory
    finite = kept.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        bad = [name for name, fine in zip(names, finite.tolist(), strict=True) if not fine]
        raise ValueError(f"memory of {listing(bad)} holds NaN or Inf in {snapshot.format.name}")
    return rows


def added(snapshot: Snapshot, documents: list[dict[str, str]], rows: Rows) -> Manifest:
    """Write a shard; the manifest with it."""
    entry = _written(snapshot, snapshot.manifest.shard_name(), documents_table(documents), [rows])
    return snapshot.manifest.with_shards((*snapshot.manifest.shards, entry), new=1)


def deleted(snapshot: Snapshot, rows: np.ndarray) -> Manifest:
    """Write the lists of deleted rows; the manifest with them. A shard without a row left is dropped."""
    return snapshot.manifest.with_shards(_without_rows(snapshot, rows))


def updated(snapshot: Snapshot, rows: np.ndarray, documents: list[dict[str, str]], memory: Rows) -> Manifest:
    """:func:`deleted` and :func:`added` in one manifest."""
    entry = _written(snapshot, snapshot.manifest.shard_name(), documents_table(documents), [memory])
    return snapshot.manifest.with_shards((*_without_rows(snapshot, rows), entry), new=1)


def _without_rows(snapshot: Snapshot, rows: np.ndarray) -> tuple[ShardEntry, ...]:
    entries: dict[int, ShardEntry] = dict(enumerate(snapshot.manifest.shards))
    for number, _, members in snapshot.located(np.unique(rows)):
        shard = snapshot.shards[number]
        gone = np.union1d(shard.deleted, members)
        if len(gone) == shard.entry.rows:
            del entries[number]
        else:
            entries[number] = replace(shard.entry, deleted=write_deletion(shard.folder, shard.entry.name, gone))
    return tuple(entries.values())


def shard_documents(snapshot: Snapshot, asked: int | None) -> int:
    """Documents of a shard that is rewritten: as asked, or as many as ``SHARD_BYTES`` hold."""
    if asked is not None:
        if asked < 1:
            raise ValueError(f"shard_documents ({asked}) must be at least 1")
        return asked
    m, width = snapshot.shape
    return int(np.clip(SHARD_BYTES // (m * width * snapshot.format.dtype.itemsize), 1, _MOST_DOCUMENTS))


def compaction(snapshot: Snapshot, most: int) -> Manifest | None:
    """Merge the first run of shards that is worth it into one; the manifest with it, None where nothing is left to do.

    Worth it are shards with deleted rows, and neighbours that fit into one shard of ``most`` documents.
    """
    entries = snapshot.manifest.shards
    for run in _runs(entries, most):
        if len(run) == 1 and entries[run[0]].deleted is None:
            continue
        table = pa.concat_tables([live_table(snapshot, number) for number in run])
        blocks = (block for number in run for block in snapshot.live_blocks(number, 1024))
        entry = _written(snapshot, snapshot.manifest.shard_name(), table, blocks)
        return snapshot.manifest.with_shards((*entries[: run[0]], entry, *entries[run[-1] + 1 :]), new=1)
    return None


def _runs(entries: tuple[ShardEntry, ...], most: int) -> Iterator[list[int]]:
    run: list[int] = []
    total = 0
    for number, entry in enumerate(entries):
        if run and total + entry.live > most:
            yield run
            run, total = [], 0
        run.append(number)
        total += entry.live
    if run:
        yield run


def live_table(snapshot: Snapshot, number: int) -> pa.Table:
    """Documents of a shard that are not deleted."""
    shard = snapshot.shards[number]
    table = shard.table()
    return table.filter(pa.array(shard.live_mask())) if len(shard.deleted) else table


def about(snapshot: Snapshot) -> dict[str, str]:
    """What a shard's file says of itself, so that it can be read without a manifest."""
    model = snapshot.manifest.model
    return {
        "format": "clara_fast.memories",
        "fingerprint": model.fingerprint,
        "loaded_from": json.dumps(model.loaded_from),
    }


def _written(snapshot: Snapshot, name: str, table: pa.Table, blocks: Any) -> ShardEntry:
    folder = snapshot.path / SHARD_FOLDER
    return write_shard(folder, name, table, blocks, snapshot.shape, snapshot.format, about=about(snapshot))


def remove_leftovers(path: Path, manifest: Manifest, pin: ReaderPin) -> None:
    """Delete what a killed writer left and what was replaced; only files with names of our own, under the lock.

    What an earlier manifest names stays while somebody reads by that.
    """
    (path / (MANIFEST_FILE + TEMPORARY)).unlink(missing_ok=True)
    alone = pin.alone(manifest.generation)
    listed = {facts.file for shard in manifest.shards for facts in shard.files}
    for file in (path / SHARD_FOLDER).iterdir():
        half_written = file.name.endswith(TEMPORARY)
        if (
            SHARD_FILE.fullmatch(file.name.removesuffix(TEMPORARY))
            and file.name not in listed
            and (half_written or alone)
        ):
            file.unlink(missing_ok=True)


def finite(rows: Rows) -> bool:
    """Whether all numbers are finite."""
    parts = [part for part in (rows.memory, rows.scales) if part is not None and part.dtype != torch.int8]
    return all(bool(part.float().isfinite().all()) for part in parts)
