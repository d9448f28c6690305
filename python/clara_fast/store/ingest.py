"""From a corpus to a store: compress what is not there yet, shard by shard, in one process or several."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from clara_fast.store.chunks import Chunking
from clara_fast.store.corpus import Record
from clara_fast.store.errors import CorpusError
from clara_fast.store.memory_store import MemoryStore
from clara_fast.store.parts import Parts
from clara_fast.store.ranks import Ranks
from clara_fast.store.selection import IngestReport, Selection
from clara_fast.store.windows import Compressor, PendingDocument, Windows, tokenised


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
    selection = Selection(store, parts, report, keep_duplicates, on_duplicate, progress or (lambda _: None))
    if ranks is not None:
        selection.share(ranks, shard_documents, total)
    windows = Windows(model, batch_tokens, shard_seconds)
    try:
        for window in windows.of(tokenised(selection.of(records), model, chunking)):
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


class _PendingShard:
    """Compressed documents that wait for their shard to fill.

    Args:
        store: where shards go, unless ``parts`` are written.
        parts: where they go if they have to be put in order later.
        size: rows of a shard.
    """

    def __init__(self, store: MemoryStore, parts: Parts | None, size: int) -> None:
        self.store, self.parts, self.size = store, parts, size
        self.documents: list[PendingDocument] = []
        self.memory: list[Tensor] = []
        self.rows = 0
        self.started = time.monotonic()

    def extend(self, window: list[PendingDocument], memory: Tensor) -> None:
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
