"""Builds the CUDA library without a GPU, and reads off what its kernels take of one.

``python -m tests.packaging.cuda_library`` prints the table that ``cuda_resources.json`` records, which takes minutes.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("cuda_resources.json")
ARCHITECTURES = ("80-real", "90a-real", "100a-real", "120-real")
_KEY_TYPES = ("float32", "bfloat16", "float16", "int8", "float8")


def missing() -> str | None:
    """What keeps the library from being built here, in words."""
    tools = [name for name in ("nvcc", "cmake", "ninja", "g++") if shutil.which(name) is None]
    tools += [name for name in ("pybind11", "triton") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(tools)}" if tools else None


def build(architecture: str) -> Path:
    """The library for one architecture. Its folder stays, so that building again only builds what changed."""
    folder = ROOT / "build" / f"tests-cuda-{architecture}"
    options = {
        "BUILD_CUDA": "ON",
        "BUILD_CPU": "OFF",
        "WERROR": "ON",
        "CUDA_ARCHITECTURES": architecture,
    }
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
    run(*configure, *(f"-DCLARA_FAST_{name}={value}" for name, value in options.items()))
    run("cmake", "--build", folder, "--target", "clara_fast_cuda", "--parallel", "2")
    return folder / "csrc" / "cuda" / "clara_fast_cuda.so"


def run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def resources(library: Path) -> dict[str, dict[str, int]]:
    """Registers, and bytes of stack (spills), of a thread of each kernel."""
    spec = importlib.util.find_spec("triton")
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = run(tool, "--dump-resource-usage", library)
    found = {}
    for symbol, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", text):
        found[_name(symbol)] = {"registers": int(registers), "stack": int(stack)}
    return dict(sorted(found.items()))


def _name(symbol: str) -> str:
    name = re.search(r"\d([a-z_]+)_kernel", symbol)[1]
    arguments = re.search(r"4TypeE(\d)ELi(\d+)E", symbol)
    return f"{name}_{_KEY_TYPES[int(arguments[1])]}_{arguments[2]}_queries" if arguments else name


def registered() -> list[str]:
    """The operators that the library is to register."""
    return re.findall(r'm\.impl\("(\w+)"', (ROOT / "csrc" / "register_cuda.cpp").read_text())


def _print_table() -> None:
    version = re.search(r"release ([\d.]+)", run("nvcc", "--version"))[1]
    columns = {architecture: resources(build(architecture)) for architecture in ARCHITECTURES}
    rows = [f'  "nvcc": {json.dumps(version)}']
    for name in columns[ARCHITECTURES[0]]:
        cells = [f"    {json.dumps(one)}: {json.dumps(found[name])}" for one, found in columns.items()]
        rows.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(cells) + "\n  }")
    print("{\n" + ",\n".join(rows) + "\n}")


if __name__ == "__main__":
    _print_table()
