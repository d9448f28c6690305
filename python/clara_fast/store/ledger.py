"""Which documents have been met, on disk: a corpus of any size takes a few megabytes of memory."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from enum import Enum

_CACHE_KILOBYTES = 16384


class Meeting(Enum):
    """What a :class:`Ledger` says of a document that a corpus holds."""

    NEW = "new"
    STORED = "stored"
    CHANGED = "stored with another text"
    TWICE = "met before in this corpus"
    DUPLICATE = "another document says the same"


def content_digest(text: str) -> bytes:
    """Identity of what a document says: 16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class Ledger:
    """Ids and contents of documents, in a temporary database that goes with the object (under ``$TMPDIR``)."""

    def __init__(self) -> None:
        # The empty name is SQLite's for a private file that is deleted when it is closed, or the process dies.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            f"PRAGMA cache_size = -{_CACHE_KILOBYTES}",
            "CREATE TABLE names (name TEXT PRIMARY KEY, digest BLOB, met INTEGER) WITHOUT ROWID",
            "CREATE TABLE contents (digest BLOB PRIMARY KEY, name TEXT) WITHOUT ROWID",
        ):
            self._database.execute(statement)

    def is_new(self, name: str) -> bool:
        """Whether ``name`` has not been asked for before."""
        return self._database.execute("INSERT OR IGNORE INTO names VALUES (?, NULL, 1)", (name,)).rowcount == 1

    def stored(self, documents: Iterable[tuple[str, bytes]]) -> None:
        """Remember documents ``(id, digest)`` of a store."""
        self._database.execute("BEGIN")
        for name, digest in documents:
            self._database.execute("INSERT OR IGNORE INTO names VALUES (?, ?, 0)", (name, digest))
            self._database.execute("INSERT OR IGNORE INTO contents VALUES (?, ?)", (digest, name))
        self._database.execute("COMMIT")

    def meet(self, name: str, digest: bytes, *, keep_duplicates: bool = False) -> tuple[Meeting, str]:
        """Remember a corpus's document.

        Returns:
            what it is, and the name of the document that says the same (its own, unless it is a duplicate).
        """
        found = self._database.execute("SELECT digest, met FROM names WHERE name = ?", (name,)).fetchone()
        if found is not None:
            known, met = found
            if met:
                return Meeting.TWICE, name
            if known != digest:
                return Meeting.CHANGED, name
            self._database.execute("UPDATE names SET met = 1 WHERE name = ?", (name,))
            return Meeting.STORED, name
        self._database.execute("INSERT INTO names VALUES (?, ?, 1)", (name, digest))
        first = self._database.execute("INSERT OR IGNORE INTO contents VALUES (?, ?)", (digest, name)).rowcount == 1
        if first or keep_duplicates:
            return Meeting.NEW, name
        (other,) = self._database.execute("SELECT name FROM contents WHERE digest = ?", (digest,)).fetchone()
        return Meeting.DUPLICATE, other
