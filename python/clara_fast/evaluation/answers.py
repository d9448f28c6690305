"""Held-out questions answered while their answer loss is taken: EM, F1 and cover match of greedy generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from clara_fast.evaluation.controls import Exam
from clara_fast.evaluation.metrics import answer_metrics

if TYPE_CHECKING:
    from clara_fast.modeling import Clara


class AnswerCheck:
    """Lets the model answer the first questions that pass by, from the memories that the loss is taken on.

    Args:
        model: the model.
        limit: questions to answer; the others pass unasked.
        max_new_tokens: length limit of an answer.
    """

    def __init__(self, model: Clara, limit: int, *, max_new_tokens: int = 64) -> None:
        if limit < 0:
            raise ValueError(f"limit ({limit}) must be at least 0")
        self.model, self.limit, self.max_new_tokens = model, limit, max_new_tokens
        self.answers: list[str] = []
        self.golds: list[Sequence[str]] = []

    def watch(self, batches: Iterable[Sequence[Exam]]) -> Iterator[Sequence[Exam]]:
        """The batches as they are; each one's questions are answered at once, in one batch, before it goes on."""
        for exams in batches:
            asked = [
                (question, exam.golds[i] if exam.golds else [gold], exam.memory)
                for exam in exams
                for i, (question, gold) in enumerate(exam.pairs)
            ][: self.limit - len(self.answers)]
            if asked:
                questions, golds, memories = zip(*asked, strict=True)
                answers = self.model.answer(list(questions), memory=memories, max_new_tokens=self.max_new_tokens)
                self.answers += [answer.text for answer in answers]
                self.golds += golds
            yield exams

    def metrics(self) -> dict[str, float]:
        """``em``, ``f1`` and ``cover``, the best over each question's gold answers; nothing where none was asked."""
        return answer_metrics(self.answers, self.golds) if self.answers else {}
