"""Kills writers at every moment: ``python killing.py WHAT FOLDER STEP...``, ``python killing.py clock FOLDER SEED...``.

Writing a store goes through ``os.fsync``, ``os.replace`` and ``os.unlink``; a child that dies on the way into the n-th
such call, for every n, has died at every moment that matters. A fresh process that never used torch's threads may
fork, and forking is what makes dozens of deaths quick.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from standin import StandIn, names, texts

from clara_fast.store import MemoryStore

State = dict[str, str]


def fill(path: Path) -> None:
    """Add three shards of three documents to the store at ``path``, or those of them that are missing."""
    model = StandIn()
    exists = (path / "manifest.json").exists()
    with MemoryStore.open(path, model) if exists else MemoryStore.create(path, model) as store:
        for start in (0, 3, 6):
            if f"doc-{start}" not in store.ids:
                store.add(names(3, start), texts(3, start), model.compress(texts(3, start)))


def changes() -> list[tuple[Callable[[MemoryStore], None], Callable[[State], State]]]:
    """A store's life in steps: what is done, and what it means for ids and texts."""
    model = StandIn()

    def add(ids: list[str], new: list[str]):
        return lambda store: store.add(ids, new, model.compress(new)), lambda state: state | dict(zip(ids, new))

    def update(ids: list[str], new: list[str]):
        return (
            lambda store: store.update(ids, new, model.compress(new)),
            lambda state: {name: text for name, text in state.items() if name not in ids} | dict(zip(ids, new)),
        )

    def delete(ids: list[str]):
        return (
            lambda store: store.delete(ids),
            lambda state: {name: text for name, text in state.items() if name not in ids},
        )

    def compact(size: int):
        return lambda store: store.compact(shard_documents=size), lambda state: state

    return [
        add(names(4, 9), texts(4, 9)),
        delete(["doc-1", "doc-4", "doc-12"]),
        update(["doc-2", "doc-5"], texts(2, 50)),
        compact(5),
        delete([*names(3, 6), "doc-0"]),
        add(["doc-0"], texts(1, 60)),
        update(["doc-0", "doc-11"], texts(2, 70)),
        compact(100),
        update(["doc-3"], texts(1, 80)),
    ]


def state_after(count: int) -> State:
    """Ids and texts, in row order, after so many changes."""
    state = dict(zip(names(9), texts(9)))
    for _, mean in changes()[:count]:
        state = mean(state)
    return state


def live(path: Path, done: Path) -> None:
    """Make all changes to a filled store, and note each in ``done`` when it has returned."""
    with MemoryStore.open(path) as store, open(done, "ab", buffering=0) as log:
        for change, _ in changes():
            change(store)
            log.write(b".")


def kill_by_the_clock(folder: Path, seeds: list[int]) -> None:
    """One store for each seed, in a child that is killed after a random part of the time that a whole life takes."""

    def lives(name: str) -> int:
        if (pid := os.fork()) == 0:
            live(folder / name, folder / f"{name}.done")
            os._exit(0)
        return pid

    for name in ("warm", "timed", *(f"killed-{seed}" for seed in seeds)):
        fill(folder / name)
    live(folder / "warm", folder / "warm.done")
    started = time.perf_counter()
    os.waitpid(lives("timed"), 0)
    whole = time.perf_counter() - started
    for seed in seeds:
        pid = lives(f"killed-{seed}")
        time.sleep(random.Random(seed).uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def die_at(step: int) -> Callable[[], int]:
    """Arrange for SIGKILL before file operation number ``step``, counted from 1; returns how many there were."""
    count = 0

    def counted(function):
        def call(*args, **options):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    os.replace = counted(os.replace)
    os.unlink = counted(os.unlink)
    os.fsync = counted(lambda descriptor: None)  # a killed process loses nothing that was written: skip the wait
    return lambda: count


def main(what: str, folder: Path, steps: list[int]) -> None:
    """One store for each step, in a child that dies there; print the children's exit statuses."""

    if what == "clock":
        kill_by_the_clock(folder, steps)
        return

    def run(name: str) -> None:
        path = folder / name
        if what == "fill":
            fill(path)
        else:
            live(path, folder / f"{name}.done")

    if what == "live":
        for step in ("warm", *steps):
            fill(folder / (step if step == "warm" else f"killed-{step}"))
    run("warm")  # what is loaded at first use is loaded once, not by every child
    for step in steps:
        pid = os.fork()
        if pid == 0:
            die_at(step)
            run(f"killed-{step}")
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [int(step) for step in sys.argv[3:]])
