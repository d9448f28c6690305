"""Stores copied: into another format, out to files that need no manifest, and in from such files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from clara_fast.store import life
from clara_fast.store.errors import StoreDamagedError, StoreError, listing
from clara_fast.store.files import FileFacts
from clara_fast.store.formats import FORMATS, Format, Rows
from clara_fast.store.manifest import SHARD_FOLDER, Manifest, ModelFacts, ShardEntry
from clara_fast.store.shard_files import write_shard
from clara_fast.store.snapshot import Snapshot

_BLOCK = 1024


def write_copy(source: Snapshot, manifest: Manifest, path: Path, most: int) -> Manifest:
    """Write the live documents of ``source`` as shards of ``manifest``'s format, in order; the manifest with them.

    Nothing is rounded where the format stays. Memory in use does not depend on the number of documents.
    """
    target = Snapshot(path, manifest)
    same = source.format == target.format and source.manifest.pooled_keys == manifest.pooled_keys
    for group in _groups(source, most):
        table = pa.concat_tables(
            [life.live_table(source, number).slice(start, count) for number, start, count in group]
        )
        blocks = (
            rows if same else _recoded(rows, source.format, target)
            for number, start, count in group
            for rows in source.live_blocks(number, _BLOCK, start, count)
        )
        entry = write_shard(
            path / SHARD_FOLDER, manifest.shard_name(), table, blocks, target.shape, target.format,
            about=life.about(target),
        )  # fmt: skip
        manifest = manifest.with_shards((*manifest.shards, entry), new=1)
    return manifest


def _groups(source: Snapshot, most: int) -> Iterator[list[tuple[int, int, int]]]:
    """``most`` documents at a time, as parts of shards: number, first live row, count."""
    group: list[tuple[int, int, int]] = []
    room = most
    for number, shard in enumerate(source.shards):
        start = 0
        while start < shard.entry.live:
            count = min(room, shard.entry.live - start)
            group.append((number, start, count))
            start, room = start + count, room - count
            if room == 0:
                yield group
                group, room = [], most
    if group:
        yield group


def _recoded(rows: Rows, format: Format, target: Snapshot) -> Rows:
    values = format.decode(rows.memory, rows.scales)
    recoded = Rows.encoded(values, target.format, pooled=target.manifest.pooled_keys)
    if not life.finite(recoded):
        raise ValueError(f"a memory is too large for dtype {target.format.name!r}; choose another")
    return recoded


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name when the block is done, and not at all if it fails.

    Raises:
        FileExistsError: there is something that is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} already exists and is not an empty folder; choose a new one")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed copy left
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def export(source: Snapshot, path: Path, most: int) -> int:
    """Write ``NNNNN.safetensors`` and ``NNNNN.parquet`` into a new folder; returns how many pairs."""
    manifest = replace(source.manifest, shards=(), next_shard=0)
    with new_folder(path) as folder:
        (folder / SHARD_FOLDER).mkdir()
        written = write_copy(source, manifest, folder, most)
        for file in list((folder / SHARD_FOLDER).iterdir()):
            os.replace(file, folder / file.name)
        (folder / SHARD_FOLDER).rmdir()
    return len(written.shards)


def exported(path: Path, model: Any = None) -> Snapshot:
    """The pairs of files in a folder as a snapshot to copy from.

    Args:
        path: of :func:`export`, or of files by others with a tensor "memory" and columns of the same names.
        model: what wrote the memories, for files that do not say it.

    Raises:
        StoreError: no such files, files that do not fit together, or nothing says which model wrote them.
        StoreDamagedError: a file cannot be read.
    """
    names = sorted(file.stem for file in path.glob("*.safetensors"))
    if not names:
        raise StoreError(f"{path} holds no .safetensors files with memories")
    heads = [_head(path, name, model) for name in names]
    first = heads[0][0]
    for name, (head, _) in zip(names, heads, strict=True):
        if head != first:
            raise StoreError(f"{path / name}.safetensors does not fit to {names[0]}.safetensors: {head} and {first}")
    return Snapshot(path, replace(first, shards=tuple(entry for _, entry in heads)), folder=path)


def _head(path: Path, name: str, model: Any) -> tuple[Manifest, ShardEntry]:
    file, documents = path / f"{name}.safetensors", path / f"{name}.parquet"
    if not documents.is_file():
        raise StoreError(f"{documents} is missing: each .safetensors file needs the documents of its memories")
    try:
        with safe_open(file, framework="pt") as tensors:
            about: Mapping[str, str] = tensors.metadata() or {}
            keys = set(tensors.keys())
            if "memory" not in keys:
                raise StoreError(f"{file} holds no tensor 'memory'")
            stored = tensors.get_slice("memory")
            shape, dtype = stored.get_shape(), stored.get_dtype()
        rows = pq.read_metadata(documents).num_rows
        loaded_from = json.loads(about.get("loaded_from", "{}"))
    except (SafetensorError, pa.ArrowException, ValueError, OSError) as error:
        raise StoreDamagedError(f"{file} or its .parquet is damaged: {str(error).splitlines()[0]}") from None
    format = next((format for format in FORMATS.values() if format.safetensors == dtype), None)
    if format is None or len(shape) != 3 or shape[0] != rows or min(shape) < 1:
        raise StoreError(
            f"{file}: 'memory' is {dtype} {shape}, not [{rows}, m, D] in one of {', '.join(FORMATS)}, a row "
            "for each document"
        )
    fingerprint = about.get("fingerprint") or (model.fingerprint if model is not None else None)
    if fingerprint is None:
        raise StoreError(f"{file} does not say which model wrote it: name the model")
    manifest = Manifest(
        ModelFacts(fingerprint, loaded_from), shape[1], shape[2], format.name, pooled_keys="pooled" in keys
    )
    facts = [FileFacts(part.name, part.stat().st_size, "") for part in (file, documents)]
    return manifest, ShardEntry(rows, facts[0], facts[1])


def check_import(source: Snapshot) -> None:
    """Files of others: ids must be there, not empty and distinct, memories finite, metadata JSON objects.

    Raises:
        StoreError: they are not; the file is named.
    """
    for shard in source.shards:
        where = f"{shard.folder / shard.entry.memory.file}"
        for name, metadata in zip(*(shard.table([c]).column(c).to_pylist() for c in ("id", "metadata")), strict=True):
            if not name or not _is_object(metadata):
                raise StoreError(f"{where}: document {name!r} has no id, or metadata that is not a JSON object")
        for rows in source.live_blocks(source.shards.index(shard), _BLOCK):
            if not life.finite(rows):
                raise StoreError(f"{where}: memories hold NaN or Inf")
    if len(repeated := np.sort(source.ids.repeated())):
        twice = [document.id for document in source.documents(repeated[:6])]
        raise StoreError(f"{source.path}: ids appear twice: {listing(twice)}")


def _is_object(text: Any) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError):
        return False
