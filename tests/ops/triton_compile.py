"""Compiles the Triton kernels ahead of time, without a GPU, and reads off what they take of one.

``python tests/ops/triton_compile.py`` brings the table ``triton_resources.json`` up to date: it compiles what is new,
and every configuration of kernels that changed or if Triton did. That takes about ten minutes for all of them.
"""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_configurations import ARCHITECTURES, Configuration, configurations

import clara_fast.triton_kernels

TABLE = Path(__file__).with_name("triton_resources.json")
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


def resources(place: tuple[int, str]) -> tuple[int, int, int]:
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


def compile_all(places: list[tuple[int, str]], show: bool = False) -> dict[tuple[int, str], tuple[int, int, int]]:
    """``resources`` of each ``(architecture, name)``, on every core."""
    found = {}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as processes:
        for place, numbers in zip(places, processes.map(resources, places)):
            found[place] = numbers
            if show:
                print(len(found), *place, numbers, file=sys.stderr, flush=True)
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


def update() -> None:
    old = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    current = {
        family
        for family in FAMILIES
        if old.get("triton") == triton.__version__ and old["code"].get(family) == fingerprint(family)
    }
    places = [(architecture, name) for architecture in ARCHITECTURES for name in configurations(architecture)]
    kept = {
        place: row
        for place in places
        if configurations(place[0])[place[1]].family in current
        and (row := old[f"sm_{place[0]}"].get(place[1])) is not None
    }
    found = kept | compile_all([place for place in places if place not in kept], show=True)
    head = {"triton": triton.__version__, "code": {family: fingerprint(family) for family in FAMILIES}}
    lines = [f'  "{name}": {json.dumps(value)}' for name, value in head.items()]
    lines.append('  "columns": ["registers", "stack", "shared"]')
    for architecture in ARCHITECTURES:
        rows = [f'    "{name}": {json.dumps(found[architecture, name])}' for name in configurations(architecture)]
        lines.append(f'  "sm_{architecture}": {{\n{NEXT.join(rows)}\n  }}')
    TABLE.write_text("{\n" + NEXT.join(lines) + "\n}\n")


if __name__ == "__main__":
    update()
