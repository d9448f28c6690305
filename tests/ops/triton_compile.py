"""Compiles every Triton kernel ahead of time, without a GPU, and reads off what it takes of one.

``python tests/ops/triton_compile.py`` prints the table that ``triton_resources.json`` records.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clara_fast.triton_kernels import compressed_context_attention as attention
from clara_fast.triton_kernels import pool_memory, select_memory

ARCHITECTURES = (80, 90, 100)
TABLE = Path(__file__).with_name("triton_resources.json")

_POOL = {"num_memory": "i32", "size": "i32", "eps": "fp32", "num_rows": "i32"}
_SELECT = {"num_keys": "i32", "k": "i32", "size": "i32", "inverse_temperature": "fp32", "taken_logit": "fp32"}
_ATTENTION = {
    **dict.fromkeys(("num_segments", "num_contexts", "num_keys", "num_rows", "num_heads", "num_key_heads"), "i32"),
    **dict.fromkeys([f"stride_{tensor}{axis}" for tensor in "qkv" for axis in "th"], "i32"),
    "scale": "fp32",
}
_FLOAT32 = {
    *("p_sums", "p_mse", "p_grad_mse", "p_step", "p_grad_weight", "p_scores", "p_norms", "p_affinity"),
    *("p_grad_scores", "p_grad_cosine", "p_lse", "p_delta", "p_grad_lse"),
}
_INT32 = {"p_offsets", "p_q_start", "p_q_len", "p_kv_start", "p_kv_len", "p_contexts", "p_readers", "p_reader_ends"}


def _attention(element: str, size: int, groups: int, blocks: dict) -> dict:
    sizes = {"SIZE": size, "VALUE_SIZE": size, "BLOCK_E": size, "BLOCK_V": size}
    return {"element": element, "GROUPS": groups, "WIDEN": False, "BLOCK_S": 128, **sizes, **blocks}


class _Shape:
    """Stands for a tensor where a launcher chooses its blocks."""

    def __init__(self, element_size: int) -> None:
        self.element_size = lambda: element_size


def variants() -> dict[str, tuple]:
    """name -> (kernel, scalar types, constants and options), as the launchers would call them."""
    cases = {}
    for norm in (True, False):
        name = "norm" if norm else "plain"
        options = {"element": "bf16", "HAS_NORM": norm, "SPLITS": 8, "WIDEN": False}
        forward = {**options, "STORE_MEMORY": True, **pool_memory._blocks(4096, pool_memory._FWD_TILE)}
        cases[f"pool_memory_sums_{name}"] = (pool_memory.pool_memory_sums_kernel, _POOL, forward)
        backward = {**options, **pool_memory._blocks(4096, pool_memory._BWD_TILE)}
        cases[f"pool_memory_bwd_{name}"] = (pool_memory.pool_memory_bwd_kernel, _POOL, backward)
    for backward in (False, True):
        options = {"element": "bf16", "BACKWARD": backward, "SPLITS": 8, "BLOCK_D": 1024, "num_warps": 4}
        name = "pool_memory_step" if backward else "pool_memory_mse"
        cases[name] = (pool_memory.pool_memory_mse_kernel, _POOL, options)

    valid = {"element": "bf16", "HAS_VALID": True}
    for name, options in {
        "scores": {**valid, "BLOCK_R": 1024, "num_warps": 4},
        "topk": {**valid, "BLOCK_N": 32, "num_warps": 1},
        "gather": {"element": "bf16", "BLOCK_M": 1024, "num_warps": 4},
        "affinity": {
            **valid,
            "SPLITS": 8,
            "WIDEN": False,
            "BLOCK_K": 16,
            "BLOCK_N": 16,
            "BLOCK_M": 128,
            "num_warps": 4,
            "num_stages": 3,
        },
        "logits": {**valid, "SPLITS": 8, "BLOCK_N": 32, "num_warps": 1},
        "grad_keys": {**valid, "BLOCK_R": 256, "num_warps": 2},
        "grad_memory": {"element": "bf16", "BLOCK_M": 1024, "num_warps": 4},
    }.items():
        cases[f"select_memory_{name}"] = (getattr(select_memory, f"select_memory_{name}_kernel"), _SELECT, options)

    for element, bytes_, size, groups in (("bf16", 2, 64, 3), ("bf16", 2, 128, 4), ("fp32", 4, 64, 3)):
        shape = _Shape(bytes_)
        name = f"{element}_{size}"
        for label, rows in (("prefill", 1024), ("decode", 1)):
            options = _attention(element, size, groups, attention._fwd_blocks(shape, rows, size))
            cases[f"attention_fwd_{label}_{name}"] = (attention.attention_fwd_kernel, _ATTENTION, options)
        options = _attention(element, size, groups, attention._bwd_blocks(shape, size))
        cases[f"attention_bwd_query_{name}"] = (attention.attention_bwd_query_kernel, _ATTENTION, options)
        cases[f"attention_bwd_key_{name}"] = (attention.attention_bwd_key_kernel, _ATTENTION, options)
    options = {"element": "bf16", "HAS_GRAD_LSE": True, "VALUE_SIZE": 64, "BLOCK_V": 64, "BLOCK_ROWS": 64}
    cases["attention_bwd_delta"] = (attention.attention_bwd_delta_kernel, _ATTENTION, options)
    return cases


def compile_kernel(kernel, scalars: dict, options: dict, architecture: int):
    """Pointers and row strides are multiples of 16, as torch's allocations and the usual sizes are."""
    options = dict(options)
    element = options.pop("element")
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constants[name] = options[name]
            continue
        if name in scalars:
            signature[name] = scalars[name]
            aligned = name.startswith("stride") or name == "size"
        else:
            kind = "fp32" if name in _FLOAT32 else "i32" if name in _INT32 else element
            kind = "i64" if name == "p_indices" else "i1" if name == "p_valid" else kind
            signature[name] = f"*{kind}"
            aligned = True
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)


def resources(compiled) -> dict[str, int]:
    """Registers and bytes of stack of a thread, and bytes of shared memory of a block."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "shared": compiled.metadata.shared,
        "threads": compiled.metadata.num_warps * 32,
    }


def table(architectures=ARCHITECTURES) -> dict[str, dict[str, dict[str, int]]]:
    return {
        name: {f"sm_{architecture}": resources(compile_kernel(*case, architecture)) for architecture in architectures}
        for name, case in variants().items()
    }


if __name__ == "__main__":
    rows = [
        f'  "{name}": {{\n'
        + ",\n".join(f'    "{architecture}": {json.dumps(numbers)}' for architecture, numbers in row.items())
        + "\n  }"
        for name, row in table().items()
    ]
    print('{\n  "triton": "' + triton.__version__ + '",\n' + ",\n".join(rows) + "\n}")
