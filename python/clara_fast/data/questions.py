"""Questions with candidate documents: the data of instruction tuning and joint training (the reference's JSONL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clara_fast.data.rows import documents_of, is_text, read_files

GOLD_FIELDS = ("gold_answer", "golden_answers", "answers")


@dataclass
class QuestionSample:
    """A question, its candidate documents and its answers.

    Attributes:
        id: names the sample in messages.
        question: what is asked.
        documents: candidates; may be empty where they are searched for.
        answers: accepted answers, the one to train on first.
        teacher_answer: another model's answer in whole words, if there is one: what instruction tuning learns from.
        positives: indices of the ``documents`` that hold the answer, if that is known.
        gold_ids: the same as ids of a store's documents, for questions on a corpus.
    """

    id: str
    question: str
    documents: list[str]
    answers: list[str]
    teacher_answer: str | None = None
    positives: list[int] = field(default_factory=list)
    gold_ids: list[str] = field(default_factory=list)

    def exchange(self, *, teacher: bool = False) -> tuple[str, str]:
        """The question with the answer to learn: the first gold one, or the teacher's where there is one."""
        return self.question, (self.teacher_answer if teacher else None) or self.answers[0]

    def chosen(self, count: int | None, *, keep_positives: bool = True) -> list[int]:
        """Indices of ``count`` documents in their order: the first ones, or positives in the place of the last."""
        n = len(self.documents)
        if count is None or count >= n:
            return list(range(n))
        kept = self.positives[:count] if keep_positives else []
        others = [i for i in range(n) if i not in kept]
        return sorted([*kept, *others[: count - len(kept)]])


def read_multidoc(
    paths: str | Path | Sequence[str | Path], *, need_documents: bool = True, limit: int | None = None
) -> list[QuestionSample]:
    """Read ``.jsonl`` or ``.jsonl.gz`` files of ``{"question", "docs", "pos_index"}`` and answers.

    Of the answers at least one must be there: ``gold_answer``, ``golden_answers`` or ``answers`` (text, or a list of
    accepted ones) or ``answer`` (a teacher's, for instruction tuning). ``docs`` may be called ``context`` or
    ``content``, as the reference has it. ``pos_index`` may be missing; ``gold_ids`` may name documents of a store
    instead.

    Args:
        paths: one file or several.
        need_documents: refuse a question without candidates; False where they come from a search.
        limit: read only so many questions.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a line is no JSON object or breaks the format; file, line and rule are named.
    """
    return read_files(paths, lambda row, place: _sample(row, place, need_documents), limit)


def _sample(row: dict[str, Any], place: str, need_documents: bool) -> QuestionSample:
    question = row.get("question")
    if isinstance(question, list) and len(question) == 1:
        question = question[0]
    if not is_text(question):
        raise ValueError(f"{place}: question must hold one question with text")
    documents = documents_of(row, place)
    if not documents and need_documents:
        raise ValueError(f"{place}: docs must hold at least one candidate document")
    empty = [i for i, document in enumerate(documents) if not is_text(document)]
    if empty:
        raise ValueError(f"{place}: docs[{empty[0]}] must hold text")
    gold_ids = row.get("gold_ids", [])
    if not isinstance(gold_ids, list):
        raise ValueError(f"{place}: gold_ids must be a list of ids, not {type(gold_ids).__name__}")
    teacher = row["answer"] if is_text(row.get("answer")) else None
    gold = [answer for name in GOLD_FIELDS for answer in _answers(row, name, place)]
    answers = list(dict.fromkeys(gold)) or ([teacher] if teacher else [])
    if not answers:
        raise ValueError(f"{place}: there is no answer: {', '.join(GOLD_FIELDS)} or answer must hold one with text")
    return QuestionSample(
        id=str(row.get("id", place)),
        question=str(question),
        documents=documents,
        answers=answers,
        teacher_answer=teacher,
        positives=_positives(row, len(documents), place),
        gold_ids=[str(name) for name in gold_ids],
    )


def _answers(row: dict[str, Any], key: str, place: str) -> list[str]:
    found = row.get(key)
    found = [] if found is None else found if isinstance(found, list) else [found]
    if not all(is_text(answer) for answer in found):
        raise ValueError(f"{place}: {key} must hold answers with text, and none may be empty")
    return found


def _positives(row: dict[str, Any], num_documents: int, place: str) -> list[int]:
    found = row.get("pos_index")
    if found is None:
        return []
    found = found if isinstance(found, list) else [found]
    for index in found:
        if not isinstance(index, int) or isinstance(index, bool):
            raise ValueError(f"{place}: pos_index must hold integers, not {index!r}")
        if not 0 <= index < num_documents:
            raise ValueError(f"{place}: pos_index ({index}) must be at least 0 and below the {num_documents} docs")
    return list(dict.fromkeys(found))
