"""From a corpus to a store: compress what is not there yet, shard by shard."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from clara_fast.store.corpus import Record
from clara_fast.store.documents import document_text
from clara_fast.store.errors import CorpusError
from clara_fast.store.memory_store import MemoryStore, Writer


class Compressor(Writer, Protocol):
    """What :func:`compress_corpus` asks of a model (a :class:`clara_fast.Clara`)."""

    def compress(self, documents: Sequence[str], *, max_tokens: int) -> Tensor: ...

    def count_tokens(self, documents: Sequence[str]) -> list[int]: ...


@dataclass
class IngestReport:
    """Documents ``added``, ``skipped`` (in the store before) and, of those added, ``truncated``."""

    added: int = 0
    skipped: int = 0
    truncated: int = 0


def compress_corpus(
    store: MemoryStore,
    model: Compressor,
    records: Iterable[Record],
    *,
    batch_tokens: int = 8192,
    shard_documents: int = 1024,
    shard_seconds: float = 60.0,
    progress: Callable[[int], None] | None = None,
) -> IngestReport:
    """Compress the documents that ``store`` does not hold and add them, in the corpus's order.

    A shard is written when it has ``shard_documents`` documents or ``shard_seconds`` of work in it; a process
    that is killed loses no more. Calling again with the same corpus goes on where the last call stopped.

    Args:
        store: written by this model.
        model: compresses ``title``, a line break and ``text`` of each document.
        records: such as a :class:`Corpus`.
        batch_tokens: tokens that go through the model at once.
        progress: called with the number of documents that have been dealt with since it was called last.

    Returns:
        counts; one warning says how many documents were cut.

    Raises:
        StoreMismatchError: another model wrote the store.
        CorpusError: an id appears twice, or names a document that is in the store with another text.
        StoreLockedError: another writer holds the store.
        StoreError: the store cannot be written.
    """
    for name, value in (("batch_tokens", batch_tokens), ("shard_documents", shard_documents)):
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    store.check_model(model)
    store.lock()  # before any work that another writer would make vain
    report = IngestReport()
    tell = progress or (lambda _: None)
    shard = _PendingShard(store)
    limit = model.config.doc_max_length
    for batch in _batches(_news(store, records, report, tell), model, batch_tokens):
        texts = [document_text(record.title, record.text) for record, _ in batch]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*doc_max_length")  # counted here, over all batches
            memory = model.compress(texts, max_tokens=batch_tokens)
        report.truncated += sum(tokens > limit for _, tokens in batch)
        report.added += len(batch)
        tell(len(batch))
        shard.extend([record for record, _ in batch], memory)
        while len(shard.records) >= shard_documents:
            shard.write(shard_documents)
        if time.monotonic() - shard.started >= shard_seconds:
            shard.write(shard_documents)
    shard.write(shard_documents)
    if report.truncated:
        warnings.warn(
            f"{report.truncated} of {report.added} documents are longer than {limit} tokens; "
            "only their beginnings were compressed",
            stacklevel=2,
        )
    return report


def _news(
    store: MemoryStore, records: Iterable[Record], report: IngestReport, tell: Callable[[int], None]
) -> Iterator[Record]:
    """The records that are not in the store."""
    seen: set[str] = set()
    before = dict(store.ids)
    for chunk in _chunks(records, 256):
        for record in chunk:
            if record.id in seen:
                raise CorpusError(f"{record.where}: id {record.id!r} appears a second time in this corpus")
            seen.add(record.id)
        known = [record for record in chunk if record.id in before]
        for record, stored in zip(known, store.documents([before[r.id] for r in known]), strict=True):
            if (record.title, record.text) != (stored.title, stored.text):
                raise CorpusError(
                    f"{record.where}: document {record.id!r} is in {store.path} with another text; "
                    "give it a new id, or compress the corpus into a new store"
                )
        if known:
            report.skipped += len(known)
            tell(len(known))
        yield from (record for record in chunk if record.id not in before)


def _batches(records: Iterator[Record], model: Compressor, max_tokens: int) -> Iterator[list[tuple[Record, int]]]:
    """Records with their token counts, in batches of at most ``max_tokens`` tokens with memory tokens."""
    extra = model.config.num_memory + 3
    batch: list[tuple[Record, int]] = []
    total = 0
    for chunk in _chunks(records, 64):
        counts = model.count_tokens([document_text(record.title, record.text) for record in chunk])
        for record, tokens in zip(chunk, counts, strict=True):
            length = min(tokens, model.config.doc_max_length) + extra
            if batch and total + length > max_tokens:
                yield batch
                batch, total = [], 0
            batch.append((record, tokens))
            total += length
    if batch:
        yield batch


def _chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    iterator = iter(records)
    while chunk := list(islice(iterator, size)):
        yield chunk


class _PendingShard:
    """Compressed documents that wait for their shard to fill."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.records: list[Record] = []
        self.memory: list[Tensor] = []
        self.started = time.monotonic()

    def extend(self, records: list[Record], memory: Tensor) -> None:
        self.records += records
        self.memory.append(memory.to("cpu"))

    def write(self, size: int) -> None:
        """Write the first ``size`` documents, if there are any."""
        if self.records:
            memory = torch.cat(self.memory)
            head, self.records = self.records[:size], self.records[size:]
            self.memory = [memory[size:]] if self.records else []
            documents: list[dict[str, Any]] = [{"title": r.title, "text": r.text, "metadata": r.metadata} for r in head]
            self.store.add([r.id for r in head], documents, memory[:size])
        self.started = time.monotonic()
