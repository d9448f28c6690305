"""What every benchmark shares: agreement before speed, interleaved timing, machine facts, tables and JSON."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

OURS = "clara_fast"


class Disagreement(AssertionError):
    """Two contestants computed different things, so their speeds say nothing."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the repetitions; ``cpu`` is processor time, free of waiting for a core."""

    median: float
    p20: float
    p80: float
    cpu: float
    repetitions: int

    @classmethod
    def of(cls, samples: list[tuple[float, float]]) -> Timing:
        """From (wall, processor) seconds of each repetition."""
        wall, cpu = torch.tensor(samples, dtype=torch.float64).unbind(1)
        p20, median, p80 = wall.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        return cls(median, p20, p80, float(cpu.quantile(0.5)), len(samples))

    def __str__(self) -> str:
        return f"{duration(self.median)} ({duration(self.p20)} to {duration(self.p80)})"


def duration(seconds: float) -> str:
    """With three digits and the unit that suits them."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def interleaved(
    contestants: Mapping[str, Callable[[], Any]], repetitions: int, *, shortest: float = 0.0
) -> dict[str, Timing]:
    """Time the contestants in turn, so that a busy machine slows all of them.

    Args:
        contestants: what to call, by name. They must be warm: checking their results before does that.
        repetitions: of the whole round; every other round runs in reverse order.
        shortest: seconds that one sample should take at least; quick calls are repeated inside it.
    """
    loops = {}
    for name, call in contestants.items():
        loops[name] = max(1, round(shortest / max(_seconds(call)[0], 1e-7))) if shortest else 1
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for repetition in range(repetitions):
        names = list(contestants)
        for name in reversed(names) if repetition % 2 else names:
            samples[name].append(_seconds(contestants[name], loops[name]))
    return {name: Timing.of(seconds) for name, seconds in samples.items()}


def _seconds(call: Callable[[], Any], loops: int = 1) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(loops):
        call()
    return (time.perf_counter() - wall) / loops, (time.process_time() - cpu) / loops


def relative_error(mine: Tensor, other: Tensor) -> float:
    """Of the whole tensor, in the Euclidean norm."""
    mine, other = mine.detach().double(), other.detach().double()
    if mine.shape != other.shape:
        raise Disagreement(f"shapes differ: {list(mine.shape)} and {list(other.shape)}")
    scale = float(other.norm())
    error = float((mine - other).norm())
    return error / scale if scale else error


def require_close(name: str, mine: Tensor, other: Tensor, limit: float) -> float:
    """The relative error between two contestants' results; raises :class:`Disagreement` above ``limit``."""
    error = relative_error(mine, other)
    if not error <= limit:
        raise Disagreement(f"{name}: relative error {error:.2g} is above {limit:.2g}; no speed is reported")
    return error


def require_accurate(name: str, mine: Tensor, eager: Tensor, exact: Tensor) -> float:
    """Our error against float64 may be at most twice that of eager PyTorch in the same dtype, and some rounding."""
    rounding = torch.finfo(mine.dtype).eps
    return require_close(name, mine, exact, 2 * relative_error(eager, exact) + rounding)


def read_bandwidth(megabytes: int = 256, repetitions: int = 7) -> float:
    """Bytes per second that one pass over memory reads with the threads in use: the best of some passes."""
    buffer = torch.ones(megabytes << 18, dtype=torch.float32)
    return buffer.numel() * 4 / min(_seconds(buffer.sum)[0] for _ in range(repetitions))


def peak_memory() -> int:
    """Bytes of the largest resident set since the start or :func:`reset_peak_memory`.

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


def reset_peak_memory() -> int:
    """Let the peak start from what is resident now, where the system can; returns it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def machine_facts() -> dict[str, Any]:
    """What the numbers depend on."""
    import transformers

    import clara_fast

    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "clara_fast": getattr(clara_fast, "__version__", "unknown"),
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str:
    """Of the repository that this file lies in; ``+`` where its Python or C++ code was changed since."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", "python", "csrc", "triton_kernels").strip()
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


class Report:
    """Rows of results, shown as a table and kept as JSON."""

    def __init__(self, title: str, columns: list[str], facts: dict[str, Any]) -> None:
        self.title, self.columns, self.facts = title, columns, facts
        self.rows: list[list[str]] = []
        self.results: list[dict[str, Any]] = []
        self.console = Console(width=max(Console().width, 150), highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def say_facts(self) -> None:
        self.say(", ".join(f"{name} {value}" for name, value in self.facts.items()))

    def add(self, cells: list[str], result: dict[str, Any]) -> None:
        self.rows.append(cells)
        self.results.append(result)
        self.say(f"{time.strftime('%H:%M:%S')} {cells[0]}: done")

    def show(self) -> None:
        table = Table(*self.columns, title=self.title)
        for row in self.rows:
            table.add_row(*row)
        self.console.print(table)

    def save(self, path: Path | None) -> None:
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"title": self.title, "facts": self.facts, "results": self.results}
        path.write_text(json.dumps(content, indent=2) + "\n")
        self.say(f"written to {path}")
