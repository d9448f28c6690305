"""A corpus as a stream of documents, whatever it is read from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Self

from clara_fast.store.errors import CorpusError, listing
from clara_fast.store.ledger import Ledger
from clara_fast.store.readers import Row, Source, dataset_source, find_source

_LONGEST_TITLE = 100


@dataclass(frozen=True)
class Record:
    """One document of a corpus; ``where`` says for messages where it stands."""

    id: str
    title: str
    text: str
    metadata: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Corpus:
    """A corpus that can be iterated (yielding :class:`Record`) any number of times; made with :meth:`open`.

    It is read as it is iterated and never held in memory.

    Attributes:
        path: what it was opened from.
        limit: of documents.
        on_bad: called with the error of each row that is no document, which is then left out; None: it is raised.
    """

    path: str
    limit: int | None
    on_bad: Callable[[CorpusError], None] | None
    _source: Source
    _fields: _Fields

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        text_field: str = "text",
        id_field: str = "id",
        title_field: str = "title",
        split: str | None = None,
        subset: str | None = None,
        limit: int | None = None,
        on_bad: Callable[[CorpusError], None] | None = None,
    ) -> Self:
        """Find out what ``path`` is.

        - ``.jsonl`` or ``.jsonl.gz``: one object a line; without ``id_field``, the line's number names it;
        - ``.parquet``: one document a row; without ``id_field``, the row's number names it;
        - a folder of such files, read in the order of their paths; without ``id_field``, ``FILE:NUMBER`` names a row;
        - a folder of text: every ``.txt`` and ``.md`` file under it, named by its path there;
        - a data set (extra ``datasets``): ``hf://datasets/NAME``, or with ``split`` its name on the hub or a folder;
          a folder that ``save_to_disk`` wrote.

        Other fields become the document's metadata. Where the first row has a list in ``text_field``, each of its
        strings is a document, named by a hash of what it says and taken once (question files:
        ``text_field="docs"``); a short first line is its title.

        Args:
            path: file, folder or data set.
            text_field, id_field, title_field: where a row has its parts.
            split, subset: of a data set.
            limit: read only so many documents.
            on_bad: see above. A file that cannot be read as a whole is always an error.

        Raises:
            FileNotFoundError: there is nothing at ``path``.
            CorpusError: it is none of the above, or a folder without documents.
        """
        _check_limit(limit)
        source = find_source(os.fspath(path), split, subset)
        return cls(os.fspath(path), limit, on_bad, source, _Fields(text_field, id_field, title_field))

    @classmethod
    def of_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        *,
        name: str = "rows",
        text_field: str = "text",
        id_field: str = "id",
        title_field: str = "title",
        limit: int | None = None,
        on_bad: Callable[[CorpusError], None] | None = None,
    ) -> Self:
        """A corpus from a ``datasets`` set at hand or a list of dicts; ``name`` stands for it in messages."""
        _check_limit(limit)
        source = dataset_source(rows, name)
        return cls(name, limit, on_bad, source, _Fields(text_field, id_field, title_field))

    def __iter__(self) -> Iterator[Record]:
        return islice(self._records(), self.limit)

    def count(self) -> int | None:
        """How many documents there are, without parsing them (blank lines may count); None if nobody knows."""
        # A row of lists is several documents or none, so those are counted by reading.
        fresh = replace(self, on_bad=lambda _: None)
        count = sum(1 for _ in fresh) if self._holds_lists() else self._source.count()
        return count if count is None or self.limit is None else min(count, self.limit)

    def _holds_lists(self) -> bool:
        row = next(self._source.rows(), None)
        values = None if row is None else row.values
        return isinstance(values, Mapping) and isinstance(values.get(self._fields.text), list)

    def _records(self) -> Iterator[Record]:
        read = _text_record if self._source.is_text else self._fields.record
        lists: Callable[[Row], Iterator[Record]] | None = _Lists(self._fields) if self._holds_lists() else None
        for row in self._source.rows():
            try:
                if isinstance(row.values, CorpusError):
                    raise row.values
                if lists is None:
                    yield _checked(read(row, row.values))
                else:
                    yield from lists(row)
            except CorpusError as error:
                if self.on_bad is None:
                    raise
                self.on_bad(error)


@dataclass(frozen=True)
class _Fields:
    text: str
    id: str
    title: str

    def record(self, row: Row, values: Mapping[str, Any]) -> Record:
        """One document from a row's fields."""
        where = row.where
        if values.get(self.text) is None:
            raise CorpusError(
                f"{where}: no field {self.text!r} with the text (there are: {listing(sorted(values))}); "
                "name it with text_field (--text-field)"
            )
        text, title = values[self.text], values.get(self.title) or ""
        for key, value in ((self.text, text), (self.title, title)):
            if not isinstance(value, str):
                raise CorpusError(f"{where}: field {key!r} must be a string, not {type(value).__name__}")
        name: Any = values.get(self.id)
        if name is None:
            name = row.name
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise CorpusError(
                f"{where}: field {self.id!r} must be a string or an integer that is not empty, not {name!r}"
            )
        rest = {key: value for key, value in values.items() if key not in (self.text, self.id, self.title)}
        if isinstance(rest.get("metadata"), Mapping):
            rest |= rest.pop("metadata")
        return Record(str(name), title.strip(), text, rest, where)


class _Lists:
    """Documents of rows that hold lists of them, each document once."""

    def __init__(self, fields: _Fields) -> None:
        self.field = fields.text
        self.seen = Ledger()

    def __call__(self, row: Row) -> Iterator[Record]:
        assert isinstance(row.values, Mapping)
        contents = row.values.get(self.field)
        if not isinstance(contents, list):
            raise CorpusError(f"{row.where}: field {self.field!r} must be a list of documents, as on the first line")
        for i, content in enumerate(contents):
            where = f"{row.where}: {self.field}[{i}]"
            if not isinstance(content, str):
                raise CorpusError(f"{where} must be a string, not {type(content).__name__}")
            name = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
            if self.seen.is_new(name):
                yield _checked(Record(name, *_split_first_line(content), {}, where))


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit ({limit}) must be at least 1")


def _checked(record: Record) -> Record:
    if not record.text.strip():
        raise CorpusError(f"{record.where}: document {record.id!r} is empty")
    for name, value in (("id", record.id), ("title", record.title), ("text", record.text)):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise CorpusError(f"{record.where}: the {name} holds half of a surrogate pair, which is no text")
    return record


def _split_first_line(content: str) -> tuple[str, str]:
    """Title and text, if put together again they are ``content`` to the letter; else no title."""
    title, _, text = content.partition("\n")
    short = title and title == title.strip() and len(title) <= _LONGEST_TITLE
    return (title, text) if short and text.strip() else ("", content)


def _text_record(row: Row, values: Mapping[str, Any]) -> Record:
    title, text = _split_title(values["content"].strip())
    return Record(row.name, title or values["stem"], text, {}, row.where)


def _split_title(content: str) -> tuple[str, str]:
    """A first line that is short, or a Markdown heading, with text after it is the title."""
    first, _, rest = content.partition("\n")
    heading = first.lstrip("#").strip()
    if rest.strip() and heading and (first.startswith("#") or len(first) <= _LONGEST_TITLE):
        return heading, rest.strip()
    return "", content
