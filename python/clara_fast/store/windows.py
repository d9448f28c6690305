"""Documents on their way through the model: tokenised, cut into chunks, gathered into windows of full batches."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from clara_fast.store.chunks import Chunking
from clara_fast.store.corpus import Record
from clara_fast.store.documents import document_text
from clara_fast.store.errors import CorpusError
from clara_fast.store.reading import Writer

# Documents are tokenised so many at a time, and compressed in windows of at most so many batches: a window is
# sorted by length to fill its batches, so more of them are fuller, and fewer are less to lose.
_TOKENISED = 64
_BATCHES_PER_WINDOW = 16

T = TypeVar("T")


class Compressor(Writer, Protocol):
    """What :func:`compress_corpus` asks of a model (a :class:`clara_fast.Clara`)."""

    def compress(self, documents: Sequence[str], *, max_tokens: int) -> Tensor: ...

    def count_tokens(self, documents: Sequence[str]) -> list[int]: ...

    def token_spans(self, text: str) -> list[tuple[int, int]]: ...


@dataclass
class PendingDocument:
    """A document to compress: its place in the corpus, its rows, whether its shard may hold what came before it."""

    position: int
    follows: bool
    rows: list[Record]
    tokens: list[int]


def tokenised(
    chosen: Iterable[tuple[int, bool, Record]], model: Compressor, chunking: Chunking | None
) -> Iterator[PendingDocument]:
    """Documents with their rows and how many tokens each has."""
    for group in _groups(chosen, lambda group: len(group) >= _TOKENISED):
        counts = model.count_tokens([document_text(record.title, record.text) for _, _, record in group])
        for (position, follows, record), tokens in zip(group, counts, strict=True):
            rows = [record] if chunking is None or tokens <= chunking.size else chunking.split(record, model)
            if len(rows) > 1:
                tokens_of_rows = model.count_tokens([document_text(row.title, row.text) for row in rows])
            else:
                tokens_of_rows = [tokens]
            yield PendingDocument(position, follows, rows, tokens_of_rows)


def _groups(items: Iterable[T], full: Callable[[list[T]], bool]) -> Iterator[list[T]]:
    """Items in lists that end when they are ``full``; what came before a bad row is given before that is raised."""
    group: list[T] = []
    trouble = None
    try:
        for item in items:
            group.append(item)
            if full(group):
                yield group
                group = []
    except CorpusError as error:
        trouble = error
    if group:
        yield group
    if trouble is not None:
        raise trouble


class Windows:
    """Documents in windows: of one batch at first, then of more, as long as one takes a fraction of a shard's time."""

    def __init__(self, model: Compressor, batch_tokens: int, shard_seconds: float) -> None:
        self.model = model
        self.batch_tokens = batch_tokens
        self.patience = shard_seconds / 4
        self.batches = 1

    def of(self, documents: Iterable[PendingDocument]) -> Iterator[list[PendingDocument]]:
        """Windows of documents, for :meth:`compress`."""
        longest, extra = self.model.config.doc_max_length, self.model.config.num_memory + 3
        total = 0

        def full(window: list[PendingDocument]) -> bool:
            nonlocal total
            length = sum(min(tokens, longest) + extra for tokens in window[-1].tokens)
            total += length
            if total + length <= self.batches * self.batch_tokens:  # another such document fits
                return False
            total = 0
            return True

        return _groups(documents, full)

    def compress(self, window: list[PendingDocument]) -> Tensor:
        """Memories of all rows of a window, on the CPU; the model packs them into batches, longest first."""
        started = time.monotonic()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*doc_max_length")  # counted by the caller, over all windows
            texts = [document_text(row.title, row.text) for document in window for row in document.rows]
            memory = self.model.compress(texts, max_tokens=self.batch_tokens).to("cpu")
        if self.batches < _BATCHES_PER_WINDOW and time.monotonic() - started < self.patience:
            self.batches *= 2
        return memory
