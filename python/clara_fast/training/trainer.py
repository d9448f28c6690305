"""What every stage's trainer shares: transformers' Trainer on a :class:`clara_fast.Clara`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, save_fsdp_optimizer
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME

from clara_fast.evaluation.answers import AnswerCheck
from clara_fast.evaluation.controls import Exam, context_losses, format_losses, loss_metrics
from clara_fast.modeling import Clara, roles
from clara_fast.modeling.sharding import is_sharded, whole
from clara_fast.training import checkpoints
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
    # What is frozen is told by requires_grad, and all that is not takes part in every step.
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        # Unless told so, transformers on a machine without accelerator lets each of several processes train by itself.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


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
    :class:`NonFiniteError`, in all processes, before it changes a weight, so that the last checkpoint stays good.
    Batches name their ``samples``, which have an ``id``.

    A checkpoint is written beside its place and renamed when all processes have written their part: it is whole or
    absent.
    """

    # The Trainer allows for any model, arguments and datasets; a stage has its own.
    model: Clara
    args: Any
    eval_dataset: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        if isinstance(options.get("eval_dataset"), Mapping):
            raise ValueError("eval_dataset must be one sequence of samples: call evaluate() for each, with a prefix")
        super().__init__(*args, **options)
        self._batches: list[tuple[list[Any], Tensor]] = []  # samples and loss of each in this optimizer step
        self._norms: dict[str, Tensor] = {}
        self._throughput = Throughput(self.model)
        self._busy_since: float | None = None
        self._staging: Path | None = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        started = self._busy_since or time.perf_counter()
        samples = inputs["samples"]
        self._throughput.add(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._batches.append((samples, loss))
        if self.accelerator.sync_gradients:
            self._check_step()
            self._batches = []
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

    # Numbers that went wrong

    def _check_step(self) -> None:
        """Raise in every process if a loss or a gradient is not finite in any."""
        self._norms = {
            role: whole(nn.utils.get_total_norm([p.grad for p in self._trained(role) if p.grad is not None]))
            for role in sorted(self.model.roles & self.model.trainable)
        }
        losses = torch.stack([loss for _, loss in self._batches])
        bad = [~losses.isfinite().all(), losses.new_zeros((), dtype=torch.bool)]
        scaler = self.accelerator.scaler
        if scaler is not None:
            # Scaled gradients may overflow: the scaler leaves such a step out by itself.
            self._norms = {role: norm / scaler.get_scale() for role, norm in self._norms.items()}
        elif self._norms:
            bad[1] = ~torch.stack(list(self._norms.values())).isfinite().all()
        bad_loss, bad_gradient = self.accelerator.reduce(torch.stack(bad).float()).tolist()
        if bad_loss:
            suspects = [sample for samples, loss in self._batches if not loss.isfinite() for sample in samples]
            value = next((float(loss) for loss in losses if not loss.isfinite()), None)
            found = gather_object([(value, self._blame(suspects), [sample.id for sample in suspects])])
            value = next(value for value, _, _ in found if value is not None)
            blamed = [name for _, names, _ in found for name in names]
            raise self._not_finite(f"the loss is {value}", blamed or [n for _, _, names in found for n in names])
        if bad_gradient:
            ids = gather_object([sample.id for samples, _ in self._batches for sample in samples])
            raise self._not_finite("a gradient is not finite", ids)

    def _trained(self, role: str) -> list[nn.Parameter]:
        return list(roles.role_parameters(self.model.lm, role).values())

    def _blame(self, suspects: Sequence[Any]) -> list[str]:
        """Ids of the samples whose loss alone is not finite.

        A pass through a sharded model needs every process: those with fewer suspects compute some again.
        """
        bad = []
        count = torch.tensor([len(suspects)], device=self.args.device)
        some = suspects or self._batches[0][0]
        with self.model.inference():
            for i in range(int(self.accelerator.gather(count).max())):
                sample = some[i % len(some)]
                loss: Any = self.compute_loss(self.model, self._prepare_inputs(self.data_collator([sample])))
                if i < len(suspects) and not math.isfinite(float(loss)):
                    bad.append(sample.id)
        return bad

    def _not_finite(self, what: str, ids: Sequence[str]) -> NonFiniteError:
        last = checkpoints.last_checkpoint(Path(self.args.output_dir))
        return NonFiniteError(
            f"step {self.state.global_step + 1}: {what} (samples {', '.join(ids)}); no weight was changed by it; "
            + (f"the last good checkpoint is {last}" if last else "no checkpoint was written before"),
            ids,
        )

    # Several processes, and checkpoints

    def train(self, *args: Any, **options: Any) -> Any:
        """As ``Trainer.train``; every process starts from the weights of the first (as DDP has it, and FSDP2 not)."""
        if self.accelerator.num_processes > 1:
            for parameter in self.model.parameters():
                if parameter.requires_grad and not is_sharded(parameter):
                    value = parameter.data.to(self.args.device)
                    torch.distributed.broadcast(value, 0)
                    parameter.data.copy_(value)
        result = super().train(*args, **options)
        last = checkpoints.last_checkpoint(Path(self.args.output_dir))
        if self.args.should_save and last is not None:  # a kill may have come between a checkpoint and its rotation
            self._rotate(last)
        return result

    def _run_epoch(self, *args: Any, **options: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
            # Taken up again after its last step: transformers would look at that only after one more.
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        out, args = Path(self._get_output_dir(trial)), self.args
        name = f"{checkpoints.PREFIX}{self.state.global_step}"
        staging = out / checkpoints.UNFINISHED
        if self.is_local_process_zero():
            checkpoints.clear_unfinished(out)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == staging:
            self.state.best_model_checkpoint = str(out / Path(best).name)
            if args.should_save:
                self.state.save_to_json(str(staging / name / checkpoints.TRAINER_STATE_NAME))
        if args.should_save:
            checkpoints.write_stage(staging / name, type(self).__name__)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            checkpoints.publish(out, name)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and (staging / name).exists():  # another machine with a disk of its own
            checkpoints.publish(out, name)
        if args.should_save:
            self._rotate(out / name)

    def _rotate(self, last: Path) -> None:
        best = self.state.best_model_checkpoint
        checkpoints.rotate(last.parent, self.args.save_total_limit, {last, *([Path(best)] if best else [])})
        checkpoints.clear_unfinished(last.parent)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only what the base model lacks is saved, in full precision: a resumed run goes on with the same numbers."""
        folder = Path(str(output_dir or self.args.output_dir))
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder, adapter_dtype=torch.float32, is_main_process=self.args.should_save)
        if self.args.should_save:
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
        self._busy_since = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # transformers would save the whole base model as well.
        accelerator = self.accelerator
        save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        from clara_fast.modeling.checkpoint import load_weights

        folder = Path(resume_from_checkpoint)
        with _of_this_run(resume_from_checkpoint):
            checkpoints.check_stage(folder, type(self).__name__)
            load_weights(self.model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _of_this_run(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


@contextmanager
def _of_this_run(checkpoint: str | None) -> Iterator[None]:
    """Say what it means if a checkpoint does not fit."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"{checkpoint} is of another run, so this one cannot go on from it: choose another output folder ({error})"
        ) from None


class AnswerTrainer(ClaraTrainer):
    """The stages that learn from answers: their cross-entropy, averaged over all answer tokens of an optimizer step.

    ``mse_weight`` times the MSE of mean memory and mean text state is added, averaged over all documents of the step.
    """

    mse_weight = 0.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # compute_loss divides by the answer tokens of the whole step, so the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self._num_documents: Any = None  # of the whole step, likewise

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.mse_weight and num_items is not None:
            count = torch.tensor(sum(len(batch["documents"]) for batch in batches), device=device)
            whole_step = self.args.average_tokens_across_devices
            self._num_documents = self.accelerator.gather(count).sum() if whole_step else count
        return batches, num_items

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
        loss, mse = output.lm_loss, output.mse_loss
        if self.mse_weight:
            if num_items_in_batch is not None:
                mse = mse * (len(inputs["documents"]) / self._num_documents)
            loss = loss + self.mse_weight * mse
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients and logged losses are averaged over processes
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
