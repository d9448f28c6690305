"""What several processes write of one store: each shard a small store of its own, joined in the corpus's order.

::

    STORE/parts/000000001024/    a store whose one shard begins with document 1024 of the corpus

A part is whole or absent, as any store is. Joining links its files into the store, names them in the manifest at one
stroke and then removes the parts; stopped at any moment, it is done again from where it was.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from clara_fast.store.files import FileFacts, sync_folder
from clara_fast.store.manifest import ShardEntry
from clara_fast.store.memory_store import MemoryStore, Writer

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

    def open(self) -> list[MemoryStore]:
        """The parts that hold something, in the corpus's order."""
        stores = [MemoryStore.open(path, self.model) for path in self._folders() if MemoryStore.exists(path)]
        return [part for part in stores if len(part)]

    def write(self, position: int, ids: Sequence[str], documents: Sequence[Mapping[str, Any]], memory: Tensor) -> None:
        """Write a part that begins with the corpus's document ``position``; when this returns, it is on disk."""
        self.folder.mkdir(exist_ok=True)
        path, number = self.folder / f"{position:012d}", 0
        while path.exists():  # left by a process that was killed, or for a corpus that has changed since
            number += 1
            path = self.folder / f"{position:012d}.{number}"
        with MemoryStore.create(path, self.model, dtype=str(self.store.stats()["dtype"])) as part:
            part.add(ids, documents, memory)
        sync_folder(self.folder)

    def join(self) -> None:
        """Move every part into the store, whose writer's lock is held; in the corpus's order, at one stroke."""
        self.store.lock()
        have = {entry.memory.sha256: entry.documents.sha256 for entry in self.store._manifest.shards}
        manifest = self.store._manifest
        for part in self.open():
            for entry in part._manifest.shards:
                if have.get(entry.memory.sha256) != entry.documents.sha256:
                    manifest = manifest.with_shard(self._link(part._shard_folder, entry, manifest.next_shard))
        if manifest is not self.store._manifest:
            sync_folder(self.store._shard_folder)
            manifest.write(self.store.path)
            self.store._ids = None
            self.store._adopt(manifest)
        for path in self._folders():
            shutil.rmtree(path)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _link(self, folder: Path, entry: ShardEntry, number: int) -> ShardEntry:
        renamed = {}
        for field in dataclasses.fields(entry):
            facts = getattr(entry, field.name)
            if isinstance(facts, FileFacts):
                name = f"{number:05d}{Path(facts.file).suffix}"
                _link_or_copy(folder / facts.file, self.store._shard_folder / name)
                renamed[field.name] = dataclasses.replace(facts, file=name)
        return dataclasses.replace(entry, **renamed)  # type: ignore[arg-type]

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _PART.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: tuple(map(int, path.name.split("."))))


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
