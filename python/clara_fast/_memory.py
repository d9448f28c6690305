"""How much memory this process has used."""

from __future__ import annotations

import platform
from pathlib import Path


def peak_memory() -> int:
    """Bytes of the largest resident set since the start, or since Linux was told to forget (``clear_refs``).

    Linux's VmHWM rather than ``ru_maxrss``: that one also counts the parent's memory at the time of the fork.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak << 10
