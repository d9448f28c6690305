"""What is worked on: passages, or questions with documents, read as they are needed and each one once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clara_fast.data.questions import GOLD_FIELDS, QuestionSample
from clara_fast.data.rows import documents_of, is_text, read_rows


@dataclass(frozen=True)
class Item:
    """One passage, or one question with its ``documents``; ``key`` is a hash of what it says.

    ``row`` is the line that it came from.
    """

    key: str
    id: str
    documents: list[str]
    question: str = ""
    gold: list[str] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)


class Items:
    """The items of a file; can be iterated any number of times, and is never held in memory.

    What is there twice is left out the second time, however its id, letter case and spaces differ.

    Args:
        path: ``.jsonl`` or ``.jsonl.gz``.
        read: the items of one row; see :func:`passages_of` and :func:`question_of`.
        limit: only so many items.
    """

    def __init__(
        self, path: str | Path, read: Callable[[dict[str, Any], str], list[Item]], limit: int | None = None
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit ({limit}) must be at least 1")
        self._path, self._read, self._limit = Path(path), read, limit

    def __iter__(self) -> Iterator[Item]:
        return (item for item in self._all() if item is not None)

    def count(self) -> tuple[int, int]:
        """How many items there are, and how many were left out as duplicates; the whole file is checked.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or a line breaks the format.
        """
        items = duplicates = 0
        names: dict[str, str] = {}
        for item in self._all():
            if item is None:
                duplicates += 1
                continue
            items += 1
            if names.setdefault(item.id, item.key) != item.key:
                raise ValueError(f"{self._path}: id {item.id!r} is given to two different items")
        if not items:
            raise ValueError(f"{self._path} holds no item")
        return items, duplicates

    def _all(self) -> Iterator[Item | None]:
        """Every item, and None for a duplicate."""
        seen: set[str] = set()
        for place, row in read_rows(self._path):
            for item in self._read(row, place):
                content = json.dumps([item.question, *item.documents])
                same = digest(" ".join(content.casefold().split()))
                if same in seen:
                    yield None
                    continue
                seen.add(same)
                yield item
                if len(seen) == self._limit:
                    return


def passages_of(
    row: dict[str, Any], place: str, *, text_field: str = "text", id_field: str = "id", title_field: str = "title"
) -> list[Item]:
    """The passage of a row, with its title on a line before it; a list of texts is a list of passages."""
    content = row.get(text_field)
    if content is None:
        there = ", ".join(sorted(row)) or "none"
        raise ValueError(f"{place}: no field {text_field!r} with the passage (there are: {there}); see --text-field")
    texts = content if isinstance(content, list) else [content]
    items = []
    for number, text in enumerate(texts):
        where = f"{text_field}[{number}]" if isinstance(content, list) else text_field
        if not is_text(text):
            raise ValueError(f"{place}: {where} must hold text, not {_shown(text)}")
        title = row.get(title_field) if content is text else None
        if title is not None and not isinstance(title, str):
            raise ValueError(f"{place}: {title_field} must be a string, not {_shown(title)}")
        passage = _clean(f"{title.strip()}\n{text.strip()}" if title and title.strip() else text.strip())
        key = digest(passage)
        name = row.get(id_field) if content is text else None
        items.append(Item(key, _id(name, key, f"{place}: {id_field}"), [passage], row=row))
    return items


def question_of(row: dict[str, Any], place: str, *, max_documents: int | None = 5, id_field: str = "id") -> list[Item]:
    """The question of a row with the documents to answer it from: the first ones, and those in ``pos_index``."""
    question, documents = row.get("question"), documents_of(row, place)
    if isinstance(question, list) and len(question) == 1:
        question = question[0]
    if not is_text(question):
        raise ValueError(f"{place}: question must hold one question with text, not {_shown(question)}")
    if not documents or not all(is_text(document) for document in documents):
        raise ValueError(f"{place}: docs must be a list of documents with text")
    gold = [answer for key in GOLD_FIELDS for answer in _listed(row.get(key))]
    positives = _listed(row.get("pos_index"))
    if not all(isinstance(i, int) and 0 <= i < len(documents) for i in positives):
        raise ValueError(f"{place}: pos_index must hold indices of the {len(documents)} docs, not {_shown(positives)}")
    sample = QuestionSample("", str(question), documents, answers=[], positives=list(dict.fromkeys(positives)))
    read = [_clean(documents[i].strip()) for i in sample.chosen(max_documents)]
    question = _clean(str(question).strip())
    gold = list(dict.fromkeys(_clean(str(answer).strip()) for answer in gold if is_text(answer)))
    key = digest(json.dumps([question, read, gold]))
    return [Item(key, _id(row.get(id_field), key, f"{place}: {id_field}"), read, question, gold, row)]


def digest(text: str) -> str:
    """A short name for a text."""
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _id(name: Any, key: str, place: str) -> str:
    if name is None or name == "":
        return key
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(f"{place} must be a string or an integer, not {_shown(name)}")
    return str(name)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _clean(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can name and files cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _shown(value: Any) -> str:
    return repr(value)[:60]
