"""What every stage's trainer shares: transformers' Trainer on a :class:`clara_fast.Clara`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from clara_fast.modeling import Clara


@dataclass
class ClaraTrainingArguments(TrainingArguments):
    """transformers' arguments, with the paper's settings as defaults."""

    learning_rate: float = 1e-4
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"min_lr_rate": 0.1})
    warmup_steps: float = 0.03
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    # Batches hold packed sequences, whose fields the Trainer does not know.
    remove_unused_columns: bool = False


class ClaraTrainer(Trainer):
    """Saves and resumes adapters instead of whole models, and reports metrics of its own evaluation."""

    # The Trainer allows for any model, arguments and datasets; a stage has its own.
    model: Clara
    args: Any
    eval_dataset: Any

    def report(self, metrics: dict[str, float]) -> dict[str, float]:
        """Log metrics and tell the callbacks, as ``Trainer.evaluate`` does."""
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Only what the base model lacks is saved, in full precision: a resumed run goes on with the same numbers."""
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder, adapter_dtype=torch.float32)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        from clara_fast.modeling.checkpoint import load_weights

        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
