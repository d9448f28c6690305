"""Held-out answer loss with its controls: does the generator read the memory, and this document's?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from clara_fast.data.scp import ScpSample
from clara_fast.modeling.branches import pack_groups, question_branches
from clara_fast.modeling.roles import NO_ROLE

if TYPE_CHECKING:
    from clara_fast.modeling import Clara

CONTROLS = ("memory", "other_memory", "no_context", "full_text")
S = TypeVar("S")


@dataclass
class Exam:
    """Questions with their answers (``pairs``) on ``k`` documents: as text, and as memories ``[k, m, D]``.

    ``golds`` are the accepted answers of each question; where there is none, the answer of its pair alone.
    """

    pairs: Sequence[tuple[str, str]]
    documents: Sequence[str]
    memory: Tensor
    golds: Sequence[Sequence[str]] = ()


def answer_losses(
    model: Clara,
    samples: Sequence[ScpSample],
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """:func:`context_losses` of passages with their questions.

    Raises:
        ValueError: fewer than two samples have questions (another passage's memory needs another passage).
    """
    return context_losses(model, passage_exams(model, samples, batch_size=batch_size, progress=progress))


def passage_exams(
    model: Clara,
    samples: Sequence[ScpSample],
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Iterable[list[Exam]]:
    """Batches of passages with their questions and their memories; those without questions are left out."""
    for batch in even_batches([sample for sample in samples if sample.questions], batch_size):
        memory, _ = model.encode(model.pack([s.document for s in batch]).to(model.device), "compressor")
        yield [Exam(s.pairs, [s.document], own[None]) for s, own in zip(batch, memory, strict=True)]
        if progress is not None:
            progress(len(batch))


def context_losses(model: Clara, batches: Iterable[Sequence[Exam]]) -> dict[str, float]:
    """Mean cross-entropy (nats a token) of held-out answers under four contexts.

    ``memory``: the documents' own. ``other_memory``: those of the batch's next exam, with the same prompt.
    ``no_context``: the generator without any. ``full_text``: the base model, without adapters, on the documents as
    text.

    Args:
        model: the model; it is put into inference mode, also while ``batches`` are made.
        batches: of two exams or more each.
    """
    totals = dict.fromkeys(CONTROLS, 0.0)
    tokens = 0
    with model.inference():
        for exams in batches:
            prompts = pack_groups(model, [_asked(model, e, num_documents=len(e.memory)) for e in exams])
            bare = pack_groups(model, [_asked(model, e, documents=[]) for e in exams]).to(model.device)
            text = pack_groups(model, [_asked(model, e, documents=e.documents) for e in exams]).to(model.device)
            prompts = prompts.to(model.device)
            own = [e.memory.to(model.device) for e in exams]
            none = own[0].new_empty(0, own[0].shape[-1])
            n = int((prompts.labels != -100).sum())
            tokens += n
            for name, packed, filling, role in (
                ("memory", prompts, torch.cat(own).flatten(0, 1), "generator"),
                ("other_memory", prompts, torch.cat(_exchanged(own)).flatten(0, 1), "generator"),
                ("no_context", bare, none, "generator"),
                ("full_text", text, none, NO_ROLE),
            ):
                totals[name] += float(model.answer_loss(packed, filling, role=role)) * n
    return {name: total / tokens for name, total in totals.items()}


def even_batches(samples: Sequence[S], batch_size: int) -> list[Sequence[S]]:
    """Batches of about equal size, so that none is left with one sample and no other beside it.

    Raises:
        ValueError: there are fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError(f"the controls need at least two samples with questions, got {len(samples)}")
    count = min(-(-len(samples) // batch_size), len(samples) // 2)
    return [samples[i::count] for i in range(count)]


def loss_metrics(losses: dict[str, float], prefix: str) -> dict[str, float]:
    """Names for a log; the loss that counts is the one from memory."""
    return {**{f"{prefix}_loss_{name}": value for name, value in losses.items()}, f"{prefix}_loss": losses["memory"]}


def format_losses(losses: dict[str, float]) -> str:
    """One line for a log."""
    return ", ".join(f"{name.replace('_', ' ')} {losses[name]:.3f}" for name in CONTROLS)


def _asked(model: Clara, exam: Exam, *, num_documents: int = 1, documents: Sequence[str] | None = None):
    return question_branches(model, exam.pairs, num_documents=num_documents, documents=documents)


def _exchanged(memories: Sequence[Tensor]) -> list[Tensor]:
    """Everyone gets the next one's memories: as many as there were, over again if the next one has fewer."""
    others = [*memories[1:], memories[0]]
    return [other[torch.arange(len(own)) % len(other)] for own, other in zip(memories, others, strict=True)]
