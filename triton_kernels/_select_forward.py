"""Selection, forward: cosines, the k best of a row, a gather."""

from __future__ import annotations

import triton
import triton.language as tl

from clara_fast.triton_kernels._select_common import (
    UNSPECIALIZED,
    inverse_norm,
    readable_keys,
    split_range,
    sum_of_parts,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def select_memory_products_kernel(
    p_query,  # [B, R]
    p_keys,  # [B, N, R]
    p_valid,  # [B, N] bool, read only with has_valid
    has_valid,
    p_products,  # [B, splits, N + 1] float32: <query, key>
    p_squares,  # [B, splits, N + 1] float32: of the keys, then of the query
    num_keys,
    size,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = o_n < num_keys
    o_key = batch * num_keys + o_n
    readable = readable_keys(p_valid, o_key, in_n, has_valid)
    # [BLOCK_N, BLOCK_R], summed over R at the end
    b_product = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    b_square = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    b_query_square = tl.zeros([BLOCK_R], tl.float32)
    first, last = split_range(size, tl.program_id(2), tl.num_programs(2), BLOCK_R)
    for r in tl.range(first, last, BLOCK_R, num_stages=3):
        o_r = r + tl.arange(0, BLOCK_R)
        in_r = o_r < last
        b_q = tl.load(p_query + batch * size + o_r, in_r, 0.0).to(tl.float32)
        p_key = p_keys + o_key[:, None] * size + o_r[None, :]
        b_k = tl.load(p_key, readable[:, None] & in_r[None, :], 0.0).to(tl.float32)
        b_product += b_q[None, :] * b_k
        b_square += b_k * b_k
        b_query_square += b_q * b_q
    row = (batch * tl.num_programs(2) + tl.program_id(2)) * (num_keys + 1)
    tl.store(p_products + row + o_n, tl.sum(b_product, 1), in_n)
    tl.store(p_squares + row + o_n, tl.sum(b_square, 1), in_n)
    if tl.program_id(1) == 0:
        tl.store(p_squares + row + num_keys, tl.sum(b_query_square))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def select_memory_topk_kernel(
    p_products,  # [B, splits, N + 1]
    p_squares,  # [B, splits, N + 1]
    p_scores,  # [B, N] float32
    p_indices,  # [B, k] int64
    p_valid,  # [B, N] bool, read only with has_valid
    has_valid,
    num_keys,
    k,
    num_splits,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    in_n = o_n < num_keys
    part = batch * num_splits * (num_keys + 1)
    query_square = 0.0
    for split in range(num_splits):
        query_square += tl.load(p_squares + part + split * (num_keys + 1) + num_keys)
    b_square = sum_of_parts(p_squares + part, num_keys + 1, o_n, in_n, num_splits, BLOCK_N, BLOCK_SPLITS)
    b_score = sum_of_parts(p_products + part, num_keys + 1, o_n, in_n, num_splits, BLOCK_N, BLOCK_SPLITS)
    b_score = b_score * inverse_norm(b_square) * inverse_norm(query_square)
    tl.store(p_scores + batch * num_keys + o_n, b_score, in_n)
    # [BLOCK_N]; -2 for NaN and below for what cannot be taken: cosines are at least -1.
    b_score = tl.where(b_score == b_score, b_score, -2.0)
    b_score = tl.where(readable_keys(p_valid, batch * num_keys + o_n, in_n, has_valid), b_score, -3.0)
    for slot in range(k):
        best = tl.max(b_score)
        chosen = tl.min(tl.where(b_score == best, o_n, BLOCK_N))
        index = tl.where(best > -3.0, chosen, -1)
        tl.store(p_indices + batch * k + slot, index.to(tl.int64))
        b_score = tl.where(o_n == chosen, -3.0, b_score)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def select_memory_gather_kernel(
    p_memory,  # [B, N, M]
    p_indices,  # [B, k]
    p_selected,  # [B, k, M]
    num_keys,
    k,
    size,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # of [B * k]
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    index = tl.load(p_indices + row)
    source = (row // k) * num_keys + index
    b_m = tl.load(p_memory + source * size + o_m, o_m < tl.where(index >= 0, size, 0), 0.0)
    tl.store(p_selected + row * size + o_m, b_m, o_m < size)
