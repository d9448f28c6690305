"""Memories of one batch's documents and questions, each computed once, with what each cost."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clara_fast.modeling import Clara


def now(device: torch.device) -> float:
    """Seconds on a clock, once everything that was given to ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Encoder:
    """A model's memories by text, kept until :meth:`forget`.

    Several methods of one batch read the same memories; every one of them is charged what they cost, as if it had
    come alone.
    """

    def __init__(self, model: Clara) -> None:
        self.model = model
        self._kept: dict[tuple[str, str], tuple[Tensor, float]] = {}

    def documents(self, texts: Sequence[str], seconds: dict[str, float]) -> Tensor:
        """Memories ``[N, m, D]``; their cost is added to ``seconds["compress"]``."""
        return self._get("compress", texts, self.model.compress, seconds)

    def queries(self, questions: Sequence[str], seconds: dict[str, float]) -> Tensor:
        """Memories ``[B, m, D]`` by the query reasoner; their cost is added to ``seconds["query"]``."""
        return self._get("query", questions, self.model.encode_queries, seconds)

    def forget(self) -> None:
        """Keep nothing for the next batch."""
        self._kept.clear()

    def _get(
        self, kind: str, texts: Sequence[str], encode: Callable[[list[str]], Tensor], seconds: dict[str, float]
    ) -> Tensor:
        missing = [text for text in dict.fromkeys(texts) if (kind, text) not in self._kept]
        if missing:
            started = now(self.model.device)
            with warnings.catch_warnings():
                # Long documents are cut by every method alike.
                warnings.filterwarnings("ignore", message=".*were cut to doc_max_length")
                memories = encode(missing)
            each = (now(self.model.device) - started) / len(missing)
            self._kept.update(((kind, text), (m, each)) for text, m in zip(missing, memories, strict=True))
        seconds[kind] = seconds.get(kind, 0.0) + sum(self._kept[kind, text][1] for text in set(texts))
        return torch.stack([self._kept[kind, text][0] for text in texts])
