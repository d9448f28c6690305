"""What every stage's trainer shares: transformers' Trainer on a :class:`clara_fast.Clara`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import get_last_checkpoint

from clara_fast.evaluation.answers import AnswerCheck
from clara_fast.evaluation.controls import Exam, context_losses, format_losses, loss_metrics
from clara_fast.modeling import Clara, roles
from clara_fast.training.throughput import Throughput


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
    # A loss that is not finite stops the run; this would hide it.
    logging_nan_inf_filter: bool = False


@dataclass
class AnswerTrainingArguments(ClaraTrainingArguments):
    """transformers' arguments, and those of the stages that learn from answers."""

    eval_answers: int = field(
        default=0,
        metadata={"help": "Held-out questions answered at each evaluation, for EM, F1 and cover match; slow."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_answers < 0:
            raise ValueError(f"eval_answers ({self.eval_answers}) must be at least 0")


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is NaN or infinite; ``ids`` are the samples that it came from."""

    def __init__(self, message: str, ids: Sequence[str]) -> None:
        super().__init__(message)
        self.ids = list(ids)


class ClaraTrainer(Trainer):
    """Saves and resumes adapters instead of whole models, and reports metrics of its own evaluation.

    The log has tokens per second, MFU and peak memory (:mod:`clara_fast.training.throughput`) and each trained role's
    gradient norm (before clipping) beside what transformers logs. A loss or gradient that is not finite raises
    :class:`NonFiniteError` before it changes a weight, so that the last checkpoint stays good. Batches name their
    ``samples``, which have an ``id``.
    """

    # The Trainer allows for any model, arguments and datasets; a stage has its own.
    model: Clara
    args: Any
    eval_dataset: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._samples: list[Any] = []  # of this optimizer step
        self._norms: dict[str, Tensor] = {}
        self._throughput = Throughput(self.model)
        self._busy_since: float | None = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        started = self._busy_since or time.perf_counter()
        samples = inputs["samples"]
        self._samples += samples
        self._throughput.add(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(loss.isfinite()):
            raise self._not_finite(f"the loss is {float(loss)}", self._blame(samples))
        if self.accelerator.sync_gradients:
            self._check_gradients()
            self._samples = []
        self._busy_since = time.perf_counter()
        self._throughput.seconds += self._busy_since - started
        return loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs:
            logs |= self._throughput.metrics(self.accelerator)
            logs |= {f"grad_norm_{role}": float(norm) for role, norm in self._norms.items()}
        super().log(logs, *args, **options)

    def report(self, metrics: dict[str, float]) -> dict[str, float]:
        """Log metrics and tell the callbacks, as ``Trainer.evaluate`` does."""
        self._busy_since = None  # evaluation is no training time
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _check_gradients(self) -> None:
        for role in sorted(self.model.roles & self.model.trainable):
            gradients = [p.grad for p in roles.role_parameters(self.model.lm, role).values() if p.grad is not None]
            self._norms[role] = nn.utils.get_total_norm(gradients)
        scaler = self.accelerator.scaler
        if scaler is not None:
            # Scaled gradients may overflow: the scaler leaves such a step out by itself.
            self._norms = {role: norm / scaler.get_scale() for role, norm in self._norms.items()}
        elif self._norms and not bool(torch.stack(list(self._norms.values())).isfinite().all()):
            raise self._not_finite("a gradient is not finite", [sample.id for sample in self._samples])

    def _blame(self, samples: Sequence[Any]) -> list[str]:
        """Ids of the samples whose loss alone is not finite; of all, if none is."""
        bad = []
        with self.model.inference():
            for sample in samples:
                loss: Any = self.compute_loss(self.model, self._prepare_inputs(self.data_collator([sample])))
                if not math.isfinite(float(loss)):
                    bad.append(sample.id)
        return bad or [sample.id for sample in samples]

    def _not_finite(self, what: str, ids: Sequence[str]) -> NonFiniteError:
        folder = Path(self.args.output_dir)
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        return NonFiniteError(
            f"step {self.state.global_step + 1}: {what} (samples {', '.join(ids)}); no weight was changed by it; "
            + (f"the last good checkpoint is {last}" if last else "no checkpoint was written before"),
            ids,
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Only what the base model lacks is saved, in full precision: a resumed run goes on with the same numbers."""
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder, adapter_dtype=torch.float32)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)
        self._busy_since = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        from clara_fast.modeling.checkpoint import load_weights

        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


class AnswerTrainer(ClaraTrainer):
    """The stages that learn from answers: their cross-entropy, averaged over all answer tokens of an optimizer step.

    ``mse_weight`` times the MSE of mean memory and mean text state is added.
    """

    mse_weight = 0.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # compute_loss divides by the answer tokens of the whole step, so the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True

    def model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of :meth:`Clara.forward` from a batch."""
        return {"documents": inputs["documents"], "prompts": inputs["prompts"]}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        output = model(**self.model_inputs(inputs), num_items=num_items_in_batch)
        loss = output.lm_loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        if self.mse_weight:
            parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.mse_weight * output.mse_loss / parts
        return (loss, output) if return_outputs else loss

    def examine(self, exams: Iterable[Sequence[Exam]], prefix: str) -> dict[str, float]:
        """Answer loss of held-out exams with its controls, and what the first ``eval_answers`` answers are worth.

        Every process examines all of them, so the numbers are the same everywhere.
        """
        check = AnswerCheck(self.model, self.args.eval_answers)
        losses = context_losses(self.model, check.watch(exams))
        scores = check.metrics()
        if self.is_world_process_zero():
            found = "".join(f", {name} {value:.3f}" for name, value in scores.items())
            print(f"step {self.state.global_step}: answer loss with {format_losses(losses)}{found}", flush=True)
        return {**loss_metrics(losses, prefix), **{f"{prefix}_{name}": value for name, value in scores.items()}}
