"""Pretraining data from one passage: questions with verified answers, round after round, and a verified paraphrase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clara_fast.synthesis.asking import Asker, NoAnswer
from clara_fast.synthesis.client import together
from clara_fast.synthesis.items import Item
from clara_fast.synthesis.parsing import Question, normalized, read_list, read_questions, read_text, read_verdict

MOST_ROUNDS = 10
_PARAPHRASES = 3
_MOST_QUESTIONS = 32  # of one answer: a server that cannot stop has nothing more to say
# A paraphrase outside of this many times the passage's words has lost something, or made something up.
_SHORTEST_PARAPHRASE, _LONGEST_PARAPHRASE = 0.4, 2.5


@dataclass(frozen=True)
class ScpTask:
    """Passages to pretraining rows.

    Attributes:
        rounds: of questions for each passage, 1 to 10.
        max_answer_words: a longer answer is not the shortest.
    """

    rounds: int = MOST_ROUNDS
    max_answer_words: int = 30
    name = "scp"

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= MOST_ROUNDS:
            raise ValueError(f"rounds ({self.rounds}) must be 1 to {MOST_ROUNDS}")
        if self.max_answer_words < 1:
            raise ValueError(f"max_answer_words ({self.max_answer_words}) must be at least 1")

    def settings(self) -> dict[str, Any]:
        """What the outcome depends on."""
        return {"rounds": self.rounds, "max_answer_words": self.max_answer_words}

    async def work(self, item: Item, asker: Asker) -> dict[str, Any]:
        """All that comes of a passage; a function of the passage and the server's answers, and of nothing else."""
        passage = item.documents[0]
        questions, paraphrase = await together(
            _Rounds(passage, asker, self).run(), _paraphrase(passage, asker, min(_PARAPHRASES, self.rounds))
        )
        return {**questions, **paraphrase, "rejected": questions["rejected"] + paraphrase["rejected"]}

    def rows(self, item: Item, outcome: dict[str, Any]) -> list[dict[str, Any]]:
        """Lines of the file that ``train scp`` reads."""
        rows: list[dict[str, Any]] = []
        if pairs := outcome["pairs"]:
            rows.append(
                {
                    "data_type": "qa",
                    "docs": item.documents,
                    "question": [pair["question"] for pair in pairs],
                    "answers": [pair["answer"] for pair in pairs],
                    "kinds": [pair["kind"] for pair in pairs],
                    "id": item.id,
                }
            )
        if outcome["paraphrase"]:
            row = {"data_type": "paraphrase", "docs": item.documents, "question": []}
            rows.append({**row, "answers": [outcome["paraphrase"]], "id": f"{item.id}-paraphrase"})
        return rows


