"""``make sanitize-gpu``: the operators on a GPU under compute-sanitizer.

    python -m tests.packaging.sanitize_gpu

Looks for accesses out of bounds, reads of memory that nobody wrote, races within shared memory and misused barriers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

HOUSE = Path(__file__).parents[2]
TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")
# Kernels of PyTorch itself, by a part of their mangled names: not ours to check, and slow.
NOT_OURS = "kernel_substring=2at6native"


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("make sanitize-gpu needs a GPU and a CUDA build of torch; torch sees no GPU here")
    program = compute_sanitizer()
    if program is None:
        sys.exit(
            "make sanitize-gpu needs compute-sanitizer: pip install nvidia-cuda-sanitizer-api, or CUDA_HOME or PATH"
        )
    # An allocation each, without torch's cache: inside one big block nothing is out of bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "1", "--kernel-name-exclude", NOT_OURS]
        command += ["--target-processes", "application-only"]
        command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
        if code := subprocess.run(command, cwd=HOUSE, env=environment).returncode:
            sys.exit(f"{tool}: stopped with {code}")
        print(f"{tool}: clean", flush=True)


def compute_sanitizer() -> str | None:
    """NVIDIA's program, from PATH, the CUDA toolkit or its package."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    packaged = Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/compute-sanitizer/compute-sanitizer")
    candidates = ["compute-sanitizer", home / "bin" / "compute-sanitizer", *packaged]
    return next((program for name in candidates if (program := shutil.which(name))), None)


if __name__ == "__main__":
    main()
