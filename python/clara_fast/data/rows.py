"""Rows of JSONL files, with places for messages about bad ones."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

S = TypeVar("S")


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
    """The objects of a ``.jsonl`` or ``.jsonl.gz`` file, each with its place for error messages."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{place}: must be a JSON object")
            yield place, row


def is_text(value: object) -> bool:
    """Whether ``value`` is a string with more than white space."""
    return isinstance(value, str) and bool(value.strip())
