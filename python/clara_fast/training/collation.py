"""Samples to packed batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clara_fast.data.questions import QuestionSample
from clara_fast.data.scp import ScpSample
from clara_fast.modeling.branches import pack_groups, question_branches
from clara_fast.modeling.packing import PackedPrompts, PromptGroup, group_prompts

if TYPE_CHECKING:
    from clara_fast.modeling import Clara


@dataclass
class ScpCollator:
    """Packs passages and what is asked of them for :meth:`clara_fast.Clara.forward`.

    Args:
        model: its tokenizer and prompts are used, its weights are not.
        questions: ``"branches"`` asks each question by itself, all on one context; ``"sequence"`` writes all
            questions and answers one after the other, as the reference does.
        reconstruction: probability that a passage is to be written out instead of asked about.
        seed: of the choice of paraphrase instructions and of what is reconstructed.
    """

    model: Clara
    questions: str = "branches"
    reconstruction: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.questions not in ("branches", "sequence"):
            raise ValueError(f"questions ({self.questions!r}) must be 'branches' or 'sequence'")
        if not 0 <= self.reconstruction <= 1:
            raise ValueError(f"reconstruction ({self.reconstruction}) must be a probability")

    def __call__(self, samples: Sequence[ScpSample]) -> dict[str, Any]:
        prompts = pack_groups(self.model, [self._group(sample) for sample in samples])
        documents = self.model.pack([sample.document for sample in samples])
        return {"documents": documents, **answer_fields(prompts, samples)}

    def _group(self, sample: ScpSample) -> PromptGroup:
        text, prompts = self.model.text, self.model.prompts
        # Seeded by the sample, not by a running state: a resumed run draws what the unbroken one drew.
        draw = random.Random(f"{self.seed} {sample.id}")
        instruction = draw.randrange(prompts.num_paraphrase_instructions)
        if draw.random() < self.reconstruction:
            target = text.readable(sample.document)
            return group_prompts([text.exchange(prompts, prompts.paraphrase(instruction), target)])
        if not sample.questions:
            return group_prompts([text.exchange(prompts, prompts.paraphrase(instruction), sample.answers[0])])
        if self.questions == "sequence":
            reply = prompts.question_pairs(sample.questions, sample.answers)
            return group_prompts([text.exchange(prompts, prompts.questions(), reply)])
        return question_branches(self.model, sample.pairs)


@dataclass
class InstructionCollator:
    """Packs questions with all of their documents.

    Args:
        model: its tokenizer and prompts are used, its weights are not.
        num_documents: documents per question, at most; see :meth:`QuestionSample.chosen`.
    """

    model: Clara
    num_documents: int = 5

    def __call__(self, samples: Sequence[QuestionSample]) -> dict[str, Any]:
        documents = [[s.documents[i] for i in s.chosen(self.num_documents)] for s in samples]
        groups = [
            question_branches(self.model, [s.exchange(teacher=True)], num_documents=len(read))
            for s, read in zip(samples, documents, strict=True)
        ]
        packed = self.model.pack([document for read in documents for document in read])
        return {"documents": packed, **answer_fields(pack_groups(self.model, groups), samples)}


def answer_fields(prompts: PackedPrompts, samples: Sequence[Any]) -> dict[str, Any]:
    """What every batch with answers holds: the Trainer counts answer tokens by ``labels``, and errors name samples."""
    return {"prompts": prompts, "labels": prompts.labels, "samples": list(samples)}
