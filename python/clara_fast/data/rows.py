"""Rows of JSONL files, with places for messages about bad ones."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

S = TypeVar("S")
# Where documents lie in the reference's files; the first that is there counts.
DOCUMENT_FIELDS = ("docs", "context", "content")


def read_files(
    paths: str | Path | Sequence[str | Path], sample: Callable[[dict[str, Any], str], S], limit: int | None
) -> list[S]:
    """What ``sample(row, place)`` makes of every row of the files, up to ``limit``; at least one."""
    files = [paths] if isinstance(paths, str | Path) else paths
    rows = ((row, place) for file in files for place, row in read_rows(Path(file)))
    samples = [sample(row, place) for row, place in islice(rows, limit)]
    if not samples:
        raise ValueError(f"no sample in {', '.join(str(f) for f in files)}")
    return samples


def read_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a ``.jsonl`` or ``.jsonl.gz`` file, each with its place for error messages; empty lines are none.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or a line is no JSON object; file and line are named.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    place = str(file)
    try:
        # utf-8-sig: some editors begin a file with a byte order mark.
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                place = f"{file}, line {number}"
                if not line.strip():
                    continue
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"{place}: must be a JSON object")
                yield place, row
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{place}: damaged gzip file ({error})") from None


def documents_of(row: dict[str, Any], place: str) -> list[Any]:
    """The row's documents, under whichever of the reference's names they are; none where there is none.

    Raises:
        ValueError: they are no list.
    """
    for name in DOCUMENT_FIELDS:
        found = row.get(name)
        if found is not None:
            if not isinstance(found, list):
                raise ValueError(f"{place}: {name} must be a list of documents, not {type(found).__name__}")
            return found
    return []


def is_text(value: object) -> bool:
    """Whether ``value`` is a string with more than white space, and without halves of characters."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
