"""From a corpus to a store: compress what is not there yet, shard by shard, in one process or several."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from clara_fast.store.chunks import Chunking, parent_of
from clara_fast.store.corpus import Record
from clara_fast.store.documents import document_text
from clara_fast.store.errors import CorpusError
from clara_fast.store.ledger import Ledger, Meeting, content_digest
from clara_fast.store.memory_store import MemoryStore
from clara_fast.store.parts import Parts
from clara_fast.store.ranks import Ranks
from clara_fast.store.reading import Writer

# Documents are tokenised so many at a time, and compressed in windows of at most so many batches: a window is
# sorted by length to fill its batches, so more of them are fuller, and fewer are less to lose.
_TOKENISED = 64
_BATCHES_PER_WINDOW = 16
# Each process takes every so many blocks of the corpus; short blocks keep all of them busy to the end.
_BLOCKS_PER_RANK = 4
_SHORTEST_BLOCK = 16

T = TypeVar("T")


class Compressor(Writer, Protocol):
    """What :func:`compress_corpus` asks of a model (a :class:`clara_fast.Clara`)."""

    def compress(self, documents: Sequence[str], *, max_tokens: int) -> Tensor: ...

    def count_tokens(self, documents: Sequence[str]) -> list[int]: ...

    def token_spans(self, text: str) -> list[tuple[int, int]]: ...


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


@dataclass
class _Document:
    """A document to compress: its place in the corpus, its rows, whether its shard may hold what came before it."""

    position: int
    follows: bool
    rows: list[Record]
    tokens: list[int]


def compress_corpus(
    store: MemoryStore,
    model: Compressor,
    records: Iterable[Record],
    *,
    batch_tokens: int = 8192,
    shard_documents: int = 1024,
    shard_seconds: float = 60.0,
    chunk: int | None = None,
    overlap: int | None = None,
    keep_duplicates: bool = False,
    ranks: Ranks | None = None,
    total: int | None = None,
    progress: Callable[[int], None] | None = None,
    on_duplicate: Callable[[Record, str], None] | None = None,
) -> IngestReport:
    """Compress the documents that ``store`` does not hold and add them, in the corpus's order.

    A shard is written when it has ``shard_documents`` rows or ``shard_seconds`` of work in it; a process that is
    killed loses little more. Calling again with the same corpus goes on where the last call stopped. The corpus is
    streamed; what is held of it is a window of documents. A bad row ends the work after what came before it has
    been written.

    With ``ranks`` every process calls this with the same arguments and compresses its share of the corpus; the store
    shows the documents when all have finished, in the same order as from one process. Any number of processes can
    go on with what another number of them began.

    Args:
        store: written by this model.
        model: compresses ``title``, a line break and ``text`` of each document.
        records: such as a :class:`Corpus`.
        batch_tokens: tokens that go through the model at once.
        chunk: cut documents of more tokens into chunks of at most so many (see :class:`Chunking`); they stay
            together in one shard. Default: what goes beyond ``doc_max_length`` is cut off.
        overlap: tokens that a chunk shares with the one before; default an eighth of ``chunk``.
        keep_duplicates: also compress documents whose title and text another one has.
        ranks: the processes that share the work.
        total: how many records there are, if known; helps to share them evenly.
        progress: called with the number of documents that have been dealt with since it was called last.
        on_duplicate: called with each document that is left out and the id of the one that says the same.

    Returns:
        counts, over all processes; one warning says how many documents were cut off.

    Raises:
        StoreMismatchError: another model wrote the store.
        CorpusError: an id appears twice, or names a document that is in the store with another text.
        StoreLockedError: another writer holds the store.
        StoreError: the store cannot be written.
    """
    for name, value in (("batch_tokens", batch_tokens), ("shard_documents", shard_documents)):
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    limit = model.config.doc_max_length
    if chunk is not None and chunk > limit:
        raise ValueError(f"chunk ({chunk}) must be at most the model's doc_max_length ({limit})")
    if chunk is None and overlap is not None:
        raise ValueError(f"overlap ({overlap}) is for chunks: give their length (chunk) too")
    chunking = None if chunk is None else Chunking(chunk, chunk // 8 if overlap is None else overlap)
    store.check_model(model)
    first = ranks is None or ranks.rank == 0
    if first:
        store.lock()  # before any work that another writer would make vain
    if ranks is not None:
        ranks.barrier()
    parts = Parts(store, model)
    report = IngestReport()
    # What several processes left is joined in the corpus's order, so the rest has to be written as parts too.
    shard = _PendingShard(store, parts if ranks is not None or parts else None, shard_documents)
    selection = _Selection(store, parts, report, keep_duplicates, on_duplicate, progress or (lambda _: None))
    if ranks is not None:
        selection.share(ranks, shard_documents, total)
    windows = _Windows(model, batch_tokens, shard_seconds)
    try:
        for window in windows.of(_tokenised(selection.of(records), model, chunking)):
            shard.extend(window, windows.compress(window))
            selection.progress(len(window))
            report.added += len(window)
            report.chunks += sum(len(document.rows) for document in window)
            report.truncated += sum(tokens > limit for document in window for tokens in document.tokens)
            if time.monotonic() - shard.started >= shard_seconds:
                shard.write()
    except (CorpusError, KeyboardInterrupt):
        shard.write()  # what is done is done
        raise
    shard.write()
    if ranks is not None:
        # Documents of others were looked at by all, so those counts are the same everywhere.
        both = {"skipped": report.skipped, "duplicates": report.duplicates}
        shares = [asdict(share) for share in ranks.gather(report)]
        report = IngestReport(**{name: sum(share[name] for share in shares) for name in shares[0]} | both)
    if first and parts:
        parts.join()
    if ranks is not None:
        ranks.barrier()
    if report.truncated and first:
        warnings.warn(
            f"{report.truncated} of {report.chunks} documents are longer than {limit} tokens; "
            f"only their beginnings were compressed (--chunk {limit} keeps all of them)",
            stacklevel=2,
        )
    return report


class _Selection:
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


def _tokenised(
    chosen: Iterable[tuple[int, bool, Record]], model: Compressor, chunking: Chunking | None
) -> Iterator[_Document]:
    """Documents with their rows and how many tokens each has."""
    for group in _groups(chosen, lambda group: len(group) >= _TOKENISED):
        counts = model.count_tokens([document_text(record.title, record.text) for _, _, record in group])
        for (position, follows, record), tokens in zip(group, counts, strict=True):
            rows = [record] if chunking is None or tokens <= chunking.size else chunking.split(record, model)
            if len(rows) > 1:
                tokens_of_rows = model.count_tokens([document_text(row.title, row.text) for row in rows])
            else:
                tokens_of_rows = [tokens]
            yield _Document(position, follows, rows, tokens_of_rows)


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


class _Windows:
    """Documents in windows: of one batch at first, then of more, as long as one takes a fraction of a shard's time."""

    def __init__(self, model: Compressor, batch_tokens: int, shard_seconds: float) -> None:
        self.model = model
        self.batch_tokens = batch_tokens
        self.patience = shard_seconds / 4
        self.batches = 1

    def of(self, documents: Iterable[_Document]) -> Iterator[list[_Document]]:
        """Windows of documents, for :meth:`compress`."""
        longest, extra = self.model.config.doc_max_length, self.model.config.num_memory + 3
        total = 0

        def full(window: list[_Document]) -> bool:
            nonlocal total
            length = sum(min(tokens, longest) + extra for tokens in window[-1].tokens)
            total += length
            if total + length <= self.batches * self.batch_tokens:  # another such document fits
                return False
            total = 0
            return True

        return _groups(documents, full)

    def compress(self, window: list[_Document]) -> Tensor:
        """Memories of all rows of a window, on the CPU; the model packs them into batches, longest first."""
        started = time.monotonic()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*doc_max_length")  # counted by the caller, over all windows
            texts = [document_text(row.title, row.text) for document in window for row in document.rows]
            memory = self.model.compress(texts, max_tokens=self.batch_tokens).to("cpu")
        if self.batches < _BATCHES_PER_WINDOW and time.monotonic() - started < self.patience:
            self.batches *= 2
        return memory


