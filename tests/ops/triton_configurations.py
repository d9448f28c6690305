"""Every configuration in which the launchers can run a Triton kernel, from the functions by which they choose.

A configuration is a kernel, the element type of its tensors, and the constants, options and specialisations that Triton
compiles it for. ``test_triton_launch.py`` holds the launchers to this list, ``triton_compile.py`` compiles it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from clara_fast.triton_kernels import _attention_backward as attention_backward
from clara_fast.triton_kernels import _attention_blocks as attention_blocks
from clara_fast.triton_kernels import _attention_forward as attention_forward
from clara_fast.triton_kernels import _pool_backward as pool_backward
from clara_fast.triton_kernels import _pool_forward as pool_forward
from clara_fast.triton_kernels import _select_backward as select_backward
from clara_fast.triton_kernels import _select_forward as select_forward
from clara_fast.triton_kernels import compressed_context_attention as attention
from clara_fast.triton_kernels import pool_memory as pool
from clara_fast.triton_kernels import select_memory as select

ARCHITECTURES = (80, 90, 100)
ELEMENT_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}

# The widest rows and heads, and the most candidates, that the operators hand to these kernels.
MOST_COLUMNS, MOST_HEAD_SIZE, MOST_CANDIDATES = 8192, 256, 4096


@dataclass(frozen=True)
class Configuration:
    """``options``: constants, num_warps and num_stages; of arguments, "None", an element type, or "any" multiple."""

    kernel: Any
    element: str
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return " ".join([self.name, self.element, *(f"{name}={value}" for name, value in self.options)])

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.removesuffix("_kernel")

    @property
    def family(self) -> str:
        return self.name.partition("_")[0]


def configuration(kernel: Any, element: str, **options: Any) -> Configuration:
    return Configuration(kernel, element, tuple(sorted(options.items())))


def _distinct(blocks: Iterator[dict[str, int]]) -> list[dict[str, int]]:
    return [dict(items) for items in dict.fromkeys(tuple(choice.items()) for choice in blocks)]


def _pool_memory() -> Iterator[Configuration]:
    yield configuration(pool_forward.pool_memory_fwd_sum_kernel, "fp32", **pool._SUM)
    for element, element_size in ELEMENT_SIZES.items():
        tiles = _distinct(pool._tile(size, element_size) for size in range(1, MOST_COLUMNS + 1))
        for tile in tiles:
            for norm in (True, False):
                constants = {"WIDEN": False, "HAS_NORM": norm, **tile} | ({} if norm else {"p_weight": None})
                yield configuration(pool_forward.pool_memory_fwd_kernel, element, **constants)
                constants |= {} if norm else {"p_grad_weight": None}
                yield configuration(pool_backward.pool_memory_bwd_kernel, element, **constants)


def _select_memory() -> Iterator[Configuration]:
    rows = _distinct(select._row_of_candidates(count) for count in range(1, MOST_CANDIDATES + 1))
    for row in rows:
        yield configuration(select_forward.select_memory_topk_kernel, "fp32", **row)
        yield configuration(select_backward.select_memory_grad_cosine_kernel, "fp32", **row, **select._PARTS)
        row = {name: row[name] for name in ("BLOCK_N", "num_warps")}
        yield configuration(select_backward.select_memory_softmax_kernel, "fp32", **row)
    for element, element_size in ELEMENT_SIZES.items():
        # Vectors of any length: with one that is no multiple of 16, elements are loaded one by one.
        for size in ({}, {"size": "any"}):
            yield configuration(select_forward.select_memory_products_kernel, element, **select._ROWS, **size)
            yield configuration(select_forward.select_memory_gather_kernel, element, **select._COPY, **size)
            yield configuration(select_backward.select_memory_grad_keys_kernel, element, **select._ROWS, **size)
            yield configuration(select_backward.select_memory_grad_memory_kernel, element, **select._COPY, **size)
            blocks = {"WIDEN": False, **select._affinity_blocks(element_size, 1 if size else 16), **size}
            for squares in (True, False):
                kernel = select_backward.select_memory_affinity_kernel
                yield configuration(kernel, element, SQUARES=squares, **blocks)


def _attention(architecture: int) -> Iterator[Configuration]:
    for element, element_size in ELEMENT_SIZES.items():
        yield configuration(attention_forward.attention_clear_kernel, element, **attention._CLEAR)
        for size in dict.fromkeys(map(attention_blocks.head_block, range(1, MOST_HEAD_SIZE + 1))):
            yield configuration(attention_forward.attention_fwd_merge_kernel, element, BLOCK_E=size, **attention._MERGE)
            constants, chosen = {"WIDEN": False, "BLOCK_E": size}, (architecture, element_size, size)
            forward = attention_forward.attention_fwd_kernel
            for blocks in attention_blocks.fwd_blocks(*chosen, True, False):
                # Parts are float32.
                yield configuration(forward, element, DECODE=True, p_out="fp32", **constants, **blocks)
            many = [blocks for crowded in (0, 1) for blocks in attention_blocks.fwd_blocks(*chosen, False, crowded)]
            for blocks in _distinct(many):
                yield configuration(forward, element, DECODE=False, **constants, **blocks)
            for blocks in attention_blocks.bwd_query_blocks(*chosen):
                yield configuration(attention_backward.attention_bwd_query_kernel, element, **constants, **blocks)
            for blocks in attention_blocks.bwd_key_blocks(*chosen):
                yield configuration(attention_backward.attention_bwd_key_kernel, element, **constants, **blocks)


@cache
def configurations(architecture: int) -> dict[str, Configuration]:
    """All of them by their names, those that autotuning tries included."""
    found = [*_pool_memory(), *_select_memory(), *_attention(architecture)]
    return {str(case): case for case in found}
