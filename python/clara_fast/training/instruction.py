"""Instruction tuning (stage 1_2 of the paper): the compressor learns what questions on several documents ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from clara_fast.data.questions import QuestionSample
from clara_fast.evaluation.controls import Exam, even_batches
from clara_fast.modeling import Clara
from clara_fast.training.collation import InstructionCollator
from clara_fast.training.trainer import AnswerTrainer, AnswerTrainingArguments


@dataclass
class InstructionTrainingArguments(AnswerTrainingArguments):
    """transformers' arguments, and those of this stage."""

    mse_weight: float = field(default=0.1, metadata={"help": "Weight of the MSE between mean memory and text state."})
    num_documents: int = field(default=5, metadata={"help": "Documents read per question, at most."})
    fresh_generator: bool = field(default=True, metadata={"help": "Start the generator anew, as the paper does."})


class InstructionTrainer(AnswerTrainer):
    """Trains the compressor and a fresh generator on ``CE + mse_weight * MSE``; all else is frozen.

    Every question is asked on its own ``num_documents`` documents at once; the answer is the teacher's, where there is
    one.

    Args:
        model: pretrained; its generator starts anew unless ``args.fresh_generator`` is off.
        args: see :class:`InstructionTrainingArguments`.
        train_dataset: a sequence of :class:`QuestionSample`.
        eval_dataset: held-out samples; evaluation reports the answer loss with its controls.

    Raises:
        ValueError: a sample has no document.
    """

    def __init__(
        self,
        model: Clara,
        args: InstructionTrainingArguments,
        train_dataset: Sequence[QuestionSample] | None = None,
        eval_dataset: Sequence[QuestionSample] | None = None,
        **options: Any,
    ) -> None:
        if args.num_documents < 1:
            raise ValueError(f"num_documents ({args.num_documents}) must be at least 1")
        for sample in [*(train_dataset or ()), *(eval_dataset or ())]:
            if not sample.documents:
                raise ValueError(f"sample {sample.id} has no document to answer from")
        model.train_only("compressor", "generator")
        super().__init__(
            model=model,
            args=args,
            data_collator=InstructionCollator(model, args.num_documents),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **options,
        )
        self.mse_weight = args.mse_weight
        if args.fresh_generator:  # after the Trainer has seeded the random numbers
            model.reset_role("generator")

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer loss of held-out samples and its controls (:func:`clara_fast.evaluation.controls.context_losses`)."""
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        if samples is None:
            raise ValueError("evaluation needs an eval_dataset")
        return self.report(self.examine(self._exams(samples), metric_key_prefix))

    def _exams(self, samples: Sequence[QuestionSample]) -> Iterable[list[Exam]]:
        model = self.model
        for batch in even_batches(samples, self.args.per_device_eval_batch_size):
            read = [[s.documents[i] for i in s.chosen(self.args.num_documents)] for s in batch]
            packed = model.pack([document for documents in read for document in documents]).to(model.device)
            memory, _ = model.encode(packed, "compressor")
            yield [
                Exam([s.exchange(teacher=True)], [model.text.readable(d) for d in documents], own, [s.answers])
                for s, documents, own in zip(batch, read, memory.split([len(r) for r in read]), strict=True)
            ]
