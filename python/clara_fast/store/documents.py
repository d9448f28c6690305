"""Documents as callers give them, as a store returns them, and as a model reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_FIELDS = ("title", "text", "metadata")


@dataclass(frozen=True)
class Document:
    """A stored document; ``row`` is its position in the store, ``id`` its lasting name."""

    row: int
    id: str
    title: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hit:
    """A document found by a search; ``score`` is the cosine of its memory and the query's, in [-1, 1]."""

    row: int
    id: str
    score: float
    title: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def document_text(title: str, text: str) -> str:
    """What the compressor reads: the title on a line of its own, then the text."""
    return f"{title}\n{text}" if title else text


def document_rows(ids: Sequence[str], documents: Sequence[str | Mapping[str, Any]]) -> list[dict[str, str]]:
    """Check ``ids`` and ``documents`` and bring them into columns' form.

    Returns:
        one ``{"id", "title", "text", "metadata"}`` of strings per document, metadata as JSON.

    Raises:
        ValueError: an id is empty or given twice, a document is empty or has an unknown key.
        TypeError: an id or a document is of another type.
    """
    rows: dict[str, dict[str, str]] = {}
    for position, (name, document) in enumerate(zip(ids, documents, strict=True)):
        if not isinstance(name, str):
            raise TypeError(f"ids[{position}] must be a string, not {type(name).__name__}")
        if not name:
            raise ValueError(f"ids[{position}] is empty")
        if name in rows:
            raise ValueError(f"ids[{position}] ({name!r}) is given twice")
        rows[name] = {"id": name, **_columns(name, document)}
    return list(rows.values())


def _columns(name: str, document: str | Mapping[str, Any]) -> dict[str, str]:
    if isinstance(document, str):
        document = {"text": document}
    if not isinstance(document, Mapping):
        raise TypeError(f"document {name!r} must be a string or a mapping, not {type(document).__name__}")
    if unknown := sorted(set(document) - set(_FIELDS)):
        raise ValueError(f"document {name!r} has unknown keys {unknown}; put them under 'metadata'")
    title, text = document.get("title") or "", document.get("text")
    if not isinstance(title, str) or not isinstance(text, str):
        raise TypeError(f"document {name!r} must have a string under 'text' and, if any, under 'title'")
    if not text.strip():
        raise ValueError(f"document {name!r} is empty")
    try:
        metadata = json.dumps(document.get("metadata") or {}, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata of document {name!r} must be JSON: {error}") from None
    return {"title": title, "text": text, "metadata": metadata}
