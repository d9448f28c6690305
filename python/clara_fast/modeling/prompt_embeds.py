"""Prompts as embeddings, for engines that generate from those (vLLM's ``prompt_embeds``)."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clara_fast.modeling.answering import Source, Store, fill_prompt, number_to_read

if TYPE_CHECKING:
    from clara_fast.modeling.clara import Clara


@dataclass(frozen=True)
class PromptEmbeds:
    """A whole prompt with memories in place: all that the base model with the generator's adapter needs.

    Attributes:
        embeds: ``[T, D]``, in the model's dtype and on its device.
        token_ids: the ``T`` tokens; those at ``memory_slots`` are memory tokens, which the base model does not know.
        memory_slots: places of the memories.
        stop_token_ids: where an answer ends.
        documents: what the memories are of, best first.
    """

    embeds: Tensor
    token_ids: list[int]
    memory_slots: list[int]
    stop_token_ids: list[int]
    documents: list[Source]

    def to_base64(self) -> str:
        """``embeds`` as vLLM's server takes them: ``torch.save`` of a CPU tensor, in base64."""
        buffer = io.BytesIO()
        torch.save(self.embeds.cpu(), buffer)
        return base64.b64encode(buffer.getvalue()).decode("ascii")


def to_prompt_embeds(
    model: Clara, question: str, *, store: Store | None = None, memory: Tensor | None = None, top_k: int | None = None
) -> PromptEmbeds:
    """See :meth:`clara_fast.Clara.to_prompt_embeds`."""
    if (store is None) == (memory is None):
        raise ValueError("to_prompt_embeds() reads from exactly one of store and memory")
    if store is not None:
        store.check_model(model)
        query = model.encode_queries([question])
        ((hits, memory),) = store.search_with_memory(query, number_to_read(model, top_k, len(store)))
        sources = [Source(hit.id, hit.score, hit.text, hit.title) for hit in hits]
    else:
        assert memory is not None
        if memory.ndim != 3:
            raise ValueError(f"memory {tuple(memory.shape)} must be [k, m, D]")
        sources = [Source(id=str(i), score=None) for i in range(len(memory))]
    ids = model.text.prompt(model.prompts, model.prompts.answer(model.text.defuse(question), len(memory)))
    slots = set(model.text.memory_ids)
    with model.inference():
        embeds = fill_prompt(model, ids, memory)
    stop = model.lm.generation_config.eos_token_id
    return PromptEmbeds(
        embeds=embeds,
        token_ids=ids,
        memory_slots=[place for place, token in enumerate(ids) if token in slots],
        stop_token_ids=list(stop) if isinstance(stop, list) else [] if stop is None else [stop],
        documents=sources,
    )
