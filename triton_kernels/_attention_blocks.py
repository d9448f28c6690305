"""Blocks of the attention kernels by architecture, dtype and head size."""

from __future__ import annotations

from clara_fast.triton_kernels._launch import Blocks


def _blocks(rows: int, keys: int, warps: int, stages: int) -> Blocks:
    return {"BLOCK_ROWS": rows, "BLOCK_KEYS": keys, "num_warps": warps, "num_stages": stages}


def fwd_blocks(architecture: int, element_size: int, widest: int, few_rows: bool, crowded: bool) -> list[Blocks]:
    if element_size == 4:
        return [_blocks(32, 32, 8, 2)]
    if few_rows:
        return [_blocks(16, 64 if widest > 128 else 128, 4, 2)]
    if widest > 128:
        return [_blocks(64, 32, 8, 2)]
    return [_blocks(128, 64, 8, 3 if widest <= 64 else 2)]


def bwd_query_blocks(architecture: int, element_size: int, widest: int) -> list[Blocks]:
    if element_size == 4 or widest > 128:
        return [_blocks(32, 32, 8, 1)]
    return [_blocks(64, 64, 4 if widest <= 64 else 8, 2)]


def bwd_key_blocks(architecture: int, element_size: int, widest: int) -> list[Blocks]:
    return bwd_query_blocks(architecture, element_size, widest)
