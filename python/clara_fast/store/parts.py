"""What several processes write of one store: each shard a small store of its own, joined in the corpus's order.

::

    STORE/parts/000000001024/    a store whose one shard begins with document 1024 of the corpus

A part is whole or absent, as any store is. Joining links its files into the store, names them in the manifest at one
stroke and then removes the parts; stopped at any moment, it is done again from where it was.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from clara_fast.store.files import sync_folder
from clara_fast.store.manifest import SHARD_FOLDER, Manifest, ShardEntry
from clara_fast.store.memory_store import MemoryStore
from clara_fast.store.reading import Writer
from clara_fast.store.snapshot import Snapshot

PART_FOLDER = "parts"
_PART = re.compile(r"\d{12,}(\.\d+)?")


class Parts:
    """The parts beside ``store``, written by ``model``."""

    def __init__(self, store: MemoryStore, model: Writer) -> None:
        self.store = store
        self.model = model
        self.folder = store.path / PART_FOLDER

    def __bool__(self) -> bool:
        return bool(self._folders())

    def open(self) -> Iterator[MemoryStore]:
        """The parts that hold something, in the corpus's order; to be used one after the other."""
        for path in self._folders():
            if MemoryStore.exists(path) and len(part := MemoryStore.open(path, self.model)):
                yield part

    def write(self, position: int, ids: Sequence[str], documents: Sequence[Mapping[str, Any]], memory: Tensor) -> None:
        """Write a part that begins with the corpus's document ``position``; when this returns, it is on disk."""
        self.folder.mkdir(exist_ok=True)
        path, number = self.folder / f"{position:012d}", 0
        while path.exists():  # left by a process that was killed, or for a corpus that has changed since
            number += 1
            path = self.folder / f"{position:012d}.{number}"
        facts = self.store.stats()
        with MemoryStore.create(path, self.model, dtype=facts["dtype"], pooled_keys=facts["pooled_keys"]) as part:
            part.add(ids, documents, memory)
        sync_folder(self.folder)

    def join(self) -> None:
        """Move every part into the store, in the corpus's order and at one stroke."""
        self.store._commit(self._linked)
        for path in self._folders():
            shutil.rmtree(path)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _linked(self, snapshot: Snapshot) -> Manifest | None:
        """Link the parts' files into the store's folder; the manifest with them."""
        manifest = snapshot.manifest
        # A process may have died between joining and removing the parts.
        have = {(entry.memory.sha256, entry.documents.sha256) for entry in manifest.shards}
        for part in self.open():
            for shard in part._snapshot.shards:
                if (shard.entry.memory.sha256, shard.entry.documents.sha256) not in have:
                    entry = _link(shard.folder, shard.entry, self.store.path / SHARD_FOLDER, manifest.shard_name())
                    manifest = manifest.with_shards((*manifest.shards, entry), new=1)
        if manifest is snapshot.manifest:
            return None
        sync_folder(self.store.path / SHARD_FOLDER)
        return manifest

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _PART.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: tuple(map(int, path.name.split("."))))


def _link(folder: Path, entry: ShardEntry, target: Path, name: str) -> ShardEntry:
    """Give a shard's files a second place, where they are called ``name``."""
    facts = []
    for file in (entry.memory, entry.documents):
        facts.append(replace(file, file=name + Path(file.file).suffix))
        _link_or_copy(folder / file.file, target / facts[-1].file)
    return replace(entry, memory=facts[0], documents=facts[1])


def _link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
