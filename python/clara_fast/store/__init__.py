"""Memories and their documents on disk: written once, searched exactly, read through memory maps.

::

    with MemoryStore.create("memories", model) as store:
        compress_corpus(store, model, Corpus.open("corpus.jsonl"))
    store = MemoryStore.open("memories", model)
    hits = store.search(model.encode_queries(["Who wrote it?"]), k=5)

The layout of a store folder is described in :mod:`clara_fast.store.manifest`.
"""

from clara_fast.store.chunks import Chunking, parent_text
from clara_fast.store.corpus import Corpus, Record
from clara_fast.store.documents import Document, Hit, document_text
from clara_fast.store.errors import (
    CorpusError,
    StoreDamagedError,
    StoreError,
    StoreLockedError,
    StoreMismatchError,
    StoreNotFoundError,
)
from clara_fast.store.ingest import compress_corpus
from clara_fast.store.memory_store import MemoryStore
from clara_fast.store.selection import IngestReport

__all__ = [
    "Chunking",
    "Corpus",
    "CorpusError",
    "Document",
    "Hit",
    "IngestReport",
    "MemoryStore",
    "Record",
    "StoreDamagedError",
    "StoreError",
    "StoreLockedError",
    "StoreMismatchError",
    "StoreNotFoundError",
    "compress_corpus",
    "document_text",
    "parent_text",
]
