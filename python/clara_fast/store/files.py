"""Files that are whole or absent: written beside their place, synced, renamed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TEMPORARY = ".tmp"


@dataclass(frozen=True)
class FileFacts:
    """What a manifest remembers of a file, so that damage to it can be told."""

    file: str
    bytes: int
    sha256: str


class Staged:
    """A file written and synced under a temporary name; :meth:`publish` renames it into place.

    Args:
        path: its final place.
        chunks: its content.
    """

    def __init__(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + TEMPORARY)
        digest, size = hashlib.sha256(), 0
        with open(self._temporary, "wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        self.facts = FileFacts(path.name, size, digest.hexdigest())

    def publish(self) -> None:
        """Rename into place."""
        os.replace(self._temporary, self.path)


def sync_folder(path: Path) -> None:
    """Make renames in ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
