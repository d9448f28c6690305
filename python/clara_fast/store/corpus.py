"""Reading a corpus: JSON lines, Parquet, or a folder of text files, one document at a time."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Self

from clara_fast.store.errors import CorpusError, listing

_JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
_TEXT_SUFFIXES = (".txt", ".md")
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
    """

    path: Path
    limit: int | None
    _read: Callable[[], Iterator[Record]]
    _count: Callable[[], int]

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        text_field: str = "text",
        id_field: str = "id",
        title_field: str = "title",
        limit: int | None = None,
    ) -> Self:
        """Find out what ``path`` is.

        - ``.jsonl`` or ``.jsonl.gz``: one object a line; without ``id_field``, the line's number names it;
          where ``text_field`` holds a list, each of its strings is a document, named by a hash of what it says and
          taken once (question files: ``text_field="docs"``); a short first line is its title;
        - ``.parquet``: one document a row; without ``id_field``, the row's number names it;
        - a folder: every ``.txt`` and ``.md`` file under it, named by its path there.

        Other fields become the document's metadata.

        Args:
            path: file or folder.
            text_field, id_field, title_field: where a JSON object or Parquet row has its parts.
            limit: read only so many documents.

        Raises:
            FileNotFoundError: there is nothing at ``path``.
            CorpusError: it is none of the above, or a folder without text files.
        """
        path = Path(path)
        if limit is not None and limit < 1:
            raise ValueError(f"limit ({limit}) must be at least 1")
        fields = _Fields(text_field, id_field, title_field)
        if not path.exists():
            raise FileNotFoundError(f"corpus {path} does not exist")
        if path.is_dir():
            if next(_text_files(path), None) is None:
                raise CorpusError(f"corpus {path} holds no {' or '.join(_TEXT_SUFFIXES)} file")
            return cls(path, limit, partial(_read_folder, path), lambda: sum(1 for _ in _text_files(path)))
        if path.name.endswith(_JSON_SUFFIXES):
            if _holds_lists(path, fields):
                read = partial(_read_lists, path, fields)
                return cls(path, limit, read, lambda: sum(1 for _ in read()))
            return cls(path, limit, partial(_read_json_lines, path, fields), partial(_count_lines, path))
        if path.suffix == ".parquet":
            return cls(path, limit, partial(_read_parquet, path, fields), partial(_count_parquet, path))
        raise CorpusError(
            f"corpus {path} must be a .jsonl, .jsonl.gz or .parquet file, or a folder of .txt or .md files"
        )

    def __iter__(self) -> Iterator[Record]:
        return islice(self._read(), self.limit)

    def count(self) -> int:
        """How many documents there are, without parsing them (blank lines may count)."""
        count = self._count()
        return count if self.limit is None else min(count, self.limit)


@dataclass(frozen=True)
class _Fields:
    text: str
    id: str
    title: str

    def record(self, values: Mapping[str, Any], default_id: str, where: str) -> Record:
        """One document from an object's fields."""
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
            name = default_id
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise CorpusError(
                f"{where}: field {self.id!r} must be a string or an integer that is not empty, not {name!r}"
            )
        rest = {key: value for key, value in values.items() if key not in (self.text, self.id, self.title)}
        if isinstance(rest.get("metadata"), Mapping):
            rest |= rest.pop("metadata")
        return _checked(Record(str(name), title.strip(), text, rest, where))


def _checked(record: Record) -> Record:
    if not record.text.strip():
        raise CorpusError(f"{record.where}: document {record.id!r} is empty")
    return record


def _read_json_lines(path: Path, fields: _Fields) -> Iterator[Record]:
    for number, where, values in _json_lines(path):
        yield fields.record(values, str(number), where)


def _read_lists(path: Path, fields: _Fields) -> Iterator[Record]:
    seen: set[str] = set()
    for _, where, values in _json_lines(path):
        contents = values.get(fields.text)
        if not isinstance(contents, list):
            raise CorpusError(f"{where}: field {fields.text!r} must be a list of documents, as on the first line")
        for i, content in enumerate(contents):
            if not isinstance(content, str):
                raise CorpusError(f"{where}: {fields.text}[{i}] must be a string, not {type(content).__name__}")
            name = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
            if name not in seen:
                seen.add(name)
                yield _checked(Record(name, *_split_first_line(content), {}, f"{where}: {fields.text}[{i}]"))


def _split_first_line(content: str) -> tuple[str, str]:
    """Title and text, if put together again they are ``content`` to the letter; else no title."""
    title, _, text = content.partition("\n")
    short = title and title == title.strip() and len(title) <= _LONGEST_TITLE
    return (title, text) if short and text.strip() else ("", content)


def _json_lines(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    with _readable(path), _open_binary(path) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(f"{where} is not JSON (column {error.colno}: {error.msg})") from None
            except UnicodeDecodeError:
                raise CorpusError(f"{where} is not UTF-8 text") from None
            if not isinstance(values, dict):
                raise CorpusError(f"{where} must be a JSON object, not {type(values).__name__}")
            yield number, where, values


def _holds_lists(path: Path, fields: _Fields) -> bool:
    """Whether the first line has a list of documents; a damaged file is told of when it is read."""
    with _readable(path), _open_binary(path) as lines:
        try:
            values = json.loads(next(iter(lines), b"null"))
        except ValueError:
            return False
    return isinstance(values, dict) and isinstance(values.get(fields.text), list)


def _count_lines(path: Path) -> int:
    count, last = 0, b"\n"
    with _readable(path), _open_binary(path) as stream:
        while chunk := stream.read(1 << 20):
            count += chunk.count(b"\n")
            last = chunk
    return count + (not last.endswith(b"\n"))


def _open_binary(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _read_parquet(path: Path, fields: _Fields) -> Iterator[Record]:
    import pyarrow.parquet as pq

    with _readable(path), pq.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for values in batch.to_pylist():
                number += 1
                # Through JSON and back: dates and decimals become strings, as in the stored metadata.
                plain = json.loads(json.dumps(values, default=str))
                yield fields.record(plain, str(number), f"{path}, row {number}")


def _count_parquet(path: Path) -> int:
    import pyarrow.parquet as pq

    with _readable(path):
        return int(pq.read_metadata(path).num_rows)


def _text_files(folder: Path) -> Iterator[Path]:
    """Text files under ``folder`` by path, without hidden files and folders."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _text_files(entry)
        elif entry.suffix.lower() in _TEXT_SUFFIXES:
            yield entry


def _read_folder(folder: Path) -> Iterator[Record]:
    for file in _text_files(folder):
        with _readable(file):
            content = file.read_text(encoding="utf-8-sig").strip()
        title, text = _split_title(content)
        name = file.relative_to(folder).as_posix()
        yield _checked(Record(name, title or file.stem, text, {}, str(file)))


def _split_title(content: str) -> tuple[str, str]:
    """A first line that is short, or a Markdown heading, with text after it is the title."""
    first, _, rest = content.partition("\n")
    heading = first.lstrip("#").strip()
    if rest.strip() and heading and (first.startswith("#") or len(first) <= _LONGEST_TITLE):
        return heading, rest.strip()
    return "", content


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say which file it is that cannot be read."""
    import pyarrow as pa

    try:
        yield
    except CorpusError:
        raise
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except (pa.ArrowException, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(f"{path} is damaged or of another format: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror or error}") from None
