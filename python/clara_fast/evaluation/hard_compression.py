"""Shortening text by leaving tokens out: what memories are compared with at the same budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from clara_fast.evaluation.protocol import EvalSample

if TYPE_CHECKING:
    from clara_fast.modeling import Clara

Shortener = Callable[[str], str]
LLMLINGUA_MODEL = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank"


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


class LLMLingua:
    """LLMLingua-2: a token classifier says which tokens to keep.

    Args:
        rate: tokens in the text per token that is kept.
        name: name or folder of the classifier.

    Raises:
        ImportError: llmlingua is not installed.
        ValueError: there is no such classifier.
    """

    def __init__(self, rate: int, name: str | None = None) -> None:
        try:
            from llmlingua import PromptCompressor
        except ImportError:
            raise ImportError("method 'llmlingua2' needs llmlingua: pip install 'clara-fast[llmlingua]'") from None
        try:
            self._compressor = PromptCompressor(name or LLMLINGUA_MODEL, use_llmlingua2=True, device_map="cpu")
        except (OSError, ValueError) as error:
            raise ValueError(f"llmlingua_model ({name or LLMLINGUA_MODEL}) cannot be loaded: {error}") from error
        self._share = 1 / rate

    def __call__(self, text: str) -> str:
        return str(self._compressor.compress_prompt([text], rate=self._share)["compressed_prompt"])


def _ids(model: Clara, text: str) -> list[int]:
    return list(model.tokenizer(model.text.defuse(text), add_special_tokens=False)["input_ids"])
