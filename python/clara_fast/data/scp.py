"""Pretraining data: passages with questions and answers, or with a paraphrase (the reference's JSONL format)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clara_fast.data.rows import documents_of, is_text, read_files


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
    ``docs`` may be called ``context`` or ``content``, and a single answer ``answer``, as the reference has it.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a line is no JSON object or breaks the format; file, line and rule are named.
    """
    return read_files(paths, _sample, limit)


def _sample(row: dict[str, Any], place: str) -> ScpSample:
    documents, answers = documents_of(row, place), row.get("answers", row.get("answer"))
    if len(documents) != 1 or not is_text(documents[0]):
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
