"""Compiles the Triton kernels ahead of time, without a GPU, and reads off what they take of one.

``python tests/ops/triton_compile.py`` brings the table ``triton_resources.json`` up to date: it compiles what is new,
and every configuration of kernels that changed or if Triton did. With a number of minutes it stops after them, and
leaves ``null`` where it did not come to.
"""

import ast
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_configurations import ARCHITECTURES, Configuration, configurations

import clara_fast.triton_kernels

TABLE = Path(__file__).with_name("triton_resources.json")
# An architecture and the name of a configuration; registers, stack and shared memory.
Place, Numbers = tuple[int, str], tuple[int, int, int]
# Bytes of shared memory that a block may have.
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

_FLOATS = ("eps", "scale", "inverse_temperature", "taken_logit")
POINTERS = {
    **dict.fromkeys(("p_mse", "p_grad_mse", "p_difference", "p_parts", "p_grad_weight"), "fp32"),
    **dict.fromkeys(("p_products", "p_squares", "p_scores", "p_norms", "p_softmax", "p_own", "p_mean"), "fp32"),
    **dict.fromkeys(("p_grad_scores", "p_grad_cosine", "p_lse", "p_delta", "p_grad_lse"), "fp32"),
    **dict.fromkeys(("p_part_out", "p_part_lse"), "fp32"),
    **dict.fromkeys(("p_offsets", "p_q_start", "p_q_len", "p_kv_start", "p_kv_len", "p_contexts"), "i32"),
    **dict.fromkeys(("p_readers", "p_reader_ends", "p_ranks"), "i32"),
    "p_indices": "i64",
    "p_valid": "i1",
}


def _compile(case: Configuration, architecture: int):
    """Pointers, sizes and strides are multiples of 16, as the launchers see to, but for what is "any"."""
    options = dict(case.options)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(case.kernel.params):
        name = parameter.name
        given = options.get(name)
        if parameter.is_constexpr or (name in options and given is None):
            signature[name] = "constexpr"
            constants[name] = given
        elif name.startswith("p_"):
            signature[name] = f"*{given or POINTERS.get(name, case.element)}"
        else:
            signature[name] = "fp32" if name in _FLOATS else "i32"
        if signature[name] not in ("constexpr", "fp32") and not parameter.do_not_specialize and given != "any":
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)


def resources(place: Place) -> Numbers:
    """Registers and bytes of stack (what was spilled) of a thread, and bytes of shared memory of a block."""
    architecture, name = place
    compiled = _compile(configurations(architecture)[name], architecture)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return int(found["REG"]), int(found["STACK"]), compiled.metadata.shared


def compile_all(places: list[Place], until: float = math.inf) -> dict[Place, Numbers]:
    """``resources`` of each place, or of as many as can be started until then, on every core."""
    found = {}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as processes:
        started = {processes.submit(resources, place): place for place in places}
        for job in as_completed(started):
            found[started[job]] = job.result()
            if time.monotonic() > until:
                processes.shutdown(cancel_futures=True)
                return found | {place: job.result() for job, place in started.items() if not job.cancelled()}
    return found


@cache
def fingerprint(family: str) -> str:
    """Of the code of a family's kernels, without comments and docstrings."""
    folder = Path(clara_fast.triton_kernels.__file__).parent
    code = []
    for file in sorted(folder.glob(f"_{family}_*.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        code.append(ast.unparse(tree))
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


NEXT = ",\n"
FAMILIES = ("attention", "pool", "select")


def update(minutes: float = math.inf) -> None:
    old = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    code = {family: fingerprint(family) for family in FAMILIES}
    same = old.get("triton") == triton.__version__
    rows = {}
    for architecture in ARCHITECTURES:
        for name, case in configurations(architecture).items():
            kept = same and old["code"][case.family] == code[case.family]
            rows[architecture, name] = old[f"sm_{architecture}"].get(name) if kept else None
    # Kernels of the matrix products first: they need the most registers.
    missing = sorted((place for place, row in rows.items() if row is None), key=lambda place: place[1])
    rows |= compile_all(missing, time.monotonic() + 60 * minutes)

    head = {"triton": triton.__version__, "code": code, "columns": ["registers", "stack", "shared"]}
    lines = [f'  "{name}": {json.dumps(value)}' for name, value in head.items()]
    for architecture in ARCHITECTURES:
        part = [f'    "{name}": {json.dumps(rows[architecture, name])}' for name in configurations(architecture)]
        lines.append(f'  "sm_{architecture}": {{\n{NEXT.join(part)}\n  }}')
    TABLE.write_text("{\n" + NEXT.join(lines) + "\n}\n")
    print(sum(row is None for row in rows.values()), "of", len(rows), "configurations are still to be compiled")


if __name__ == "__main__":
    update(*map(float, sys.argv[1:]))
