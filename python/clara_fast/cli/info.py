"""``clara-fast info``."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from clara_fast.cli.models import JsonOption
from clara_fast.cli.output import print_json, size

_PACKAGES = (
    "clara-fast",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "pyarrow",
    "triton",
    "gguf",
)


def info(json: JsonOption = False) -> None:
    """Show versions, what the native code was built with, and the devices here: what a bug report needs."""
    facts = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "native": _native(),
        "devices": _devices(),
    }
    if json:
        print_json(facts)
        return
    for name, value in facts.items():
        if not isinstance(value, dict):
            print(f"{name:14}{value}")
            continue
        print(f"{name}:")
        for key, entry in value.items():
            print(f"  {key:20}{_plain(entry)}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _native() -> dict[str, Any]:
    """Build facts and CPU features, and which operators have native kernels."""
    try:
        from clara_fast import _native as native
    except ImportError as error:
        return {"missing": f"operators run in plain PyTorch ({error})"}
    from clara_fast.ops import _library

    features = [name for name, present in native.cpu_features().items() if present]
    kernels = {"kernels": sorted(_library.native), "cuda_kernels": sorted(_library.native_cuda)}
    return {**native.build_info(), "cpu_features": features, **kernels}


def _devices() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "memory": size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    }
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{facts.name}, {size(facts.total_memory)}, sm_{facts.major}{facts.minor}"
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
