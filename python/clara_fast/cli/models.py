"""Options that name a model, and loading it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clara_fast.cli.output import stderr

if TYPE_CHECKING:
    from clara_fast.modeling import Clara
    from clara_fast.store import MemoryStore

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Clara model: folder or hub name. A store remembers the one that wrote it."),
]
SubfolderOption = Annotated[str | None, typer.Option(help="Folder of the model inside its hub repository.")]
BaseModelOption = Annotated[
    str | None,
    typer.Option(help="Base model to put the adapters on, instead of the one that the model names."),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.")]
DtypeOption = Annotated[str, typer.Option(help="Of the base model: auto, float32, bfloat16 or float16.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout, and nothing else there.")]


@dataclass(frozen=True)
class ModelChoice:
    """Which model the options of a command name.

    ``where`` are keyword arguments of ``Clara.from_pretrained``; empty if ``--model`` was not given.
    """

    where: dict[str, str]
    device: str | None = None
    dtype: str = "auto"

    @classmethod
    def of(
        cls, model: str | None, subfolder: str | None, base_model: str | None, device: str | None, dtype: str
    ) -> ModelChoice:
        """From a command's options; folders become absolute, so that a store can remember them."""
        named = {"name_or_path": model, "subfolder": subfolder, "base_model": base_model}
        where = {key: _absolute(value) if key != "subfolder" else value for key, value in named.items() if value}
        check_dtype(dtype)
        return cls(where, device, dtype)

    def or_of(self, store: MemoryStore) -> ModelChoice:
        """The same, filled up with what ``store`` remembers of the model that wrote it."""
        remembered = {} if "name_or_path" in self.where else store.model.loaded_from
        return ModelChoice({**remembered, **self.where}, self.device, self.dtype)

    def load(self) -> tuple[Clara, float]:
        """The model, and the seconds that loading took, imports included."""
        if "name_or_path" not in self.where:
            raise ValueError("--model is missing: name the folder or hub name of a Clara model")
        started = time.perf_counter()
        with stderr.status(f"loading {self.where['name_or_path']}"):
            quiet_libraries()
            from clara_fast.modeling import Clara

            options: dict[str, Any] = {**self.where, "device": self.device, "dtype": self.dtype}
            model = Clara.from_pretrained(options.pop("name_or_path"), **options)
        return model, time.perf_counter() - started


def check_dtype(dtype: str) -> None:
    """Raise ``ValueError`` for what ``--dtype`` may not be."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype ({dtype}) must be auto, float32, bfloat16 or float16")


def quiet_libraries() -> None:
    """No progress bars and notices of transformers: they are about its insides."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
