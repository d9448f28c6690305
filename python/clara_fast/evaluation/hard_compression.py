"""Shortening text by leaving tokens or words out: what memories are compared with at the same budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from clara_fast.evaluation.protocol import EvalSample

if TYPE_CHECKING:
    from clara_fast.modeling import Clara

Shortener = Callable[[str], str]
LLMLINGUA_MODEL = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank"
# llmlingua tells by the name where a tokenizer's words begin.
LLMLINGUA_FAMILIES = ("xlm-roberta-large", "bert-base-multilingual-cased")


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


def llmlingua2(model: Clara, name: str | None = None, rate: float | None = None) -> Shortener:
    """LLMLingua-2: a token classifier gives every word a probability of being kept, and the most probable are.

    Args:
        model: says how many tokens a text may keep, and the device.
        name: name or folder of the classifier; default the published one.
        rate: keep one token in so many; default as many as ``model`` has memory tokens. Both are counted as llmlingua
            counts: in GPT-3.5's tokens, of whole words.

    Raises:
        ImportError: llmlingua is not installed.
        ValueError: the classifier cannot be loaded, or is none that llmlingua knows.
    """
    if rate is not None and not rate >= 1:
        raise ValueError(f"llmlingua_rate ({rate}) must be at least 1: one token in so many is kept")
    compressor = _llmlingua(name or LLMLINGUA_MODEL, str(model.device))
    budget = {"target_token": model.config.num_memory} if rate is None else {"rate": 1 / rate}

    def shorten(text: str) -> str:
        return str(compressor.compress_prompt_llmlingua2([text], **budget)["compressed_prompt"])

    return shorten


def _llmlingua(name: str, device: str) -> Any:
    if not any(family in name for family in LLMLINGUA_FAMILIES):
        raise ValueError(f"llmlingua_model ({name}) must have {' or '.join(LLMLINGUA_FAMILIES)} in its name")
    try:
        import tiktoken
        from llmlingua import PromptCompressor
    except ImportError:
        raise ImportError("method 'llmlingua2' needs llmlingua: pip install 'clara-fast[llmlingua]'") from None
    try:
        tiktoken.encoding_for_model("gpt-3.5-turbo")
    except OSError as error:  # downloaded once, unless it lies in the folder that the variable names
        raise ValueError(
            f"llmlingua counts in a vocabulary of tiktoken ($TIKTOKEN_CACHE_DIR): {_line(error)}"
        ) from None
    try:
        return PromptCompressor(name, device, {"trust_remote_code": False}, use_llmlingua2=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"llmlingua_model ({name}) cannot be loaded: {_line(error)}") from None


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
