"""Python functions in one fresh process or several that form a group, as torchrun would start them.

They are forked from a server that has imported torch, transformers and clara_fast once for the whole test session.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch

import clara_fast.cli
import clara_fast.modeling.checkpoint
import clara_fast.modeling.clara
import clara_fast.training  # noqa: F401 - what the processes would import

os.environ.setdefault("HF_HUB_OFFLINE", "1")
FORKS: Any = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


def run_ranks(world: int, function: Callable[..., None], *args: Any, log: Path, timeout: float = 240) -> bool:
    """Call ``function(*args)`` in ``world`` processes; whether they ended by themselves, not by a kill of the first.

    When one has died the others are killed, as torchrun does: they may wait for it. Fails the test if a process raised,
    and prints what they said, which is in ``log``.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.unlink(missing_ok=True)
    processes = [FORKS.Process(target=_start, args=(world, rank, port, log, function, args)) for rank in range(world)]
    deadline = time.monotonic() + timeout
    failed = None
    try:
        for process in processes:
            process.start()
        running = {process.sentinel: process for process in processes}
        while running and not failed:
            ended = wait(list(running), deadline - time.monotonic())
            assert ended, f"still running after {timeout} seconds: {log.read_text()[-6000:]}"
            for sentinel in ended:
                running.pop(sentinel).join()
            failed = next((process for process in processes if process.exitcode), None)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    if failed and (failed is not processes[0] or failed.exitcode != -signal.SIGKILL):
        pytest.fail(f"exit status {failed.exitcode}: {log.read_text()[-6000:]}")
    return not failed


def _start(world: int, rank: int, port: int, log: Path, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    gc.freeze()  # a collection would copy all that the server has imported
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        function(*args)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        raise
