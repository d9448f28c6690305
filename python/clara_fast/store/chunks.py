"""Long documents in overlapping pieces, cut between sentences or words, that know which document they come from."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from clara_fast.store.documents import Document, Hit, document_text
from clara_fast.store.errors import CorpusError, StoreError
from clara_fast.store.ledger import content_digest

if TYPE_CHECKING:
    from clara_fast.store.corpus import Record
    from clara_fast.store.reading import StoreReader

# Where a sentence or a line begins, and where a word does.
_SENTENCE = re.compile(r"(?:[.!?…][\"'”’)\]]*\s+|[。！？]\s*|\n\s*)(?=\S)")
_WORD = re.compile(r"\s+(?=\S)")
PARENT, DIGEST = "parent", "parent_digest"
FIELDS = (PARENT, "chunk", "chunks", "span", DIGEST)
_HEX_DIGEST = re.compile(r"[0-9a-f]{32}")


class Tokens(Protocol):
    """What chunking asks of a model."""

    def count_tokens(self, documents: Sequence[str]) -> list[int]: ...

    def token_spans(self, text: str) -> list[tuple[int, int]]: ...


@dataclass(frozen=True)
class Chunking:
    """Pieces of at most ``size`` tokens, title included, that share about ``overlap`` tokens with the one before."""

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"chunk ({self.size}) must be at least 1 token")
        if not 0 <= self.overlap <= self.size // 2:
            raise ValueError(f"overlap ({self.overlap}) must be at least 0 and at most half of chunk ({self.size})")

    def split(self, record: Record, model: Tokens) -> list[Record]:
        """``record`` itself if it is short, else its pieces: ``ID#0``, ``ID#1``, ... with ``FIELDS`` in the metadata.

        Raises:
            CorpusError: the title leaves no room, or the metadata has fields of ours.
        """
        if model.count_tokens([document_text(record.title, record.text)])[0] <= self.size:
            return [record]
        if taken := [name for name in FIELDS if name in record.metadata]:
            raise CorpusError(
                f"{record.where}: document {record.id!r} has the metadata {taken}, which its chunks would overwrite"
            )
        spans = model.token_spans(record.text)
        title = model.count_tokens([record.title])[0] + 1 if record.title else 0
        room = self.size - title
        # A piece may have more tokens alone than as a part of its document; then all are cut a little shorter.
        while room >= max(1, self.size // 4):
            pieces = cut(record.text, spans, room, min(self.overlap, room // 2))
            counts = model.count_tokens([document_text(record.title, record.text[a:b]) for a, b in pieces])
            if (excess := max(counts) - self.size) <= 0:
                return self._records(record, pieces)
            room -= excess
        raise CorpusError(
            f"{record.where}: document {record.id!r} cannot be cut into chunks of {self.size} tokens: "
            f"its title takes {title} of them; choose longer chunks (--chunk)"
        )

    def _records(self, record: Record, pieces: list[tuple[int, int]]) -> list[Record]:
        digest = content_digest(document_text(record.title, record.text)).hex()
        return [
            replace(
                record,
                id=f"{record.id}#{i}",
                text=record.text[start:end],
                metadata={**record.metadata, **dict(zip(FIELDS, (record.id, i, len(pieces), [start, end], digest)))},
            )
            for i, (start, end) in enumerate(pieces)
        ]


def cut(text: str, spans: Sequence[tuple[int, int]], size: int, overlap: int) -> list[tuple[int, int]]:
    """Character ranges of pieces of at most ``size`` tokens; together they cover ``text`` from end to end.

    A piece ends where a sentence does if there is such a place in its second half, else where a word does, else
    wherever ``size`` tokens end; the next one begins at most ``overlap`` tokens before, at the first sentence or word.

    Args:
        text: all of the document.
        spans: character range of each token, ascending.
    """
    sentences, words = ([match.end() for match in rule.finditer(text)] for rule in (_SENTENCE, _WORD))
    starts = [start for start, _ in spans]
    pieces: list[tuple[int, int]] = []
    begin = 0
    while True:
        token = bisect_left(starts, begin)
        if token + size >= len(starts):
            pieces.append((begin, len(text)))
            break
        middle, limit = starts[token + size // 2], starts[token + size]
        end = _last(sentences, middle, limit) or _last(words, middle, limit) or limit
        if end <= begin:  # tokens that share a character
            end = next((start for start in starts[token + size :] if start > begin), len(text))
        pieces.append((begin, end))
        if end == len(text):
            break
        back = starts[max(token + 1, bisect_left(starts, end) - overlap)]
        after = back if back > begin else end
        begin = _first(sentences, after, end) or _first(words, after, end) or end
    return [(a, b) for a, b in pieces if text[a:b].strip()]


def _last(places: list[int], low: int, high: int) -> int | None:
    """The last place in ``[low, high]``."""
    i = bisect_right(places, high) - 1
    return places[i] if i >= 0 and places[i] >= low else None


def _first(places: list[int], low: int, high: int) -> int | None:
    """The first place in ``[low, high]``."""
    i = bisect_left(places, low)
    return places[i] if i < len(places) and places[i] <= high else None


def parent_of(document: Document | Hit | Record) -> tuple[str, bytes] | None:
    """Id and digest of the document that this is a chunk of; None if it is whole."""
    metadata: Mapping[str, Any] = document.metadata
    parent, digest = metadata.get(PARENT), metadata.get(DIGEST)
    is_chunk = isinstance(parent, str) and document.id.startswith(f"{parent}#")
    if not is_chunk or not isinstance(digest, str) or not _HEX_DIGEST.fullmatch(digest):
        return None
    return str(parent), bytes.fromhex(digest)


def parent_text(store: StoreReader, document: Document | Hit) -> str:
    """The whole text of the document that ``document`` is a chunk of, put together from all of its chunks.

    Raises:
        StoreError: a chunk of it is not in the store any more.
    """
    if parent_of(document) is None:
        return document.text
    names = [f"{document.metadata[PARENT]}#{i}" for i in range(int(document.metadata["chunks"]))]
    rows = store.ids.rows_of(names).tolist()
    if -1 in rows:
        name = names[rows.index(-1)]
        raise StoreError(f"{store.path} lacks chunk {name!r} of document {document.metadata[PARENT]!r}")
    text = ""
    for chunk in store.documents(rows):
        start, _ = chunk.metadata["span"]
        text = text[:start].ljust(start) + chunk.text  # what lies between two chunks is white space
    return text