class _PendingShard:
    """Compressed documents that wait for their shard to fill.

    Args:
        store: where shards go, unless ``parts`` are written.
        parts: where they go if they have to be put in order later.
        size: rows of a shard.
    """

    def __init__(self, store: MemoryStore, parts: Parts | None, size: int) -> None:
        self.store, self.parts, self.size = store, parts, size
        self.documents: list[_Document] = []
        self.memory: list[Tensor] = []
        self.rows = 0
        self.started = time.monotonic()

    def extend(self, window: list[_Document], memory: Tensor) -> None:
        """Take a window's documents; write the shards that they fill."""
        start = 0
        for document in window:
            if self.parts is not None and not document.follows:
                self.write()
            end = start + len(document.rows)
            if self.rows + len(document.rows) > self.size:
                self.write()
            self.documents.append(document)
            self.memory.append(memory[start:end])
            self.rows += end - start
            start = end
        if self.rows >= self.size:
            self.write()

    def write(self) -> None:
        """Write what is there, if anything."""
        if self.documents:
            rows = [row for document in self.documents for row in document.rows]
            documents: list[Mapping[str, Any]] = [
                {"title": row.title, "text": row.text, "metadata": row.metadata} for row in rows
            ]
            names, memory, position = [row.id for row in rows], torch.cat(self.memory), self.documents[0].position
            self.documents, self.memory, self.rows = [], [], 0
            if self.parts is None:
                self.store.add(names, documents, memory)
            else:
                self.parts.write(position, names, documents, memory)
        self.started = time.monotonic()
