"""Kills ``clara-fast compress``: ``python killing.py STORE ARGUMENTS...`` runs it with them, three times.

The first run gets Ctrl-C after 2 documents, the second SIGKILL after 6, the third ends by itself. Prints the
exit status of each and the documents in the store after it. Forked from one process: torch is imported once.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import clara_fast.modeling.checkpoint
import clara_fast.modeling.clara  # noqa: F401 - what the children would import
from clara_fast import MemoryStore
from clara_fast.cli import main


def documents(folder: str) -> int:
    return len(MemoryStore.open(folder)) if MemoryStore.exists(folder) else 0


def run(folder: str, args: list[str], until: int, kill: int) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(main(args))
    while documents(folder) < until and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.02)
    if kill:
        os.kill(pid, kill)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    MemoryStore.open(folder).verify()
    print(status, documents(folder), flush=True)


if __name__ == "__main__":
    # A test run in the background was started with Ctrl-C ignored, and a child inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for until, kill in ((2, signal.SIGINT), (6, signal.SIGKILL), (sys.maxsize, 0)):
        run(sys.argv[1], sys.argv[2:], until, kill)
