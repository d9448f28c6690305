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


class Bill:
    """What one method's work on one batch took: seconds by part, in :attr:`seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._charged: set[tuple[str, str]] = set()

    def add(self, part: str, seconds: float) -> None:
        """More time for a part."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def charge(self, part: str, text: str, seconds: float) -> None:
        """Time for a text, once however often it is needed."""
        if (part, text) not in self._charged:
            self._charged.add((part, text))
            self.add(part, seconds)


class Encoder:
    """A model's memories by text, kept until :meth:`forget`.

    Several methods of one batch read the same memories; every one of them is charged what they cost, as if it had
    come alone.
    """

    def __init__(self, model: Clara) -> None:
        self.model = model
        self._kept: dict[tuple[str, str], tuple[Tensor, float]] = {}

    def documents(self, texts: Sequence[str], bill: Bill) -> Tensor:
        """Memories ``[N, m, D]``, charged as ``compress``."""
        return self._get("compress", texts, self.model.compress, bill)

    def queries(self, questions: Sequence[str], bill: Bill) -> Tensor:
        """Memories ``[B, m, D]`` by the query reasoner, charged as ``query``."""
        return self._get("query", questions, self.model.encode_queries, bill)

    def forget(self) -> None:
        """Keep nothing for the next batch."""
        self._kept.clear()

    def _get(self, part: str, texts: Sequence[str], encode: Callable[[list[str]], Tensor], bill: Bill) -> Tensor:
        missing = [text for text in dict.fromkeys(texts) if (part, text) not in self._kept]
        if missing:
            started = now(self.model.device)
            with warnings.catch_warnings():
                # Long documents are cut by every method alike.
                warnings.filterwarnings("ignore", message=".*were cut to doc_max_length")
                memories = encode(missing)
            each = (now(self.model.device) - started) / len(missing)
            self._kept.update(((part, text), (memory, each)) for text, memory in zip(missing, memories, strict=True))
        for text in texts:
            bill.charge(part, text, self._kept[part, text][1])
        return torch.stack([self._kept[part, text][0] for text in texts])
