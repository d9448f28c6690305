"""`clara-fast train` killed at any moment and started again ends as the run that nobody touched: bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch

from clara_fast.cli import main
from clara_fast.training import checkpoints
from clara_fast.training.trainer import ClaraTrainer
from tests.modeling.tiny import make_base
from tests.ranks import run_ranks

COLOURS = ["red", "blue", "green", "black", "white", "brown"]
# What an unbroken run of 6 steps does at least: 3 checkpoints, of which the oldest is deleted.
OPERATIONS = 130
RANDOM = [str(moment) for moment in random.sample(range(1, OPERATIONS), 2)]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str) -> None:
    """Arrange for SIGKILL before the file operation of saving of that number.

    Or for ``sN`` in the middle of step N, and for ``deleting`` when an old checkpoint is about to be.
    """
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == int(moment):
                die()
            return function(*args, **kwargs)

        return call

    if moment.startswith("s"):
        check = ClaraTrainer._check_step

        def dying(trainer):
            check(trainer)
            if trainer.state.global_step + 1 == int(moment[1:]):
                die()

        ClaraTrainer._check_step = dying
        return
    if moment == "deleting":
        checkpoints._discard = lambda *_: die()
        return
    os.replace = counted(os.replace)
    os.rmdir = counted(os.rmdir)  # the last of what deletes a folder
    os.fsync = counted(lambda descriptor: None)  # a killed process loses nothing that was written: skip the wait
    torch.save = counted(torch.save)


def train(out: Path, arguments: list[str], moment: str | None) -> None:
    """The command with ``--out OUT``, in this process; its report is ``OUT.json``. The first one dies at ``moment``."""
    first = os.environ.get("RANK", "0") == "0"
    if moment is not None and first:
        die_at(moment)
    with open(out.with_suffix(".json") if first else os.devnull, "w") as report, contextlib.redirect_stdout(report):
        code = main(["train", *arguments, "--out", str(out), "--json"])
    assert code == 0


def losses(report):
    return [(entry["step"], entry["loss"]) for entry in json.loads(report.read_text())["log"] if "loss" in entry]


def weights(folder):
    files = [file for file in folder.glob("**/*.safetensors") if "checkpoint-" not in str(file)]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("world", "moments"),
    [
        (1, ["s3", "deleting", RANDOM[0]]),
        pytest.param(2, ["s3", "deleting", RANDOM[1]], marks=pytest.mark.slow),
        pytest.param(1, [str(i) for i in range(1, OPERATIONS, 9)], marks=pytest.mark.slow),
    ],
    ids=["one", "two", "sweep"],
)
def test_killed_and_started_again(tmp_path, world, moments):
    data = tmp_path / "train.jsonl"
    rows = [
        {"id": str(i), "docs": [f"The {c} door is {i}."], "question": ["Which?"], "answers": [c]}
        for i, c in enumerate(COLOURS * 2)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "small.yaml"
    config.write_text("logging_steps: 1\nuse_cpu: true\ndisable_tqdm: true\n")
    base = make_base(tmp_path / "base", "mistral")
    arguments = ["scp", str(data), "--base", str(base), "--config", str(config), "--doc-max-length", "32"]
    arguments += ["--steps", "6", "--batch-size", str(4 // world), "--eval-every", "2", "--lora-r", "4"]
    arguments += ["--connector", "--learning-rate", "0.01"]

    def run(name, moment=None):
        return run_ranks(world, train, tmp_path / name, arguments, moment, log=tmp_path / f"{name}.log")

    assert run("unbroken")
    expected = weights(tmp_path / "unbroken")
    assert len(expected) == 3
    for moment in moments:
        print("killed at", moment)
        assert not run(moment, moment), "nothing was left to be killed at"
        assert run(moment)
        assert losses(tmp_path / f"{moment}.json") == losses(tmp_path / "unbroken.json")
        assert weights(tmp_path / moment) == expected
        left = {path.name for path in (tmp_path / moment).iterdir() if path.is_dir()}
        assert left == {"compressor", "generator", "checkpoint-4", "checkpoint-6"}
