"""Which of a corpus's documents a process has to compress: none that the store holds, no duplicates, its share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from clara_fast.store.chunks import parent_of
from clara_fast.store.corpus import Record
from clara_fast.store.documents import document_text
from clara_fast.store.errors import CorpusError
from clara_fast.store.ledger import Ledger, Meeting, content_digest
from clara_fast.store.memory_store import MemoryStore
from clara_fast.store.parts import Parts
from clara_fast.store.ranks import Ranks

# Each process takes every so many blocks of the corpus; short blocks keep all of them busy to the end.
_BLOCKS_PER_RANK = 4
_SHORTEST_BLOCK = 16


@dataclass
class IngestReport:
    """What became of a corpus's documents.

    Attributes:
        added: documents compressed now.
        chunks: rows that they take in the store, if long ones were cut into chunks.
        skipped: documents that were in the store before.
        duplicates: documents left out because another one says the same.
        truncated: rows of which only the beginning was compressed.
    """

    added: int = 0
    chunks: int = 0
    skipped: int = 0
    duplicates: int = 0
    truncated: int = 0


class Selection:
    """Which of a corpus's documents this process has to compress."""

    def __init__(
        self,
        store: MemoryStore,
        parts: Parts,
        report: IngestReport,
        keep_duplicates: bool,
        on_duplicate: Callable[[Record, str], None] | None,
        progress: Callable[[int], None],
    ) -> None:
        self.store = store
        self.report = report
        self.keep_duplicates = keep_duplicates
        self.on_duplicate = on_duplicate or (lambda record, other: None)
        self.progress = progress
        self.rank, self.size, self.block = 0, 1, 1
        self.ledger = Ledger()
        for part in (store, *parts.open()):
            self.ledger.stored(_names_and_digests(part))

    def share(self, ranks: Ranks, shard_documents: int, total: int | None) -> None:
        """Take every ``ranks.size``-th block of the corpus only."""
        self.rank, self.size, self.block = ranks.rank, ranks.size, shard_documents
        if total is not None:
            even = max(_SHORTEST_BLOCK, total // (ranks.size * _BLOCKS_PER_RANK))
            self.block = min(shard_documents, even)

    def of(self, records: Iterable[Record]) -> Iterator[tuple[int, bool, Record]]:
        """Place, whether it directly follows the last one that was given, and record of each document to compress."""
        follows = False
        for position, record in enumerate(records):
            digest = content_digest(document_text(record.title, record.text))
            meeting, other = self.ledger.meet(record.id, digest, keep_duplicates=self.keep_duplicates)
            if meeting is Meeting.TWICE:
                raise CorpusError(f"{record.where}: id {record.id!r} appears a second time in this corpus")
            if meeting is Meeting.CHANGED:
                raise CorpusError(
                    f"{record.where}: document {record.id!r} is in {self.store.path} with another text; "
                    "give it a new id, or compress the corpus into a new store"
                )
            if meeting is Meeting.NEW and position // self.block % self.size == self.rank:
                yield position, follows, record
                follows = True
                continue
            # A shard holds what is contiguous but for duplicates, so that shards can be put in order.
            follows = follows and meeting is Meeting.DUPLICATE
            self.report.skipped += meeting is Meeting.STORED
            if meeting is Meeting.DUPLICATE:
                self.report.duplicates += 1
                self.on_duplicate(record, other)
            self.progress(1)


def _names_and_digests(store: MemoryStore) -> Iterator[tuple[str, bytes]]:
    for document in store:
        yield parent_of(document) or (document.id, content_digest(document_text(document.title, document.text)))
