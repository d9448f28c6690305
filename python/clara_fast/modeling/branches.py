"""Questions as branches on one compressed or written-out context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clara_fast.modeling.packing import PackedPrompts, PromptGroup, group_prompts, pack_prompts

if TYPE_CHECKING:
    from clara_fast.modeling import Clara


def question_branches(
    model: Clara,
    pairs: Sequence[tuple[str, str]],
    *,
    num_documents: int = 1,
    documents: Sequence[str] | None = None,
) -> PromptGroup:
    """Questions, each with its answer, on one context: ``num_documents`` memories, or ``documents`` as plain text."""
    text, prompts = model.text, model.prompts
    exchanges = []
    for question, reply in pairs:
        asked = text.defuse(question)
        turn = (
            prompts.answer(asked, num_documents)
            if documents is None
            else prompts.answer_from_text(asked, [text.defuse(d) for d in documents])
        )
        exchanges.append(text.exchange(prompts, turn, reply))
    return group_prompts(exchanges)


def pack_groups(model: Clara, groups: Sequence[PromptGroup]) -> PackedPrompts:
    """:func:`pack_prompts` with the model's memory tokens."""
    return pack_prompts(groups, frozenset(model.text.memory_ids))
