"""A trainer's checkpoints: folders ``checkpoint-N`` that are whole or absent, whatever is killed when."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

PREFIX = "checkpoint-"
TRAINER_STATE_NAME = "trainer_state.json"
# Where a checkpoint is written before it is renamed into its place, and goes before it is deleted.
UNFINISHED = ".unfinished"
_STAGE_FILE = "stage.json"


def last_checkpoint(out: Path) -> Path | None:
    """The checkpoint of the latest step in ``out``, if there is one.

    A Trainer that knows nothing of whole folders writes its state last: without it, a checkpoint does not count.
    """
    whole = [path for path in _checkpoints(out) if (path / TRAINER_STATE_NAME).is_file()]
    return max(whole, key=_step, default=None)


def write_stage(checkpoint: Path, stage: str) -> None:
    """Note which stage's checkpoint it is."""
    (checkpoint / _STAGE_FILE).write_text(json.dumps({"stage": stage}) + "\n")


def check_stage(checkpoint: Path, stage: str) -> None:
    """Raise ``ValueError`` if another stage wrote the checkpoint: its weights would fit, and mean something else."""
    file = checkpoint / _STAGE_FILE
    written = json.loads(file.read_text())["stage"] if file.is_file() else stage
    if written != stage:
        raise ValueError(f"stage ({stage}) must be {written}")


def clear_unfinished(out: Path) -> None:
    """Remove what a killed process left behind."""
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)


def publish(out: Path, name: str) -> None:
    """Move the checkpoint ``name`` from ``out/.unfinished``, where its files are synced, to ``out``."""
    written, place = out / UNFINISHED / name, out / name
    for file in written.rglob("*"):
        _sync(file)
    _sync(written)
    if place.exists():
        _discard(out, place)
    os.replace(written, place)
    _sync(out)


def rotate(out: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Delete the oldest checkpoints until ``limit`` are left; those to ``keep`` stay."""
    kept = {path.name for path in keep}
    old = sorted((path for path in _checkpoints(out) if path.name not in kept), key=_step)
    for path in old[: max(0, len(old) + len(kept) - limit)] if limit else []:
        _discard(out, path)


def _checkpoints(out: Path) -> list[Path]:
    return [path for path in out.glob(f"{PREFIX}*") if path.is_dir() and path.name.removeprefix(PREFIX).isdecimal()]


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _discard(out: Path, path: Path) -> None:
    # Renamed first: half a checkpoint must not be seen as one.
    grave = out / UNFINISHED / f"deleted-{path.name}"
    grave.parent.mkdir(exist_ok=True)
    os.replace(path, grave)
    shutil.rmtree(grave, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
