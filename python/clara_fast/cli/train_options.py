"""What all training commands have in common: their options, what those say to transformers, and the run."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from clara_fast.cli.models import BaseModelOption, DtypeOption, JsonOption, check_dtype
from clara_fast.cli.output import note, print_json
from clara_fast.cli.train_config import ConfigOption, arguments_of, make_arguments

# Options whose defaults are the stage's own.
BatchSizeOption = Annotated[int, typer.Option(help="Samples in a batch, of each process.")]
LearningRateOption = Annotated[float, typer.Option(help="Learning rate of what the stage trains.")]
# Of the stages that learn from answers.
EvalSamplesOption = Annotated[int, typer.Option(help="Held-out samples to evaluate on.")]
AnswersOption = Annotated[
    int, typer.Option(help="Held-out questions to answer at each evaluation, for EM, F1 and cover match (slow).")
]


@dataclass(kw_only=True)
class CommonOptions:
    """The options. ``extra`` is what ``--config`` says beyond them, ``given`` names those on the command line."""

    out: Annotated[Path, typer.Option(help="Folder for the model and its checkpoints; an unfinished run resumes.")]
    base_model: BaseModelOption = None
    eval_file: Annotated[Path | None, typer.Option("--eval", help="Held-out samples, the same format.")] = None
    steps: Annotated[int, typer.Option(help="Optimizer steps; -1: as many as --epochs makes.")] = -1
    epochs: Annotated[float, typer.Option(help="Passes over the data, if --steps is not given.")] = 1.0
    accumulate: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations and checkpoints.")] = 100
    report_to: Annotated[
        str, typer.Option(help="Where the log goes too: tensorboard, wandb, ... (comma-separated).")
    ] = "none"
    dtype: DtypeOption = "auto"
    seed: Annotated[int, typer.Option(help="Of order, dropout and targets.")] = 0
    config: ConfigOption = None
    json: JsonOption = False
    extra: dict[str, Any] = field(default_factory=dict)
    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        _at_least_one(accumulate=self.accumulate, eval_every=self.eval_every)
        if self.steps < 1 and self.steps != -1:
            raise ValueError(f"steps ({self.steps}) must be at least 1, or -1 for as many as --epochs makes")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs ({self.epochs}) must be above 0 and finite")
        if self.out.exists() and not self.out.is_dir():
            raise NotADirectoryError(f"out ({self.out}) is a file: it must be a folder, or nothing yet")

    def arguments(self, cls: type[Any], *, batch_size: int, learning_rate: float, **of_the_stage: Any) -> Any:
        """A stage's training arguments, of the class ``cls``."""
        _at_least_one(batch_size=batch_size)
        if not 0 <= learning_rate < math.inf:
            raise ValueError(f"learning_rate ({learning_rate}) must be at least 0 and finite")
        evaluate = self.eval_file is not None
        settings = {
            "output_dir": str(self.out),
            "max_steps": self.steps,
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": batch_size,
            "gradient_accumulation_steps": self.accumulate,
            "learning_rate": learning_rate,
            "eval_strategy": "steps" if evaluate else "no",
            "eval_on_start": evaluate,
            "eval_steps": self.eval_every,
            "save_steps": self.eval_every,
            "save_total_limit": 2,
            "logging_steps": 10,
            "report_to": reports(self.report_to),
            "seed": self.seed,
        }
        return make_arguments(cls, {**settings, **of_the_stage, **self.extra}, self.config)

    def held_out(self, read: Callable[..., list[Any]], *args: Any, **options: Any) -> list[Any] | None:
        """The samples of ``--eval``, if it was given; a ``limit`` is ``--eval-samples``."""
        _at_least_one(eval_samples=options.get("limit", 1))
        return None if self.eval_file is None else read(self.eval_file, *args, **options)

    def run(self, trainer: Any, then: str) -> None:
        """Train, going on from the last checkpoint in ``out`` if there is one, and save the model there."""
        from clara_fast.training.checkpoints import last_checkpoint

        last = last_checkpoint(self.out)
        # The Trainer logs to stdout, which is for results.
        with contextlib.redirect_stdout(sys.stderr):
            try:
                trainer.train(resume_from_checkpoint=str(last) if last else None)
            except BaseException:
                print()  # the error gets a line of its own, below the progress bar
                raise
        first = trainer.is_world_process_zero()
        trainer.model.save_pretrained(self.out, is_main_process=first)
        if not first:
            return
        if self.json:
            print_json({"model": str(self.out), "steps": trainer.state.global_step, "log": trainer.state.log_history})
        note(f"saved to {self.out}; next: {then}")


def with_common_options(stage: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of ``stage``, whose first argument is the :class:`CommonOptions`, and those."""
    hints = get_type_hints(CommonOptions, include_extras=True)
    common = [
        inspect.Parameter(
            option.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[option.name],
            default=inspect.Parameter.empty if option.name == "out" else option.default,
        )
        for option in fields(CommonOptions)
        if option.name not in ("extra", "given")
    ]
    first = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    own = list(inspect.signature(stage, eval_str=True).parameters.values())[1:]
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    parameters = [first, *own, *common]

    @wraps(stage)
    def command(context: typer.Context, **options: Any) -> None:
        shared = {option.name: options.pop(option.name) for option in common}
        names = [parameter.name for parameter in context.command.params if parameter.name is not None]
        sources = {name: context.get_parameter_source(name) for name in names}
        given = frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE")
        stage(CommonOptions(**shared, extra=arguments_of(context), given=given), **options)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _at_least_one(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")


def reports(names: str) -> list[str]:
    """The names in a list; raises ``ValueError`` or ``ImportError`` for one that transformers could not report to."""
    from transformers import integrations

    wanted = [name for name in names.replace(" ", "").split(",") if name not in ("", "none")]
    known = integrations.integration_utils.INTEGRATION_TO_CALLBACK
    for name in wanted:
        if name not in known:
            raise ValueError(f"report_to ({name}) must be none or some of {', '.join(sorted(known))}")
        if name not in integrations.get_available_reporting_integrations():
            extra = name if name in ("tensorboard", "wandb") else None
            how = f"clara-fast[{extra}]" if extra else name
            raise ImportError(f"report_to ({name}) needs a package that is not installed: pip install {how}")
    return wanted or ["none"]
