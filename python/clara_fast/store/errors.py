"""What can go wrong with a store or a corpus, each in one sentence that names the file and the way out."""

from __future__ import annotations

from collections.abc import Sequence


class StoreError(RuntimeError):
    """A store cannot be opened, read or written."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store at the path."""


class StoreLockedError(StoreError):
    """Another writer holds the store."""


class StoreDamagedError(StoreError):
    """Files of a store are missing or not what the manifest says.

    Args:
        message: the sentence for the user.
        problems: one line per damaged file.
        shards: names of the shards that they belong to.
    """

    def __init__(self, message: str, problems: Sequence[str] = (), shards: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems) or [message]
        self.shards = list(shards)


class StoreMismatchError(StoreError, ValueError):
    """The model at hand is not the one that wrote the store."""


class CorpusError(ValueError):
    """A corpus holds something that is not a document; the message names file and line."""


def listing(names: Sequence[str], limit: int = 5) -> str:
    """``'a', 'b' and 7 more``: enough names to act on, on one line."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
