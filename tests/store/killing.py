"""Kills writers at every moment: ``python killing.py FOLDER STEPS``.

Writing a store goes through ``os.fsync`` and ``os.replace``; a child that dies on the way into the n-th such
call, for every n, has died at every moment that matters. A fresh process that never used torch's threads may
fork, and forking is what makes dozens of deaths quick.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from standin import StandIn, names, texts

from clara_fast.store import MemoryStore


def fill(path: Path) -> None:
    """Add three shards of three documents to the store at ``path``, or those of them that are missing."""
    model = StandIn()
    exists = (path / "manifest.json").exists()
    with MemoryStore.open(path, model) if exists else MemoryStore.create(path, model) as store:
        for start in (0, 3, 6):
            if f"doc-{start}" not in store.ids:
                store.add(names(3, start), texts(3, start), model.compress(texts(3, start)))


def die_at(step: int) -> None:
    """Arrange for SIGKILL before file operation number ``step``, counted from 1."""
    count = 0

    def counted(function):
        def call(*args):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    os.replace = counted(os.replace)
    os.fsync = counted(lambda descriptor: None)  # a killed process loses nothing that was written: skip the wait


def main(folder: Path, steps: int) -> None:
    """Fill one store per step, each in a child that dies there; print the children's exit statuses."""
    fill(folder / "warm")  # what is loaded at first use is loaded once, not by every child
    for step in range(1, steps + 1):
        pid = os.fork()
        if pid == 0:
            die_at(step)
            fill(folder / f"killed-{step}")
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
