"""Salient compressor pretraining (paper section 3.1): compressor and generator learn together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from clara_fast.data.scp import ScpSample
from clara_fast.evaluation.controls import passage_exams
from clara_fast.modeling import Clara
from clara_fast.training.collation import ScpCollator
from clara_fast.training.trainer import AnswerTrainer, AnswerTrainingArguments


@dataclass
class ScpTrainingArguments(AnswerTrainingArguments):
    """transformers' arguments, and those of this stage."""

    mse_weight: float = field(default=0.1, metadata={"help": "Weight of the MSE between mean memory and text state."})
    memory_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the memory tokens; default learning_rate."}
    )
    connector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the connector; default learning_rate."}
    )
    questions: str = field(
        default="branches",
        metadata={
            "help": "'branches' asks each question by itself, 'sequence' all in one reply (the reference's way)."
        },
    )
    reconstruction: float = field(
        default=0.0, metadata={"help": "Probability that a passage is written out instead of asked about."}
    )


class ScpTrainer(AnswerTrainer):
    """Trains compressor, generator and memory tokens on ``CE + mse_weight * MSE``.

    Args:
        model: its roles compressor and generator, its memory tokens and its connector (if it has one) are trained.
        args: see :class:`ScpTrainingArguments`.
        train_dataset: a sequence of :class:`ScpSample`.
        eval_dataset: held-out samples; evaluation reports the answer loss with its controls.
    """

    def __init__(
        self,
        model: Clara,
        args: ScpTrainingArguments,
        train_dataset: Sequence[ScpSample] | None = None,
        eval_dataset: Sequence[ScpSample] | None = None,
        **options: Any,
    ) -> None:
        connector = ["connector"] if model.connector is not None else []
        model.train_only("compressor", "generator", "memory_tokens", *connector)
        collator = ScpCollator(model, questions=args.questions, reconstruction=args.reconstruction, seed=args.seed)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **options,
        )
        self.mse_weight = args.mse_weight

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            clara: Any = self.model
            args = self.args
            special = {
                "memory_embeddings": args.memory_learning_rate,
                "connector": args.connector_learning_rate,
            }
            groups: dict[float, list[nn.Parameter]] = {}
            for name, parameter in clara.named_parameters():
                if parameter.requires_grad:
                    rate = special.get(name.split(".")[0])
                    rate = args.learning_rate if rate is None else rate
                    groups.setdefault(rate, []).append(parameter)
            cls, options = self.get_optimizer_cls_and_kwargs(args, clara)
            options.pop("lr", None)
            settings = [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
            self.optimizer = cls(settings, lr=args.learning_rate, weight_decay=args.weight_decay, **options)
        return self.optimizer

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer loss of held-out samples and its controls (:func:`clara_fast.evaluation.controls.context_losses`)."""
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        if samples is None:
            raise ValueError("evaluation needs an eval_dataset")
        exams = passage_exams(self.model, samples, batch_size=self.args.per_device_eval_batch_size)
        return self.report(self.examine(exams, metric_key_prefix))
