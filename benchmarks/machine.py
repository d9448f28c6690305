"""The machine: what it is, its ceilings in this run, and how much memory a call takes."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from clara_fast._memory import peak_memory
from clara_fast.benchmarks.timing import Clock

_PACKAGES = ("clara-fast", "torch", "triton", "transformers", "faiss-cpu", "flash-attn")


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: bytes per second read in one pass, and moved (read + written) by a copy; FLOP/s by dtype."""

    read: float
    copy: float
    matmul: dict[str, float]

    def matmul_rate(self, dtype: str) -> float:
        """Of products in ``dtype``; every format of fewer bits counts as bfloat16."""
        return self.matmul["float32" if dtype == "float32" else "bfloat16"]


def measure_ceilings(device: torch.device, clock: Clock, *, quick: bool = False) -> Ceilings:
    """The best of some runs of the simplest kernels, on the threads in use and larger than any cache."""
    gpu = device.type == "cuda"
    numbers = (1 << 29 if gpu else 1 << 26) if not quick else 1 << 20
    source = torch.ones(numbers, device=device)
    target = torch.ones_like(source)  # written, so that its pages are there

    def best(call: Callable[[], Any], repetitions: int = 7) -> float:
        call()
        sample, _ = clock.sampler(call)
        return min(sample() for _ in range(2 if quick else repetitions))

    # Which reduction streams best differs between machines.
    read = min(best(source.sum), best(source.amax))
    copied = best(lambda: target.copy_(source))
    size = (8192 if gpu else 2048) if not quick else 256
    matmul = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        # A CPU without instructions for bfloat16 takes seconds a product: fewer of them.
        matmul[str(dtype).removeprefix("torch.")] = 2 * size**3 / best(lambda a=left, b=right: a @ b, 3)
    return Ceilings(4 * numbers / read, 8 * numbers / copied, matmul)


def passes_of_reading(size: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Passes over ``size`` bytes, as the read ceiling is measured, for a contest to time beside what it is about."""
    source = torch.ones(max(1, size // 4), device=device)
    return {"one pass of reading (sum)": source.sum, "one pass of reading (amax)": source.amax}


def facts(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    found: dict[str, Any] = {"device": str(device), "cpu": cpu_name(), "cores": os.cpu_count()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{card.name} (sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB)"
        found["cuda"] = torch.version.cuda
    found |= {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES if _version(name)},
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return found


def _version(name: str) -> str | None:
    # torch's own string also names its CUDA.
    if name == "torch":
        return torch.__version__
    with contextlib.suppress(PackageNotFoundError):
        return version(name)
    return None


def _commit() -> str | None:
    """Of the checkout this file lies in; ``+`` where code was changed since. None for an installed package."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        tracked = git("ls-files", "--error-unmatch", "--", Path(__file__).name)
        root = git("rev-parse", "--show-toplevel").strip()
        changed = git("-C", root, "status", "--porcelain", "--", "python", "csrc", "triton_kernels").strip()
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "") if tracked else None
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def reset_peak_memory() -> int:
    """Let the peak start from what is resident now, where the system can; returns it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def return_freed_memory() -> None:
    """Let glibc give every larger block back at once, for good: slower, but what is resident is then what is in use."""
    import ctypes

    map_threshold = -3
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(map_threshold, 1 << 16)


def peak_of(work: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """The peak while ``work`` runs, and what was in use before, in bytes: allocated on a GPU, else resident."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return {"peak": torch.cuda.max_memory_allocated(device), "before": before}
    before = reset_peak_memory()
    work()
    return {"peak": peak_memory(), "before": before}


def alone(module: str, *arguments: object) -> Any:
    """What a benchmark of this package prints as JSON in its last line, in a process of its own."""
    command = [sys.executable, "-m", f"clara_fast.benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} did not finish:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
