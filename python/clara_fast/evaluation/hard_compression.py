"""Shortening text by leaving tokens out: what memories are compared with at the same budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from clara_fast.evaluation.protocol import EvalSample

if TYPE_CHECKING:
    from clara_fast.modeling import Clara

Shortener = Callable[[str], str]


def rarest_tokens(model: Clara, samples: Iterable[EvalSample]) -> Shortener:
    """Keeps of a text the ``num_memory`` tokens that are rarest in all samples' documents, in their order.

    It needs no training, and shows what a budget of so many tokens is worth.
    """
    counts: Counter[int] = Counter()
    for text in dict.fromkeys(text for sample in samples for text in sample.documents):
        counts.update(_ids(model, text))

    def shorten(text: str) -> str:
        ids = _ids(model, text)
        kept = sorted(range(len(ids)), key=lambda i: (counts[ids[i]], i))[: model.config.num_memory]
        return str(model.tokenizer.decode([ids[i] for i in sorted(kept)]))

    return shorten


def _ids(model: Clara, text: str) -> list[int]:
    return list(model.tokenizer(model.text.defuse(text), add_special_tokens=False)["input_ids"])
