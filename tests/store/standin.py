"""A model without a network: a memory is the sum of its words' vectors. Enough for all that a store asks."""

from __future__ import annotations

import re
import warnings
import zlib
from types import SimpleNamespace

import torch


class StandIn:
    """What :class:`clara_fast.store.MemoryStore` and ``compress_corpus`` ask of a model."""

    def __init__(self, num_memory: int = 4, hidden_size: int = 8, doc_max_length: int = 32, name: str = "a") -> None:
        self.config = SimpleNamespace(
            num_memory=num_memory, hidden_size=hidden_size, doc_max_length=doc_max_length, compression_rate=8
        )
        self.fingerprint = f"stand-in-{name}"
        self.compressed = 0

    def compress(self, documents, *, max_tokens=8192):
        long = sum(n > self.config.doc_max_length for n in self.count_tokens(documents))
        if long:
            warnings.warn(f"{long} texts were cut to doc_max_length", stacklevel=2)
        self.compressed += len(documents)
        return torch.stack([self._memory(text) for text in documents])

    def encode_queries(self, questions):
        return torch.stack([self._memory(text) for text in questions])

    def count_tokens(self, documents):
        return [len(text.split()) for text in documents]

    def token_spans(self, text):
        return [match.span() for match in re.finditer(r"\S+", text)]

    def _memory(self, text):
        shape = (self.config.num_memory, self.config.hidden_size)
        words = text.lower().split()[: self.config.doc_max_length]
        seeds = [zlib.crc32(word.strip(".?!").encode()) for word in words]
        return sum(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds)


def names(count: int, start: int = 0) -> list[str]:
    return [f"doc-{i}" for i in range(start, start + count)]


def texts(count: int, start: int = 0) -> list[str]:
    return [f"Text number {i} says {i * 7919 % 1000}." for i in range(start, start + count)]