class _Rounds:
    def __init__(self, passage: str, asker: Asker, task: ScpTask) -> None:
        self._passage, self._asker, self._task = passage, asker, task
        self._asked: dict[str, Question] = {}
        self._pairs: list[dict[str, Any]] = []
        self._rejected: list[dict[str, Any]] = []

    async def run(self) -> dict[str, Any]:
        missing: list[str] = []
        stopped, number = "rounds used up", 0
        for number in range(1, self._task.rounds + 1):
            new = await self._propose(number, missing)
            if not new:
                stopped = "no new question"
                break
            for kept, record in await together(*(self._verify(number, kind, question) for kind, question in new)):
                (self._pairs if kept else self._rejected).append(record)
            try:
                missing = await self._asker.ask(
                    "missing", lambda content: read_list(content, "missing"), self._values(pairs=_shown(self._pairs))
                )
            except NoAnswer as error:
                self._reject(number, "missing", str(error))
                stopped = "missing facts unknown"
                break
            if not missing:
                stopped = "covered"
                break
        return {
            "pairs": self._pairs,
            "rejected": self._rejected,
            "rounds": number,
            "stopped": stopped,
            "missing": missing,
        }

    async def _propose(self, number: int, missing: list[str]) -> list[tuple[str, Question]]:
        """New questions of both kinds; what is not new, or not of its kind, is rejected here."""
        again = "_again" if number > 1 else ""
        values = self._values()
        if again:
            values |= {"missing": _bullets(missing), "asked": _bullets([q.text for q in self._asked.values()])}
        proposals = await together(*(self._questions(number, kind, again, values) for kind in ("simple", "complex")))
        new = []
        for kind, questions in zip(("simple", "complex"), proposals, strict=True):
            for question in questions[:_MOST_QUESTIONS]:
                name = normalized(question.text)
                if not name or name in self._asked:
                    self._reject(number, kind, "asked before" if name else "no words", question=question.text)
                elif kind == "complex" and len({normalized(fact) for fact in question.facts}) < 2:
                    self._reject(number, kind, "names fewer than two facts", question=question.text)
                else:
                    self._asked[name] = question
                    new.append((kind, question))
            if len(questions) > _MOST_QUESTIONS:
                self._reject(number, kind, f"too many questions: {len(questions)}")
        return new

    async def _questions(self, number: int, kind: str, again: str, values: dict[str, str]) -> list[Question]:
        try:
            return await self._asker.ask(kind + again, read_questions, values, sample=number, parts=True)
        except NoAnswer as error:
            self._reject(number, kind, str(error))
            return []

    async def _verify(self, number: int, kind: str, question: Question) -> tuple[bool, dict[str, Any]]:
        """Whether the judge accepts the question with the answer, and the record of either."""
        values = self._values(question=question.text)
        record: dict[str, Any] = {"question": question.text, "round": number}
        try:
            answer = await self._asker.ask("answer", lambda content: read_text(content, "answer"), values)
            record["answer"] = answer
            if not normalized(answer):
                return False, {"step": kind, **record, "reason": "the passage has no answer"}
            if (words := len(answer.split())) > self._task.max_answer_words:
                return False, {"step": kind, **record, "reason": f"the answer is long: {words} words"}
            values |= {"answer": answer}
            if kind == "complex":
                values |= {"facts": _bullets(question.facts)}
            verdict = await self._asker.ask(f"judge_{kind}", read_verdict, values)
        except NoAnswer as error:
            return False, {"step": kind, **record, "reason": str(error)}
        if not verdict.accept:
            return False, {"step": kind, **record, "reason": f"judge: {verdict.reason}"}
        return True, {**record, "kind": kind}

    def _values(self, **more: str) -> dict[str, str]:
        return {"passage": self._passage, **more}

    def _reject(self, number: int, step: str, reason: str, **what: str) -> None:
        self._rejected.append({"step": step, **what, "round": number, "reason": reason})


async def _paraphrase(passage: str, asker: Asker, attempts: int) -> dict[str, Any]:
    rejected: list[dict[str, Any]] = []
    objections: list[str] = []
    for number in range(1, attempts + 1):
        text = ""
        said = f"Earlier attempts were rejected:\n{_bullets(objections)}" if objections else ""
        try:
            text = await asker.ask(
                "paraphrase",
                lambda content: read_text(content, "paraphrase"),
                {"passage": passage, "objections": said},
                sample=number,
            )
            reason = objection = _fault(passage, text)
            if reason is None:
                verdict = await asker.ask("judge_paraphrase", read_verdict, {"passage": passage, "paraphrase": text})
                if verdict.accept:
                    return {"paraphrase": text, "rejected": rejected}
                objection = verdict.reason or "no reason given"
                reason = f"judge: {verdict.reason}"
            objections.append(str(objection))
        except NoAnswer as error:
            reason = str(error)
        rejected.append({"step": "paraphrase", "text": text, "round": number, "reason": reason})
    return {"paraphrase": None, "rejected": rejected}


def _fault(passage: str, paraphrase: str) -> str | None:
    """What is wrong with a paraphrase that no judge is needed for."""
    if not normalized(paraphrase):
        return "it is empty"
    if normalized(paraphrase) == normalized(passage):
        return "it is a copy of the passage"
    ratio = len(paraphrase.split()) / len(passage.split())
    if not _SHORTEST_PARAPHRASE <= ratio <= _LONGEST_PARAPHRASE:
        return f"it has {ratio:.1f} times the passage's words"
    return None


def _shown(pairs: list[dict[str, Any]]) -> str:
    return _bullets([f"{pair['question']} {pair['answer']}" for pair in pairs])


def _bullets(texts: list[str]) -> str:
    return "\n".join("- " + " ".join(text.split()) for text in texts) or "(none)"
