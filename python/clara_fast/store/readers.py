"""Rows of files: JSON lines, Parquet, text files and data sets, each row with its place for messages."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from clara_fast.store.errors import CorpusError, listing

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
PARQUET_SUFFIX = ".parquet"
TEXT_SUFFIXES = (".txt", ".md")
# Lie beside data files without being documents.
_ABOUT = ("readme", "license", "changelog")
HUB = "hf://datasets/"


@dataclass(frozen=True)
class Row:
    """One row as it was found: where it stands, what to call it without an id, its fields or what is wrong."""

    where: str
    name: str
    values: Mapping[str, Any] | CorpusError


@dataclass(frozen=True)
class Source:
    """Rows that can be read any number of times; ``count`` says how many there are, if that is known unread."""

    rows: Callable[[], Iterator[Row]]
    count: Callable[[], int | None]
    is_text: bool = False


def find_source(path: str, split: str | None, subset: str | None) -> Source:
    """What ``path`` is: see :meth:`clara_fast.store.Corpus.open`."""
    place = Path(path)
    if path.startswith(HUB) or ((split is not None or subset is not None) and not place.is_file()):
        return _hub_source(path, split, subset)
    if split is not None or subset is not None:
        raise ValueError(f"split and subset are for data sets; corpus {path} is a file")
    if not place.exists():
        raise FileNotFoundError(
            f"corpus {path} does not exist (a data set of the hub: {HUB}NAME, or its name with split (--split))"
        )
    if place.is_dir():
        return _folder_source(place)
    if source := _file_source(place, ""):
        return source
    raise CorpusError(
        f"corpus {path} must be a .jsonl, .jsonl.gz or .parquet file, a folder of such or of .txt or .md files, "
        "or a data set"
    )


def _file_source(path: Path, prefix: str) -> Source | None:
    if path.name.endswith(JSON_SUFFIXES):
        return Source(partial(_json_lines, path, prefix), partial(_count_lines, path))
    if path.suffix == PARQUET_SUFFIX:
        return Source(partial(_parquet, path, prefix), partial(_count_parquet, path))
    return None


def _folder_source(folder: Path) -> Source:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _hub_source(str(folder), None, None)
    texts = [file for file in _files(folder, TEXT_SUFFIXES) if not file.name.lower().startswith(_ABOUT)]
    data = list(_files(folder, (*JSON_SUFFIXES, PARQUET_SUFFIX)))
    if data and texts:
        raise CorpusError(
            f"corpus {folder} holds data files ({listing([data[0].name])}, ...) and text files "
            f"({listing([texts[0].name])}, ...): put them into folders of their own"
        )
    if data:
        parts = [_file_source(file, f"{file.relative_to(folder).as_posix()}:") for file in data]
        sources = [part for part in parts if part is not None]
        return Source(
            lambda: (row for source in sources for row in source.rows()),
            lambda: sum(source.count() or 0 for source in sources),
        )
    if next(_files(folder, TEXT_SUFFIXES), None) is None:
        raise CorpusError(f"corpus {folder} holds no .txt, .md, .jsonl or .parquet file")
    count = partial(_files, folder, TEXT_SUFFIXES)
    return Source(partial(_texts, folder), lambda: sum(1 for _ in count()), is_text=True)


def _files(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Files under ``folder`` by path, without hidden files and folders."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files(entry, suffixes)
        elif entry.name.lower().endswith(tuple(suffixes)):
            yield entry


def _json_lines(path: Path, prefix: str) -> Iterator[Row]:
    with readable(path), _open_binary(path) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            if line.strip():
                yield Row(where, f"{prefix}{number}", _json_object(line, where))


def _json_object(line: bytes, where: str) -> Mapping[str, Any] | CorpusError:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        return CorpusError(f"{where} is not JSON (column {error.colno}: {error.msg})")
    except UnicodeDecodeError:
        return CorpusError(f"{where} is not UTF-8 text")
    except RecursionError:
        return CorpusError(f"{where} is nested too deeply")
    if not isinstance(values, dict):
        return CorpusError(f"{where} must be a JSON object, not {type(values).__name__}")
    return values


def _count_lines(path: Path) -> int:
    count, last = 0, b"\n"
    with readable(path), _open_binary(path) as stream:
        while chunk := stream.read(1 << 20):
            count += chunk.count(b"\n")
            last = chunk
    return count + (not last.endswith(b"\n"))


def _open_binary(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _parquet(path: Path, prefix: str) -> Iterator[Row]:
    import pyarrow.parquet as pq

    # Read without prefetching: a row group of long texts is held once, not several times over.
    with readable(path), pq.ParquetFile(path, pre_buffer=False) as file:
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", f"{prefix}{number}", _plain(values))


def _count_parquet(path: Path) -> int:
    import pyarrow.parquet as pq

    with readable(path):
        return int(pq.read_metadata(path).num_rows)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Through JSON and back: dates and decimals become strings, as in the stored metadata."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def _texts(folder: Path) -> Iterator[Row]:
    for file in _files(folder, TEXT_SUFFIXES):
        name = file.relative_to(folder).as_posix()
        try:
            with readable(file):
                yield Row(str(file), name, {"stem": file.stem, "content": file.read_text(encoding="utf-8-sig")})
        except CorpusError as error:
            yield Row(str(file), name, error)


def _hub_source(path: str, split: str | None, subset: str | None) -> Source:
    """A data set of the hub, or one on disk, through the ``datasets`` package; no code of the data set runs."""
    try:
        import datasets
    except ImportError:
        raise ImportError(f"data set {path} needs the datasets package: pip install clara-fast[datasets]") from None
    name, _, revision = path.removeprefix(HUB).partition("@")
    folder = Path(name)
    with _explained(path):
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            found: Any = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(name, subset, split=split, revision=revision or None, streaming=True)
    if isinstance(found, dict):
        if split is None and len(found) > 1:
            raise CorpusError(f"data set {path} has the splits {listing(sorted(found))}: choose one (--split)")
        if split is not None and split not in found:
            raise CorpusError(f"data set {path} has no split {split!r} (there are: {listing(sorted(found))})")
        found = found[split or next(iter(found))]
    return dataset_source(found, path)


def dataset_source(dataset: Iterable[Mapping[str, Any]], name: str) -> Source:
    """Anything that can be iterated again and again and gives mappings: a ``datasets`` set, a list of dicts."""

    def rows() -> Iterator[Row]:
        iterator = iter(dataset)
        number = 0
        while True:
            number += 1
            with _explained(name):
                values = next(iterator, None)
            if values is None:
                return
            where = f"{name}, row {number}"
            fits = isinstance(values, Mapping)
            wrong = CorpusError(f"{where} must be a mapping of fields, not {type(values).__name__}")
            yield Row(where, str(number), _plain(values) if fits else wrong)

    def count() -> int | None:
        if isinstance(dataset, Sized):
            return len(dataset)
        splits = getattr(getattr(dataset, "info", None), "splits", None) or {}
        facts = splits.get(str(getattr(dataset, "split", None)))
        return getattr(facts, "num_examples", None) or None

    return Source(rows, count)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """``datasets`` raises whatever its readers and the network raise: one sentence, of our kind."""
    try:
        yield
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorpusError(f"cannot read data set {name}: {said}") from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
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
