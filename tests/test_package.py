"""The package as a whole: what importing it costs, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import clara_fast

HOUSE = Path(clara_fast.modeling.__file__).parents[1]
# Each floor may import those named here, and itself.
MAY_IMPORT = {
    "ops": {"triton_kernels"},
    "store": {"ops"},
    "modeling": {"ops"},
    "data": set(),
    "evaluation": {"ops", "store", "modeling", "data"},
    "training": {"ops", "store", "modeling", "data", "evaluation"},
    "synthesis": {"data"},
    "cli": {"ops", "store", "modeling", "data", "evaluation", "synthesis", "training", "benchmarks"},
}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_loads_nothing_heavy():
    heavy = python(
        "import torch, sys; before = set(sys.modules); import clara_fast; from clara_fast import ops;"
        "names = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(*sorted(names & {'transformers', 'peft', 'triton', 'accelerate', 'pyarrow', 'typer', 'rich'}),"
        "torch.cuda.is_initialized())"
    )
    assert heavy.split() == ["False"]


def test_importing_is_quick():
    seconds = float(
        python("import torch, time; start = time.process_time(); import clara_fast; print(time.process_time() - start)")
    )
    assert seconds < 0.5


def test_public_names_are_there():
    for name in clara_fast.__all__:
        assert getattr(clara_fast, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = clara_fast.Nothing


@pytest.mark.parametrize("floor", sorted(MAY_IMPORT))
def test_imports_point_one_way(floor):
    allowed = {*MAY_IMPORT[floor], floor}
    for file in sorted((HOUSE / floor).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            for module in modules:
                parts = [*module.split("."), ""]
                if parts[0] == "clara_fast" and parts[1] in {*MAY_IMPORT, "triton_kernels", "benchmarks"}:
                    assert parts[1] in allowed, f"{file.name} imports {module}"
