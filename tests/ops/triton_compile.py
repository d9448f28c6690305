"""Compiles the Triton kernels ahead of time, without a GPU, and reads off what they take of one.

Every kernel in every configuration that the launchers choose for common shapes and the three dtypes, as the table
``triton_resources.json`` records them: ``python tests/ops/triton_compile.py`` prints it.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clara_fast.triton_kernels import _attention_backward, _attention_blocks, _attention_forward, pool_memory
from clara_fast.triton_kernels import select_memory as select

ARCHITECTURES = (80, 90, 100)
TABLE = Path(__file__).with_name("triton_resources.json")
# Bytes of shared memory that a block may have.
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

_ELEMENT_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
_FLOATS = ("eps", "scale", "inverse_temperature", "taken_logit")
_POINTERS = {
    **dict.fromkeys(("p_mse", "p_grad_mse", "p_difference", "p_parts", "p_grad_weight"), "fp32"),
    **dict.fromkeys(("p_products", "p_squares", "p_scores", "p_norms", "p_affinity"), "fp32"),
    **dict.fromkeys(("p_grad_scores", "p_grad_cosine", "p_lse", "p_delta", "p_grad_lse"), "fp32"),
    **dict.fromkeys(("p_part_out", "p_part_lse"), "fp32"),
    **dict.fromkeys(("p_offsets", "p_q_start", "p_q_len", "p_kv_start", "p_kv_len", "p_contexts"), "i32"),
    **dict.fromkeys(("p_readers", "p_reader_ends"), "i32"),
    "p_indices": "i64",
    "p_valid": "i1",
}


def _pool_memory() -> dict[str, tuple]:
    cases = {}
    for element, size in (("bf16", 576), ("bf16", 4096), ("fp32", 4096)):
        blocks = pool_memory._row_blocks(size) | pool_memory._tiles(size, _ELEMENT_SIZE[element])[0]
        for norm in (True, False):
            constants = {"WIDEN": False, "HAS_NORM": norm, **blocks} | ({} if norm else {"p_weight": None})
            name = f"{element}_{size}_{'norm' if norm else 'plain'}"
            forward = constants | {"ONE_SPLIT": True}
            cases[f"pool_memory_fwd_{name}"] = (pool_memory.pool_memory_fwd_kernel, element, forward)
            backward = constants | ({} if norm else {"p_grad_weight": None})
            cases[f"pool_memory_bwd_{name}"] = (pool_memory.pool_memory_bwd_kernel, element, backward)
    options = {"BLOCK_SPLITS": 8, "BLOCK_D": 1024, "num_warps": 8}
    cases["pool_memory_fwd_sum"] = (pool_memory.pool_memory_fwd_sum_kernel, "bf16", options)
    return cases


def _select_memory() -> dict[str, tuple]:
    rows = {"HAS_VALID": True, **select._ROWS}
    cases = {
        "select_memory_products": (select.select_memory_products_kernel, "bf16", rows),
        "select_memory_grad_keys": (select.select_memory_grad_keys_kernel, "bf16", rows),
        "select_memory_gather": (select.select_memory_gather_kernel, "bf16", select._COPY),
        "select_memory_grad_memory": (select.select_memory_grad_memory_kernel, "bf16", select._COPY),
    }
    for count in (20, 4096):
        row = {"HAS_VALID": True, **select._row_of_candidates(count)}
        cases[f"select_memory_topk_{count}"] = (select.select_memory_topk_kernel, "bf16", row)
        cases[f"select_memory_logits_{count}"] = (select.select_memory_logits_kernel, "bf16", row)
    for element in ("bf16", "fp32"):
        options = {"HAS_VALID": True, "SQUARES": True, "WIDEN": False}
        options |= select._affinity_blocks(_ELEMENT_SIZE[element])
        cases[f"select_memory_affinity_{element}"] = (select.select_memory_affinity_kernel, element, options)
    return cases


def _attention(architecture: int) -> dict[str, tuple]:
    cases = {}
    for element, size in (
        ("bf16", 16),
        ("bf16", 64),
        ("bf16", 80),
        ("bf16", 128),
        ("bf16", 256),
        ("fp32", 64),
        ("fp32", 128),
    ):
        block = triton.next_power_of_2(size)
        constants = {"GROUPS": 4, "SIZE": size, "VALUE_SIZE": size, "BLOCK_E": block, "BLOCK_V": block, "WIDEN": False}
        chosen = architecture, _ELEMENT_SIZE[element], block
        tail = f"{element}_{size}"
        forward = {"decode": (True, False), "prefill": (False, True), "short": (False, False)}
        for label, rows in forward.items():
            options = {"DECODE": label == "decode", **constants, **_attention_blocks.fwd_blocks(*chosen, *rows)[0]}
            cases[f"attention_fwd_{label}_{tail}"] = (_attention_forward.attention_fwd_kernel, element, options)
        options = {"HAS_GRAD_LSE": False, "p_grad_lse": None, **constants}
        options |= _attention_blocks.bwd_query_blocks(*chosen)[0]
        cases[f"attention_bwd_query_{tail}"] = (_attention_backward.attention_bwd_query_kernel, element, options)
        options = constants | _attention_blocks.bwd_key_blocks(*chosen)[0]
        cases[f"attention_bwd_key_{tail}"] = (_attention_backward.attention_bwd_key_kernel, element, options)
    options = {"VALUE_SIZE": 128, "BLOCK_V": 128, "BLOCK_SPLITS": 32, "num_warps": 4}
    cases["attention_fwd_merge"] = (_attention_forward.attention_fwd_merge_kernel, "bf16", options)
    options = {"HAS_LSE": True, "BLOCK_T": 64, "BLOCK_S": 64, "BLOCK_W": 1024, "num_warps": 4}
    cases["attention_clear"] = (_attention_forward.attention_clear_kernel, "bf16", options)
    return cases


def variants(architecture: int) -> dict[str, tuple]:
    """name -> (kernel, element type, constants and options), as the launchers would call them."""
    return _pool_memory() | _select_memory() | _attention(architecture)


def compile_kernel(kernel, element: str, options: dict, architecture: int):
    """Pointers, sizes and strides are multiples of 16, as torch's allocations and the usual sizes are."""
    options = dict(options)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in options:
            signature[name] = "constexpr"
            constants[name] = options[name]
        elif name.startswith("p_"):
            signature[name] = f"*{_POINTERS.get(name, element)}"
        else:
            signature[name] = "fp32" if name in _FLOATS else "i32"
        if signature[name] not in ("constexpr", "fp32") and not parameter.do_not_specialize:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)


def resources(compiled) -> dict[str, int]:
    """Registers and bytes of stack of a thread, and bytes of shared memory of a block."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "shared": compiled.metadata.shared,
        "threads": compiled.metadata.num_warps * 32,
    }


def table() -> dict[str, dict[str, dict[str, int]]]:
    rows: dict[str, dict] = {}
    for architecture in map(int, sys.argv[1:]) if len(sys.argv) > 1 else ARCHITECTURES:
        for name, case in variants(architecture).items():
            found = resources(compile_kernel(*case, architecture))
            print(architecture, name, found, file=sys.stderr, flush=True)
            rows.setdefault(name, {})[f"sm_{architecture}"] = found
    return rows


if __name__ == "__main__":
    rows = [
        f'  "{name}": {{\n'
        + ",\n".join(f'    "{architecture}": {json.dumps(numbers)}' for architecture, numbers in row.items())
        + "\n  }"
        for name, row in table().items()
    ]
    print('{\n  "triton": "' + triton.__version__ + '",\n' + ",\n".join(rows) + "\n}")
