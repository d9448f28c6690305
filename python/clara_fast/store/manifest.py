"""The manifest of a store: which model wrote it and which shards count.

A store is a folder::

    manifest.json               the only word on what belongs to the store; replaced by rename
    shards/00000.safetensors    "memory" [rows, num_memory, hidden_size]
    shards/00000.parquet        id, title, text, metadata (JSON), one row per memory
    writer.lock                 held by the one writer

A shard's two files are in place before the manifest names them, so whatever stops a writer, the manifest
lists whole shards only. Other files are leftovers: readers ignore them, the next writer removes them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clara_fast.store.errors import StoreDamagedError, StoreError, StoreNotFoundError
from clara_fast.store.files import FileFacts, Staged, sync_folder

MANIFEST_FILE = "manifest.json"
SHARD_FOLDER = "shards"
FORMAT = "clara_fast.memory_store"
VERSION = 1
SHARD_FILE = re.compile(r"\d{5,}\.(safetensors|parquet)")


@dataclass(frozen=True)
class ShardEntry:
    """One shard: a file of memories and a file of documents with ``rows`` rows each."""

    rows: int
    memory: FileFacts
    documents: FileFacts

    @property
    def name(self) -> str:
        """``"00000"``."""
        return Path(self.memory.file).stem

    @property
    def files(self) -> tuple[FileFacts, FileFacts]:
        """Both files' facts."""
        return self.memory, self.documents


@dataclass(frozen=True)
class ModelFacts:
    """The model that wrote a store: ``fingerprint`` is its identity, ``loaded_from`` how to load it again.

    ``loaded_from`` holds keyword arguments of ``Clara.from_pretrained``, or nothing.
    """

    fingerprint: str
    loaded_from: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``. ``next_shard`` only grows: the name of a shard is never used twice."""

    model: ModelFacts
    num_memory: int
    hidden_size: int
    dtype: str
    next_shard: int = 0
    shards: tuple[ShardEntry, ...] = ()

    @property
    def rows(self) -> int:
        """Documents in all shards."""
        return sum(shard.rows for shard in self.shards)

    def with_shard(self, shard: ShardEntry) -> Manifest:
        """The manifest after ``shard`` has been added."""
        return dataclasses.replace(self, next_shard=self.next_shard + 1, shards=(*self.shards, shard))

    def without(self, names: set[str]) -> Manifest:
        """The manifest after the named shards have been given up."""
        return dataclasses.replace(self, shards=tuple(s for s in self.shards if s.name not in names))

    def write(self, folder: Path) -> None:
        """Replace ``folder/manifest.json``."""
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
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
        if content.get("version") != VERSION:
            raise StoreError(
                f"{folder} has format version {content.get('version')}, this clara_fast reads "
                f"version {VERSION}: upgrade clara_fast, or compress the corpus again"
            )
        try:
            return cls._from_json(content)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(file, f"{type(error).__name__}: {error}") from None

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Manifest:
        shards = tuple(
            ShardEntry(_count(s["rows"]), _facts(s["memory"]), _facts(s["documents"])) for s in content["shards"]
        )
        return cls(
            model=ModelFacts(**content["model"]),
            num_memory=_count(content["num_memory"]),
            hidden_size=_count(content["hidden_size"]),
            dtype=str(content["dtype"]),
            next_shard=int(content["next_shard"]),
            shards=shards,
        )


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
