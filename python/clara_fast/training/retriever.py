"""The supervised variant of the retriever: InfoNCE on the query reasoner over known question-document pairs.

Documents' memories are read from a store, not computed: the compressor that wrote them is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clara_fast.data.rows import is_text, read_rows
from clara_fast.evaluation.metrics import retrieval_metrics
from clara_fast.modeling import Clara
from clara_fast.training.trainer import ClaraTrainer, ClaraTrainingArguments

if TYPE_CHECKING:
    from clara_fast.store import MemoryStore


@dataclass
class RetrieverSample:
    """A question and the rows of the store that hold its answer."""

    id: str
    question: str
    positives: list[int]


def read_questions(path: str | Path, store: MemoryStore) -> list[RetrieverSample]:
    """Read ``.jsonl`` or ``.jsonl.gz`` of ``{"id", "question", "gold_ids"}`` for the documents of ``store``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line breaks the format or names a document that the store does not hold; file and line are named.
    """
    samples = []
    for place, row in read_rows(Path(path)):
        gold = row.get("gold_ids")
        if not is_text(row.get("question")):
            raise ValueError(f"{place}: question must hold text")
        if not isinstance(gold, list) or not gold:
            raise ValueError(f"{place}: gold_ids must name at least one document")
        foreign = [name for name in gold if str(name) not in store.ids]
        if foreign:
            raise ValueError(f"{place}: gold_ids names {foreign[0]!r}, which the store {store.path} does not hold")
        rows = [store.ids[str(name)] for name in gold]
        samples.append(RetrieverSample(str(row.get("id", place)), row["question"], rows))
    if not samples:
        raise ValueError(f"{path} holds no question")
    return samples


@dataclass
class RetrieverTrainingArguments(ClaraTrainingArguments):
    """transformers' arguments, and those of this stage."""

    temperature: float = field(default=0.02, metadata={"help": "Cosines are divided by it."})
    negatives: int = field(default=1024, metadata={"help": "Documents drawn from the store against each batch."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negatives < 0:
            raise ValueError(f"negatives ({self.negatives}) must be at least 0")


class RetrieverTrainer(ClaraTrainer):
    """Trains the query reasoner so that a question's memory lies nearest to its documents' memories.

    Args:
        model: gets a query reasoner that starts as a copy of the compressor, if it has none; nothing else is trained.
        store: memories of the documents, written by this model.
        args: see :class:`RetrieverTrainingArguments`.
        train_dataset: a sequence of :class:`RetrieverSample`.
        eval_dataset: held-out questions over the same store; evaluation reports Recall@1, Recall@5 and MRR@10.
    """

    def __init__(
        self,
        model: Clara,
        store: MemoryStore,
        args: RetrieverTrainingArguments,
        train_dataset: Sequence[RetrieverSample] | None = None,
        eval_dataset: Sequence[RetrieverSample] | None = None,
        **options: Any,
    ) -> None:
        store.check_model(model)
        if "query_reasoner" not in model.roles:
            model.add_role("query_reasoner", copy_of="compressor")
        model.train_only("query_reasoner")
        self.store = store
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **options,
        )

    def _collate(self, samples: Sequence[RetrieverSample]) -> dict[str, Any]:
        wanted = sorted({row for sample in samples for row in sample.positives})
        # Seeded by the batch, not by a running state: a resumed run draws what the unbroken one drew.
        draw = torch.Generator().manual_seed(hash(tuple(wanted)) % 2**63)
        others = torch.randperm(len(self.store), generator=draw)[: self.args.negatives].tolist()
        rows = sorted({*wanted, *others})
        place = {row: i for i, row in enumerate(rows)}
        positive = torch.zeros(len(samples), len(rows), dtype=torch.bool)
        for i, sample in enumerate(samples):
            positive[i, [place[row] for row in sample.positives]] = True
        return {
            "queries": self.model.pack([sample.question for sample in samples]),
            "keys": self.store.memory(rows).flatten(1),
            "positive": positive,
            "samples": list(samples),
        }

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        query = model(queries=inputs["queries"]).query.flatten(1)
        scores = F.normalize(query.float(), dim=1) @ F.normalize(inputs["keys"].float(), dim=1).T
        loss = info_nce(scores, inputs["positive"], self.args.temperature)
        return (loss, scores) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Recall@1, Recall@5 and MRR@10 of held-out questions over the whole store."""
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        if samples is None:
            raise ValueError("evaluation needs an eval_dataset")
        queries = self.model.encode_queries([sample.question for sample in samples])
        _, rows = self.store.topk(queries, min(10, len(self.store)))
        measured = retrieval_metrics(rows.tolist(), [sample.positives for sample in samples])
        return self.report({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})


def info_nce(scores: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """``-(logsumexp(positives) - logsumexp(all))`` of cosines ``[B, N]``, averaged over questions with a positive.

    Args:
        scores: cosines ``[B, N]``.
        positive: ``[B, N]`` bool, which documents hold the answer.
        temperature: cosines are divided by it.
    """
    logits = scores / temperature
    asked = positive.any(1)
    gain = logits.masked_fill(~positive, -torch.inf).logsumexp(1) - logits.logsumexp(1)
    return -gain[asked].mean()
