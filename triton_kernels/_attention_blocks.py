"""Blocks of the attention kernels by architecture, dtype and head size: the usual ones first, then others to try.

Chosen by compiling ahead of time: the largest blocks that keep everything in registers and within the shared memory of
the architecture (``tests/ops/triton_resources.json``). sm_86, sm_89 and sm_120 have less of it (99 KB) than sm_80,
whose blocks fit them too. Only float32 heads wider than 128 spill: three halves of a row each do not fit.
"""

from __future__ import annotations

import triton

from clara_fast.triton_kernels._launch import Blocks


def _blocks(rows: int, keys: int, warps: int, stages: int, chunk: int = 0) -> Blocks:
    """``chunk``: columns that the products of rows read at a time; 0 where the block's rows are held whole."""
    return {"BLOCK_ROWS": rows, "BLOCK_KEYS": keys, "CHUNK": chunk, "num_warps": warps, "num_stages": stages}


def head_block(size: int) -> int:
    """Columns of a block for heads of ``size``."""
    return max(triton.next_power_of_2(size), 32)


def _family(architecture: int) -> int:
    """90 has asynchronous products over a warp group, 100 tensor memory; every other works like 80."""
    return 90 if 90 <= architecture < 100 else 100 if 100 <= architecture < 120 else 80


def _usual_first(usual: Blocks, *others: Blocks) -> list[Blocks]:
    return [usual, *(blocks for blocks in others if blocks != usual)]


def fwd_blocks(architecture: int, element_size: int, widest: int, few_rows: bool, crowded: bool) -> list[Blocks]:
    """``widest``: the larger of the padded head sizes; ``few_rows``: decoding; ``crowded``: blocks of 128 rows fill it.

    Decoding is bound by the keys it reads: many of them in flight. Else the more rows a block has, the fewer times
    keys are read again.
    """
    family = _family(architecture)
    if element_size == 4:
        if widest > 128:
            return [_blocks(16, 16, 8, 2)]
        if few_rows:
            return _usual_first(_blocks(16, 32, 4, 2), _blocks(16, 32, 4, 1))
        return _usual_first(_blocks(32, 32 if widest <= 64 else 16, 8, 2), _blocks(16, 32, 4, 2))
    if few_rows:
        if widest > 128:
            return _usual_first(_blocks(16, 64, 8, 2), _blocks(16, 32, 4, 2))
        keys = 128 if widest <= 64 else 64
        return _usual_first(_blocks(16, keys, 4, 3), _blocks(16, keys, 4, 2), _blocks(16, keys // 2, 4, 4))
    if widest > 128:
        return _usual_first(_blocks(64, 32, 8, 1 if family == 100 else 2), _blocks(32, 32, 8, 2))
    if not crowded:
        return _usual_first(_blocks(64, 64 if widest <= 64 else 32, 4, 3), _blocks(32, 64, 4, 2))
    if widest <= 64:
        return _usual_first(_blocks(128, 64, 8, 3), _blocks(64, 64, 4, 3), _blocks(128, 128, 8, 2))
    usual = _blocks(128, 64, 8, 2) if family == 90 else _blocks(128, 32, 8, 3 if family == 100 else 2)
    return _usual_first(usual, _blocks(128, 32, 8, 3), _blocks(64, 32, 4, 3), _blocks(128, 64, 8, 3))


def bwd_query_blocks(architecture: int, element_size: int, widest: int) -> list[Blocks]:
    family = _family(architecture)
    if element_size == 4:
        if widest > 128:
            return [_blocks(16, 16, 8, 1)]
        return [_blocks(32, 32, 8, 1) if widest <= 64 else _blocks(16, 32, 4, 1)]
    if widest > 128:
        return _usual_first(_blocks(32, 32, 8, 1), _blocks(32, 64, 8, 1))
    if widest > 64:
        return _usual_first(_blocks(64, 64, 8, 2), _blocks(64, 32, 8, 3), _blocks(128, 32, 8, 2))
    usual = _blocks(32 if family == 80 or widest <= 32 else 64, 64, 4, 1 if widest <= 32 else 2)
    return _usual_first(usual, _blocks(64, 32, 4, 3), _blocks(128, 64, 8, 2))


def bwd_key_blocks(architecture: int, element_size: int, widest: int) -> list[Blocks]:
    family = _family(architecture)
    if element_size == 4:
        if widest > 128:
            return [_blocks(16, 16, 8, 1)]
        return [_blocks(32, 32, 8, 1) if widest <= 64 else _blocks(16, 16, 8, 1)]
    if widest > 128:
        return _usual_first(_blocks(32, 32, 8, 1), _blocks(64, 32, 8, 1))
    if widest > 64:
        usual = _blocks(32 if family == 90 else 64, 64, 8, 2)
        return _usual_first(usual, _blocks(32, 64, 8, 3), _blocks(32, 128, 8, 2))
    usual = _blocks(32 if family == 80 or widest <= 32 else 64, 64, 4, 1 if widest <= 32 else 2)
    return _usual_first(usual, _blocks(32, 64, 4, 3), _blocks(64, 128, 8, 2))
