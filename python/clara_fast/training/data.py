"""Pretraining data: passages with questions and answers, or with a paraphrase (the reference's JSONL format)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

S = TypeVar("S")


@dataclass
class ScpSample:
    """One passage and what is asked of it: ``questions`` with their ``answers``, or no question and one paraphrase."""

    id: str
    document: str
    answers: list[str]
    questions: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every question with its answer."""
        return list(zip(self.questions, self.answers, strict=True))


def read_scp(paths: str | Path | Sequence[str | Path], *, limit: int | None = None) -> list[ScpSample]:
    """Read ``.jsonl`` or ``.jsonl.gz`` files of ``{"data_type", "docs", "question", "answers", "id"}``.

    ``data_type`` is ``"qa"`` (lists of questions and answers) or ``"paraphrase"`` (the answer is the paraphrase).

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a line is no JSON object or breaks the format; file, line and rule are named.
    """
    return read_files(paths, _sample, limit)


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
        raise FileNotFoundError(f"training data {file} does not exist")
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


def _sample(row: dict[str, Any], place: str) -> ScpSample:
    documents, answers = row.get("docs"), row.get("answers")
    if not isinstance(documents, list) or len(documents) != 1 or not is_text(documents[0]):
        raise ValueError(f"{place}: docs must hold exactly one passage with text")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(is_text(a) for a in answers):
        raise ValueError(f"{place}: answers must hold at least one answer, and none may be empty")
    kind = row.get("data_type", "qa")
    questions = row.get("question", [])
    if kind == "paraphrase":
        questions, answers = [], answers[:1]
    elif kind != "qa":
        raise ValueError(f"{place}: data_type ({kind!r}) must be 'qa' or 'paraphrase'")
    else:
        questions = [questions] if isinstance(questions, str) else questions
        if len(questions) != len(answers) or not all(is_text(q) for q in questions):
            raise ValueError(
                f"{place}: {len(questions)} questions and {len(answers)} answers must be as many, with text"
            )
    return ScpSample(str(row.get("id", place)), documents[0], answers, questions)


def is_text(value: object) -> bool:
    """Whether ``value`` is a string with more than white space."""
    return isinstance(value, str) and bool(value.strip())
