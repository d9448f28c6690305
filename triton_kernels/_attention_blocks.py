"""Blocks of the attention kernels by architecture, dtype and head size: the usual ones first, then others to try.

Chosen by compiling ahead of time: the largest blocks that keep everything in registers and within the shared memory of
the architecture (``tests/ops/triton_resources.json``). sm_86, sm_89 and sm_120 have less of it (99 KB) than sm_80,
whose blocks fit them too. ``size`` is what ``head_block`` returns.
"""

from __future__ import annotations

import triton

from clara_fast.triton_kernels._launch import Blocks


def _blocks(rows: int, keys: int, warps: int, stages: int, chunk: int = 0) -> Blocks:
    """``chunk``: columns that the products of rows read at a time; 0 where the block's rows are held whole."""
    return {"BLOCK_ROWS": rows, "BLOCK_KEYS": keys, "CHUNK": chunk, "num_warps": warps, "num_stages": stages}


def head_block(size: int) -> int:
    """Columns of a block for heads of ``size``."""
    return max(triton.next_power_of_2(size), 64)


def _family(architecture: int) -> int:
    """90 has asynchronous products over a warp group, 100 tensor memory; every other works like 80."""
    return 90 if 90 <= architecture < 100 else 100 if 100 <= architecture < 120 else 80


def fwd_blocks(architecture: int, element_size: int, size: int, few_rows: bool, crowded: bool) -> list[Blocks]:
    """``few_rows``: decoding; ``crowded``: blocks of 128 rows fill the device.

    Decoding is bound by the keys it reads: many of them in flight. Else the more rows a block has, the fewer times
    keys are read again.
    """
    family = _family(architecture)
    if element_size == 4:
        if few_rows:
            return [_blocks(16, 32, 8 if size > 128 else 4, 2, 32)]
        return [_blocks(32, 32 if size <= 128 else 16, 8, 2, 32 if size > 64 else 0)]
    if few_rows:
        return [_blocks(16, 64, 8, 2) if size > 128 else _blocks(16, 128 if size <= 64 else 64, 4, 3)]
    if size > 128:
        return [_blocks(32, 32, 8, 2)]
    if size > 64:
        short = _blocks(64, 64, 8, 2)
        many = {80: _blocks(64, 32, 8, 3), 90: _blocks(128, 64, 8, 2), 100: _blocks(128, 32, 8, 3)}[family]
    else:
        short, many = _blocks(64, 64, 4, 3), _blocks(128, 64, 8, 3)
    return [many, short] if crowded else [short, many]


def bwd_query_blocks(architecture: int, element_size: int, size: int) -> list[Blocks]:
    if element_size == 4:
        return [_blocks(32, 32, 8, 1) if size <= 64 else _blocks(32 if size <= 128 else 16, 32, 8, 2, 32)]
    if size > 128:
        return [_blocks(32, 32, 8, 1)]
    if size > 64:
        return [_blocks(64, 64, 8, 2), _blocks(64, 32, 8, 3)]
    few = _blocks(32, 64, 4, 2)
    return [few] if _family(architecture) == 80 else [_blocks(64, 64, 4, 2), few]


def bwd_key_blocks(architecture: int, element_size: int, size: int) -> list[Blocks]:
    if element_size == 4:
        return [_blocks(32, 32, 8, 1) if size <= 64 else _blocks(16, 32 if size <= 128 else 16, 8, 2, 32)]
    if size > 128:
        return [_blocks(32, 32, 8, 1)]
    return [_blocks(32 if size > 64 or _family(architecture) == 80 else 64, 64, 8, 2)]
