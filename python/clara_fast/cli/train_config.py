"""``--config`` of the training commands: YAML with options of the command and arguments of transformers.

What is given on the command line counts before the file, and the file before the command's defaults.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

# Arguments of transformers that the commands have options for, under shorter names; and --eval, which is no name.
OPTION_OF = {
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "eval_steps": "eval_every",
    "output_dir": "out",
    "eval": "eval_file",
}
_ARGUMENTS = "clara_fast.training_arguments"


def _read(context: typer.Context, value: str | None) -> str | None:
    """Put the file's options in the place of the command's defaults, and keep its other arguments."""
    if value is None:
        return None
    content = {key.replace("-", "_"): setting for key, setting in read_config(value).items()}
    names = {parameter.name for parameter in context.command.params}
    options = {OPTION_OF.get(key, key): setting for key, setting in content.items()}
    context.default_map = {**(context.default_map or {}), **{k: v for k, v in options.items() if k in names}}
    context.meta[_ARGUMENTS] = {k: v for k, v in content.items() if OPTION_OF.get(k, k) not in names}
    return value


ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        callback=_read,
        is_eager=True,
        help="YAML of options and of transformers' training arguments: a file, or the name of one that comes along "
        "(clara-fast train configs lists them).",
    ),
]


def arguments_of(context: typer.Context) -> dict[str, Any]:
    """What the file says beyond the command's options: arguments for transformers."""
    return dict(context.meta.get(_ARGUMENTS, {}))


def make_arguments(cls: type[Any], settings: dict[str, Any], config: str | None) -> Any:
    """Training arguments of a stage.

    Raises ``ValueError`` naming settings that neither it nor transformers has, and texts in the place of numbers.
    """
    known = cls.__dataclass_fields__
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{config} sets {', '.join(unknown)}: neither an option of this command nor of transformers")
    for name, value in settings.items():
        if known[name].type in (int, float, "int", "float") and not isinstance(value, int | float):
            raise ValueError(f"{config} sets {name} ({value!r}), which must be a number")
    return cls(**settings)


def shipped_configs() -> dict[str, Path]:
    """The configurations that come along, by name."""
    folder = Path(str(files("clara_fast") / "assets" / "configs"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def read_config(name: str) -> dict[str, Any]:
    """The settings in a file, or in a configuration that comes along.

    Raises:
        FileNotFoundError: it is neither.
        ValueError: the file is no YAML mapping.
    """
    import yaml

    file = Path(name)
    if not file.is_file():
        known = shipped_configs()
        if name not in known:
            raise FileNotFoundError(f"config {name} is neither a file nor one of {', '.join(known)}")
        file = known[name]
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a mapping of training arguments")
    return {key: _number(value) for key, value in content.items()}


def _number(value: Any) -> Any:
    """YAML reads 1e-4 (without a point) as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
