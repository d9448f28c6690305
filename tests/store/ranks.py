"""Several processes over gloo: ``python ranks.py TASK FOLDER SIZE``; TASK is a function here.

Forked from one process, so that torch is imported once; prints the exit status of each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from standin import StandIn

from clara_fast.store import Corpus, MemoryStore, compress_corpus
from clara_fast.store.parts import Parts
from clara_fast.store.ranks import Ranks

CHUNK = {"chunk": 16, "overlap": 4}


def compress(folder: Path, ranks: Ranks, kill_after: int = 0) -> None:
    """Compress ``corpus.jsonl`` into ``store``; the last process dies before its part number ``kill_after``."""
    model, path = StandIn(), folder / "store"
    if ranks.rank == 0:
        store = MemoryStore.open_or_create(path, model)
    ranks.barrier()
    if ranks.rank:
        store = MemoryStore.open(path, model)
    if kill_after and ranks.rank == ranks.size - 1:
        die_at(kill_after)
    corpus = Corpus.open(folder / "corpus.jsonl")
    report = compress_corpus(
        store, model, corpus, batch_tokens=64, shard_documents=8, ranks=ranks, total=corpus.count(), **CHUNK
    )
    if ranks.rank == 0:
        (folder / "report.json").write_text(json.dumps(vars(report)))


def killed(folder: Path, ranks: Ranks) -> None:
    compress(folder, ranks, kill_after=int(os.environ["KILL_AFTER"]))


def join(folder: Path, ranks: None) -> None:
    """Join parts, and die on the way into the renaming or the removal that ``KILL_IN`` names."""
    store, moment = MemoryStore.open(folder / "store"), os.environ["KILL_IN"]

    def dying(function, target=-1):
        def call(*args, **options):
            if moment in str(args[target]):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    os.replace, shutil.rmtree = dying(os.replace), dying(shutil.rmtree)
    Parts(store, StandIn()).join()


def search(folder: Path, ranks: Ranks) -> None:
    """Search ``store`` together, with ties and with a filter; every process writes what it gets."""
    store = MemoryStore.open(folder / "store")
    queries = torch.load(folder / "queries.pt")
    found = [
        store.topk(queries, k, where=where, group=dist.group.WORLD)
        for k in (1, 9, len(store))
        for where in (None, {"even": True}, {"even": None})
    ]
    torch.save(found, folder / f"found-{ranks.rank}.pt")
    hits = store.search(queries[:2], 3, group=dist.group.WORLD)
    (folder / f"hits-{ranks.rank}.json").write_text(json.dumps([[hit.id for hit in row] for row in hits]))


def die_at(part: int) -> None:
    """Arrange for SIGKILL inside the writing of a part, after its files and before its manifest."""
    replace, count = os.replace, 0

    def counted(source, target):
        nonlocal count
        count += str(target).endswith(".parquet")
        if count == part:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(source, target)

    os.replace = counted


def run(task: str, folder: Path, size: int) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
            os.environ["MASTER_PORT"] = str(port)
            try:
                globals()[task](folder, Ranks.from_environment() if size > 1 else None)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(pid)
    statuses = {}
    while children:
        pid, status = os.wait()
        children.remove(pid)
        statuses[pid] = os.waitstatus_to_exitcode(status)
        if status:  # as a launcher does
            for other in children:
                os.kill(other, signal.SIGKILL)
    return sorted(statuses.values())


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
