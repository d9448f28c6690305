"""Kills ``clara-fast train``: ``python -m tests.cli.killing_training FOLDER WORLD MOMENTS... -- ARGUMENTS...``.

Runs the command with ``--out FOLDER/unbroken``, then for each moment with ``--out FOLDER/MOMENT``: SIGKILL before the
first process's file operation of that number, or ``sN``: in the middle of step N; and again, until it ends by itself.
Each run's ``--json`` report is ``NAME.json``. Prints how often each was killed. Forked from one process: torch is
imported once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

import torch
from accelerate import PartialState

import clara_fast.modeling.checkpoint
import clara_fast.modeling.clara
import clara_fast.training  # noqa: F401 - what the children would import
from clara_fast.cli import main
from clara_fast.training.trainer import ClaraTrainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str) -> None:
    """Arrange for SIGKILL before a file operation of saving, counted from 1, or after the passes of a step."""
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
    os.replace = counted(os.replace)
    os.rmdir = counted(os.rmdir)  # the last of what deletes a folder
    os.fsync = counted(lambda descriptor: None)  # a killed process loses nothing that was written: skip the wait
    torch.save = counted(torch.save)


def attempt(out: Path, world: int, moment: str | None, arguments: list[str]) -> bool:
    """Run the command in ``world`` processes; whether it ended by itself, not by a kill in the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            if world > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                os.environ |= {name: str(value) for name, value in names.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if moment is not None and rank == 0:
                die_at(moment)
            report = out.with_suffix(".json") if rank == 0 else os.devnull
            with open(report, "w") as stream, contextlib.redirect_stdout(stream):
                code = main([*arguments, "--out", str(out), "--json"])
            PartialState().destroy_process_group()
            os._exit(code)
        children.append(pid)
    status = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
    for pid in children[1:]:
        if status:
            os.kill(pid, signal.SIGKILL)  # as torchrun does when one has died
        os.waitpid(pid, 0)
    if status not in (0, -signal.SIGKILL):
        sys.exit(f"{out.name}: exit status {status}")
    return status == 0


def run(folder: Path, world: int, moments: list[str], arguments: list[str]) -> None:
    attempt(folder / "unbroken", world, None, arguments)
    for moment in moments:
        killed = not attempt(folder / moment, world, moment, arguments)
        if killed:
            attempt(folder / moment, world, None, arguments)
        print(moment, int(killed), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    split = sys.argv.index("--")
    run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:split], sys.argv[split + 1 :])
