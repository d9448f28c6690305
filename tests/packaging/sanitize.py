"""``make sanitize``: the CPU code's tests under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.packaging.sanitize [pytest arguments]

Builds the CPU library and ``_native`` with both sanitizers into an environment of their own, then runs the tests
there once for each instruction set of this processor. An access outside a tensor ends the process: torch's allocations
are watched too, since the sanitizer's allocator replaces malloc.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from tests.packaging import fresh

HOUSE = Path(__file__).parents[2]
BUILD = HOUSE / "build" / "sanitize"
TESTS = ("tests/test_native.py", "tests/ops")
# Compiled graphs run PyTorch's and the compiler's own code, and Triton's tests no code of ours that is sanitized.
LEFT_OUT = "not compile and not triton and not lesser_instruction_sets"


def main() -> None:
    python = build()
    assert_watching(python)
    instruction_sets = available(python)
    for isa in instruction_sets:
        start = time.monotonic()
        environment = sanitized(CLARA_FAST_CPU_ISA=isa, OMP_NUM_THREADS="2")
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT, *sys.argv[1:], *TESTS]
        if code := subprocess.run(command, cwd=HOUSE, env=environment).returncode:
            sys.exit(f"{isa}: stopped with {code}")
        print(f"{isa}: clean, {time.monotonic() - start:.0f} s", flush=True)


def build() -> Path:
    """An environment whose clara_fast is sanitized."""
    python = fresh.environment(BUILD / "environment")
    options = {
        "build-dir": BUILD / "objects",
        "cmake.build-type": "RelWithDebInfo",
        "cmake.define.CLARA_FAST_SANITIZE": "ON",
        "install.strip": "false",
    }
    settings = [part for name, value in options.items() for part in ("--config-settings", f"{name}={value}")]
    # torch comes to this environment by a .pth file, which is out of an isolated build's sight.
    os.environ.setdefault("CLARA_FAST_TORCH_INCLUDE", str(Path(find_spec("torch").origin).parent / "include"))
    fresh.install(python, "--no-deps", *settings, HOUSE)
    return python


def sanitized(**more: str) -> dict[str, str]:
    """The environment variables under which an ordinary Python loads sanitized libraries."""
    # libstdc++ as well: the sanitizer looks for the thrower of exceptions when the process starts.
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    return os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # Python keeps memory to its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        **more,
    }


def assert_watching(python: Path) -> None:
    """Writes one byte past a tensor, which must be noticed: or the tests that follow would prove nothing."""
    code = "import ctypes, torch; row = torch.empty(16); ctypes.memset(row.data_ptr(), 0, 65)"
    done = subprocess.run([python, "-c", code], env=sanitized(), capture_output=True, text=True)
    if "heap-buffer-overflow" not in done.stderr:
        sys.exit(f"the sanitizer did not notice a write past a tensor: {done.stderr[-2000:]}")
    binaries = list(python.parents[1].rglob("clara_fast/**/*.so"))
    if not any(binary.name == "clara_fast_cpu.so" for binary in binaries):
        sys.exit("the CPU library was not built, so its tests would be skipped")
    for binary in binaries:
        symbols = subprocess.run(["nm", "--dynamic", binary], check=True, capture_output=True, text=True).stdout
        if "__asan_report_load" not in symbols or "__ubsan_handle" not in symbols:
            sys.exit(f"{binary} was built without the sanitizers")


def available(python: Path) -> list[str]:
    """The instruction sets that kernels may be asked for here, weakest first."""
    code = "from clara_fast import _native; print(*[k for k, v in _native.cpu_features().items() if v])"
    answer = subprocess.run([python, "-c", code], env=sanitized(), check=True, capture_output=True, text=True)
    features = set(answer.stdout.split())
    needs = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f"},
        "avx512_bf16": {"avx512_bf16"},
        "amx_emulated": {"avx512_bf16", "avx512_vnni", "avx512vbmi"},
        "amx": {"amx_bf16", "amx_int8"},
    }
    return ["generic", *(isa for isa, needed in needs.items() if needed <= features)]


if __name__ == "__main__":
    main()
