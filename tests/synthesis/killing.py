"""Kills ``clara-fast synthesize``: ``python -m tests.synthesis.killing JOURNAL ARGUMENTS...`` runs it three times.

The first run gets Ctrl-C when the journal has 20 lines, the second SIGKILL at 70, the third ends by itself; a torn line
is put into the journal after each of the first two. Prints each exit status and whether there is an output. Forked from
one process: imports come once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import openai  # noqa: F401 - what the children would import

import clara_fast.synthesis  # noqa: F401
from clara_fast.cli import main


def lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def run(journal: Path, args: list[str], until: int | None, kill: int = 0) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(main(args))
    if until is not None:
        while lines(journal) < until and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        os.kill(pid, kill)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(status, Path(args[args.index("--out") + 1]).exists(), flush=True)
    if until is not None:
        with journal.open("ab") as stream:
            stream.write(b'{"kind": "answer", "item": "torn')


if __name__ == "__main__":
    # A test run in the background was started with Ctrl-C ignored, and a child inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for limit, kill in ((20, signal.SIGINT), (70, signal.SIGKILL), (None, 0)):
        run(Path(sys.argv[1]), sys.argv[2:], limit, kill)
