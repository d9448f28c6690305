"""Files that are whole or absent (written beside their place, synced, renamed), and the writer's lock."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clara_fast.store.errors import StoreError, StoreLockedError

TEMPORARY = ".tmp"
LOCK_FILE = "writer.lock"


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


class WriterLock:
    """An exclusive ``flock`` on a store folder, freed by :meth:`release` or the end of the process.

    Raises:
        StoreLockedError: another writer holds it.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import fcntl
        except ImportError:
            raise StoreError("writing a store needs flock, which this system lacks; reading works") from None
        file = folder / LOCK_FILE
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise StoreLockedError(
                f"{folder} is being written by another process (pid {owner or 'unknown'}); "
                "wait until it has finished, or close that store"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        self.release = weakref.finalize(self, os.close, descriptor)
