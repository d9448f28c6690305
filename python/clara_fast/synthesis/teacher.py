"""A teacher's answers for instruction tuning: in whole words, from the documents, and verified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clara_fast.synthesis.asking import Asker, NoAnswer
from clara_fast.synthesis.items import Item
from clara_fast.synthesis.parsing import normalized, read_text, read_verdict
from clara_fast.synthesis.scp import MOST_ROUNDS


@dataclass(frozen=True)
class TeacherTask:
    """Questions with documents to the same with an ``answer``.

    Attributes:
        rounds: attempts for each question, 1 to 10.
    """

    rounds: int = 3
    name = "teacher"

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= MOST_ROUNDS:
            raise ValueError(f"rounds ({self.rounds}) must be 1 to {MOST_ROUNDS}")

    def settings(self) -> dict[str, Any]:
        """What the outcome depends on."""
        return {"rounds": self.rounds}

    async def work(self, item: Item, asker: Asker) -> dict[str, Any]:
        """An answer that the judge accepts, or why there is none."""
        documents = "\n\n".join(f"[{number}] {text}" for number, text in enumerate(item.documents, 1))
        values = {"documents": documents, "question": item.question}
        gold = f"Correct answers: {'; '.join(item.gold)}" if item.gold else "No correct answer is known."
        rejected: list[dict[str, Any]] = []
        for number in range(1, self.rounds + 1):
            answer = ""
            try:
                answer = await asker.ask("teacher", lambda content: read_text(content, "answer"), values, sample=number)
                if not normalized(answer):
                    reason = "the documents have no answer"
                else:
                    verdict = await asker.ask("judge_teacher", read_verdict, {**values, "answer": answer, "gold": gold})
                    if verdict.accept:
                        return _outcome(answer, rejected, number, "accepted")
                    reason = f"judge: {verdict.reason}"
            except NoAnswer as error:
                reason = str(error)
            record = {"step": "teacher", "question": item.question, "answer": answer}
            rejected.append({**record, "round": number, "reason": reason})
        return _outcome(None, rejected, self.rounds, "rounds used up")

    def rows(self, item: Item, outcome: dict[str, Any]) -> list[dict[str, Any]]:
        """Lines of the file that ``train instruct`` reads."""
        return [{**item.row, "answer": outcome["answer"], "id": item.id}] if outcome["answer"] else []


def _outcome(answer: str | None, rejected: list[dict[str, Any]], rounds: int, stopped: str) -> dict[str, Any]:
    return {"answer": answer, "rejected": rejected, "rounds": rounds, "stopped": stopped}
