"""Held-out answer loss with its controls: does the generator read the memory, and this document's?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from clara_fast.modeling.roles import NO_ROLE
from clara_fast.training.collation import pack_groups, question_branches
from clara_fast.training.data import ScpSample

if TYPE_CHECKING:
    from clara_fast.modeling import Clara

CONTROLS = ("memory", "other_memory", "no_context", "full_text")


def answer_losses(
    model: Clara,
    samples: Sequence[ScpSample],
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Mean cross-entropy (nats a token) of held-out answers under four contexts.

    ``memory``: the passage's own. ``other_memory``: another passage's, with the same prompt. ``no_context``: the
    generator without any. ``full_text``: the base model, without adapters, on the passage as text.

    Raises:
        ValueError: fewer than two samples have questions (another passage's memory needs another passage).
    """
    asked = [sample for sample in samples if sample.questions]
    if len(asked) < 2:
        raise ValueError(f"the controls need at least two samples with questions, got {len(asked)}")
    totals = dict.fromkeys(CONTROLS, 0.0)
    tokens = 0
    # Batches of equal size, so that none is left with one passage and no other beside it.
    num_batches = min(-(-len(asked) // batch_size), len(asked) // 2)
    with model.inference():
        for i in range(num_batches):
            batch = asked[i::num_batches]
            memory, _ = model.encode(model.pack([s.document for s in batch]).to(model.device), "compressor")
            prompts = pack_groups(model, [question_branches(model, s) for s in batch]).to(model.device)
            bare = pack_groups(model, [question_branches(model, s, documents=[]) for s in batch]).to(model.device)
            text = pack_groups(model, [question_branches(model, s, documents=[s.document]) for s in batch])
            none = memory.new_empty(0, memory.shape[-1])
            n = int((prompts.labels != -100).sum())
            tokens += n
            for name, packed, filling, role in (
                ("memory", prompts, memory.flatten(0, 1), "generator"),
                ("other_memory", prompts, memory.roll(1, 0).flatten(0, 1), "generator"),
                ("no_context", bare, none, "generator"),
                ("full_text", text.to(model.device), none, NO_ROLE),
            ):
                totals[name] += float(model.answer_loss(packed, filling, role=role)) * n
            if progress is not None:
                progress(len(batch))
    return {name: total / tokens for name, total in totals.items()}


def format_losses(losses: dict[str, float]) -> str:
    """One line for a log."""
    return ", ".join(f"{name.replace('_', ' ')} {losses[name]:.3f}" for name in CONTROLS)
