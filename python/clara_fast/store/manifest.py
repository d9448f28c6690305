"""The manifest of a store: which model wrote it and which shards count.

A store is a folder::

    manifest.json                            the only word on what belongs to the store; replaced by rename
    shards/00000.safetensors                 "memory" [rows, num_memory, hidden_size] and what else is number
    shards/00000.parquet                     id, title, text, metadata (JSON), one row per memory
    shards/00000.deleted-3.safetensors       "deleted" [3]: rows of the shard that are no longer there
    writer.lock, readers.lock                held by the one writer; by readers, on what they read

A file is in place before the manifest names it and is never changed, so whatever stops a writer, the manifest
lists whole shards only, and who has read a manifest can go on reading what it names. Other files are leftovers:
readers ignore them, a writer removes them once nobody reads an older manifest.

Version 1 had neither deletions nor digests of the ids; its stores are read as they are, and their manifest becomes
one of version 2 when something is written.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from clara_fast.store.errors import StoreDamagedError, StoreError, StoreNotFoundError
from clara_fast.store.files import FileFacts, Staged, sync_folder

MANIFEST_FILE = "manifest.json"
SHARD_FOLDER = "shards"
FORMAT = "clara_fast.memory_store"
VERSION = 2
SHARD_FILE = re.compile(r"\d{5,}(\.parquet|(\.deleted-\d+)?\.safetensors)")


@dataclass(frozen=True)
class Deletion:
    """The file that lists a shard's deleted rows, and how many there are."""

    rows: int
    facts: FileFacts


@dataclass(frozen=True)
class ShardEntry:
    """One shard: a file of memories and a file of documents with ``rows`` rows each, some of them deleted."""

    rows: int
    memory: FileFacts
    documents: FileFacts
    deleted: Deletion | None = None

    @property
    def name(self) -> str:
        """``"00000"``."""
        return Path(self.documents.file).stem

    @property
    def files(self) -> list[FileFacts]:
        """Facts of all its files."""
        return [self.memory, self.documents, *([self.deleted.facts] if self.deleted else [])]

    @property
    def live(self) -> int:
        """Rows that are not deleted."""
        return self.rows - (self.deleted.rows if self.deleted else 0)


@dataclass(frozen=True)
class ModelFacts:
    """The model that wrote a store: ``fingerprint`` is its identity, ``loaded_from`` how to load it again.

    ``loaded_from`` holds keyword arguments of ``Clara.from_pretrained``, or nothing.
    """

    fingerprint: str
    loaded_from: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``.

    ``next_shard`` only grows: the name of a shard is never used twice. ``generation`` counts the manifests of a store.
    """

    model: ModelFacts
    num_memory: int
    hidden_size: int
    dtype: str
    pooled_keys: bool = False
    generation: int = 0
    next_shard: int = 0
    shards: tuple[ShardEntry, ...] = ()
    version: int = VERSION

    @property
    def rows(self) -> int:
        """Documents in all shards, without the deleted ones."""
        return sum(shard.live for shard in self.shards)

    def with_shards(self, shards: tuple[ShardEntry, ...], *, new: int = 0) -> Manifest:
        """The next manifest, with these shards, ``new`` of them just written."""
        return replace(
            self, generation=self.generation + 1, next_shard=self.next_shard + new, shards=shards, version=VERSION
        )

    def shard_name(self, ahead: int = 0) -> str:
        """Of the next shard, or the one so many after it."""
        return f"{self.next_shard + ahead:05d}"

    def write(self, folder: Path) -> None:
        """Replace ``folder/manifest.json``."""
        content = {"format": FORMAT, **asdict(self)}
        staged = Staged(folder / MANIFEST_FILE, [json.dumps(content, indent=1).encode()])
        staged.publish()
        sync_folder(folder)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check ``folder/manifest.json``.

        Raises:
            StoreNotFoundError: there is none.
            StoreError: a newer version wrote it.
            StoreDamagedError: it is not what this module writes.
        """
        file = folder / MANIFEST_FILE
        try:
            content = json.loads(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise StoreNotFoundError(f"{folder} is not a memory store: it holds no {MANIFEST_FILE}") from None
        except OSError as error:
            raise StoreError(f"cannot read {file}: {error.strerror}") from None
        except ValueError as error:
            raise _damaged(file, f"not JSON ({error})") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StoreError(f"{file} does not describe a memory store of clara_fast")
        version = content.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise _damaged(file, f"{version!r} is not a version")
        if version > VERSION:
            raise StoreError(
                f"{folder} has format version {version}, this clara_fast reads versions up to {VERSION}: "
                "upgrade clara_fast, or compress the corpus again"
            )
        try:
            return cls._from_json(content)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(file, f"{type(error).__name__}: {error}") from None

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Manifest:
        return cls(
            model=ModelFacts(**content["model"]),
            num_memory=_count(content["num_memory"]),
            hidden_size=_count(content["hidden_size"]),
            dtype=str(content["dtype"]),
            pooled_keys=bool(content.get("pooled_keys", False)),
            generation=int(content.get("generation", 0)),
            next_shard=int(content["next_shard"]),
            shards=tuple(_entry(shard) for shard in content["shards"]),
            version=content["version"],
        )


def _entry(content: dict[str, Any]) -> ShardEntry:
    deleted = content.get("deleted")
    entry = ShardEntry(
        _count(content["rows"]),
        _facts(content["memory"]),
        _facts(content["documents"]),
        Deletion(_count(deleted["rows"]), _facts(deleted["facts"])) if deleted else None,
    )
    if entry.live < 0:
        raise ValueError(f"shard {entry.name} has {entry.rows} rows, of which {entry.rows - entry.live} are deleted")
    return entry


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is not a count")
    return value


def _facts(content: dict[str, Any]) -> FileFacts:
    facts = FileFacts(**content)
    # A name with a folder in it would let a foreign manifest reach outside the store.
    if not SHARD_FILE.fullmatch(facts.file):
        raise ValueError(f"{facts.file!r} is not the name of a shard's file")
    return facts


def _damaged(file: Path, what: str) -> StoreDamagedError:
    return StoreDamagedError(f"{file} is damaged: {what}; copy it back, or compress the corpus again")
