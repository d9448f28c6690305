"""`clara-fast train` killed at any moment and started again ends as the run that nobody touched: bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys

import pytest

from clara_fast.training.checkpoints import UNFINISHED
from tests.modeling.tiny import make_base

COLOURS = ["red", "blue", "green", "black", "white", "brown"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), "mistral")


def losses(report):
    return [(entry["step"], entry["loss"]) for entry in json.loads(report.read_text())["log"] if "loss" in entry]


def weights(folder):
    files = [file for file in folder.glob("**/*.safetensors") if "checkpoint-" not in str(file)]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


# What an unbroken run of 6 steps does at least: 3 checkpoints, of which the oldest is deleted.
OPERATIONS = 130
RANDOM = [str(moment) for moment in random.sample(range(1, OPERATIONS), 4)]


@pytest.mark.parametrize(
    ("world", "moments"),
    [
        (1, ["s3", *RANDOM[:2]]),
        pytest.param(2, ["s3", *RANDOM[2:]], marks=pytest.mark.slow),
        pytest.param(1, [str(i) for i in range(1, OPERATIONS, 9)], marks=pytest.mark.slow),
    ],
)
def test_killed_and_started_again(base, tmp_path, world, moments):
    train = tmp_path / "train.jsonl"
    rows = [
        {"id": str(i), "docs": [f"The {c} door is {i}."], "question": ["Which?"], "answers": [c]}
        for i, c in enumerate(COLOURS * 2)
    ]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "small.yaml"
    config.write_text("logging_steps: 1\nuse_cpu: true\ndisable_tqdm: true\n")
    command = ["train", "scp", str(train), "--base", str(base), "--config", str(config), "--doc-max-length", "32"]
    command += ["--steps", "6", "--batch-size", str(4 // world), "--eval-every", "2", "--lora-r", "4"]
    command += ["--connector", "--learning-rate", "0.01"]
    folder = tmp_path / "runs"
    folder.mkdir()
    killer = [sys.executable, "-m", "tests.cli.killing_training", str(folder), str(world), *moments, "--", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        killer, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            printed, complaints = process.communicate(timeout=500)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, complaints[-4000:]
    print(printed)
    assert printed.split()[1::2].count("1") == len(moments), "every run was killed"
    expected = weights(folder / "unbroken")
    assert len(expected) == 3
    for moment in moments:
        assert losses(folder / f"{moment}.json") == losses(folder / "unbroken.json"), moment
        assert weights(folder / moment) == expected, moment
        left = {path.name for path in (folder / moment).iterdir() if path.is_dir()}
        assert left - {UNFINISHED} == {"compressor", "generator", "checkpoint-4", "checkpoint-6"}
