"""Selection, backward: the gradient of k softmax draws without replacement, without anything of size k * N.

Slot j draws candidate i with probability ``p_ji``, and would gain ``a_ji = <grad_selected_j, memory_i>`` from it. Of
``dl_i = sum_j p_ji (a_ji - sum_i' p_ji' a_ji')``, one pass over the memory adds up ``own_i = sum_j p_ji a_ji`` and
``mean_j = sum_i p_ji a_ji``, so that ``dl_i = own_i - sum_j p_ji mean_j``. Each program's share goes into a place of
its own, and shares are added up in one order.
"""

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


@triton.jit
def _draw(b_logit, b_rank, slot, largest, inverse_sum, taken_logit):
    """Probabilities that ``slot`` draws the candidates, whose ``b_rank`` is the slot that took them."""
    return tl.exp(b_logit + tl.where(b_rank < slot, taken_logit, 0.0) - largest) * inverse_sum


@triton.jit(do_not_specialize=UNSPECIALIZED)
def select_memory_softmax_kernel(
    p_scores,  # [B, N]
    p_indices,  # [B, k]
    p_valid,  # [B, N] bool, read only with has_valid
    has_valid,
    p_ranks,  # [B, N] int32: the slot that took the candidate, k where none did
    p_softmax,  # [B, 2, k] float32: each slot's largest logit, then 1 / sum(exp(logit - largest))
    num_keys,
    k,
    inverse_temperature,
    taken_logit,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    inside = o_n < num_keys
    in_n = readable_keys(p_valid, batch * num_keys + o_n, inside, has_valid)
    # [BLOCK_N]
    b_logit = tl.load(p_scores + batch * num_keys + o_n, in_n, 0.0) * inverse_temperature
    b_logit = tl.where(in_n, b_logit, float("-inf"))
    b_rank = tl.zeros([BLOCK_N], tl.int32) + k
    p_largest = p_softmax + batch * 2 * k
    for slot in range(k):
        index = tl.load(p_indices + batch * k + slot)
        # An empty slot has no candidate left: it draws each with probability 0.
        largest = float("inf")
        inverse_sum = 0.0
        if index >= 0:
            largest = tl.max(b_logit)
            inverse_sum = 1.0 / tl.sum(tl.exp(b_logit - largest))
        tl.store(p_largest + slot, largest)
        tl.store(p_largest + k + slot, inverse_sum)
        b_logit = tl.where(o_n == index, b_logit + taken_logit, b_logit)
        b_rank = tl.where(o_n == index, slot, b_rank)
    tl.store(p_ranks + batch * num_keys + o_n, b_rank, inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def select_memory_affinity_kernel(
    p_grad_selected,  # [B, k, M]
    p_memory,  # [B, N, M]
    p_query,  # [B, M], or unused without squares
    p_valid,  # [B, N] bool, read only with has_valid
    has_valid,
    p_scores,  # [B, N]
    p_ranks,  # [B, N]
    p_softmax,  # [B, 2, k]
    p_own,  # [B, splits, N] float32: sum_j p_ji a_ji of the slots so far and this part of the elements
    p_mean,  # [B, parts * splits, k] float32: sum_i p_ji a_ji of this part of the candidates and of the elements
    p_squares,  # [B, splits, N + 1] float32 or unused: of the memory, then of the query
    num_keys,
    k,
    slot,
    size,
    inverse_temperature,
    taken_logit,
    SQUARES: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Slots from ``slot`` on, this program's part of the candidates, and its part of the M elements.

    Where the memory is the keys as well, their squares come from the same loads.
    """
    batch = tl.program_id(0).to(tl.int64)
    split = batch * tl.num_programs(2) + tl.program_id(2)
    o_k = slot + tl.arange(0, BLOCK_K)
    in_k = o_k < k
    # [BLOCK_K]
    b_largest = tl.load(p_softmax + batch * 2 * k + o_k, in_k, 0.0)
    b_inverse_sum = tl.load(p_softmax + (batch * 2 + 1) * k + o_k, in_k, 0.0)
    filled = b_inverse_sum != 0.0
    b_mean = tl.zeros([BLOCK_K], tl.float32)
    first, last = split_range(size, tl.program_id(2), tl.num_programs(2), BLOCK_M)
    low, high = split_range(num_keys, tl.program_id(1), tl.num_programs(1), BLOCK_N)
    for n in range(low, high, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        in_n = o_n < high
        o_key = batch * num_keys + o_n
        readable = readable_keys(p_valid, o_key, in_n, has_valid)
        # [BLOCK_K, BLOCK_N], [BLOCK_N]
        b_a = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
        b_square = tl.zeros([BLOCK_N], tl.float32)
        for m in range(first, last, BLOCK_M):
            o_m = m + tl.arange(0, BLOCK_M)
            in_m = o_m < last
            p_g = p_grad_selected + (batch * k + o_k[:, None]) * size + o_m[None, :]
            b_g = tl.load(p_g, filled[:, None] & in_m[None, :], 0.0)
            b_m = tl.load(p_memory + o_key[:, None] * size + o_m[None, :], readable[:, None] & in_m[None, :], 0.0)
            if WIDEN:
                b_g = b_g.to(tl.float32)
                b_m = b_m.to(tl.float32)
            if SQUARES:
                b_wide = b_m.to(tl.float32)
                b_square += tl.sum(b_wide * b_wide, 1)
            b_a = tl.dot(b_g, tl.trans(b_m), b_a, input_precision="tf32x3")
        # [BLOCK_N]
        b_logit = tl.load(p_scores + o_key, readable, 0.0) * inverse_temperature
        b_rank = tl.load(p_ranks + o_key, in_n, 0)
        # [BLOCK_K, BLOCK_N]
        b_p = _draw(
            b_logit[None, :], b_rank[None, :], o_k[:, None], b_largest[:, None], b_inverse_sum[:, None], taken_logit
        )
        b_gain = tl.where(readable[None, :] & filled[:, None], b_p * b_a, 0.0)
        b_mean += tl.sum(b_gain, 1)
        b_own = tl.sum(b_gain, 0)
        p_mine = p_own + split * num_keys + o_n
        if slot > 0:
            b_own += tl.load(p_mine, in_n, 0.0)
        tl.store(p_mine, b_own, in_n)
        if SQUARES:
            tl.store(p_squares + split * (num_keys + 1) + o_n, b_square, in_n)
    tl.store(p_mean + (split * tl.num_programs(1) + tl.program_id(1)) * k + o_k, b_mean, in_k)
    if SQUARES and tl.program_id(1) == 0:
        b_query_square = tl.zeros([8 * BLOCK_M], tl.float32)
        for m in range(first, last, 8 * BLOCK_M):
            o_m = m + tl.arange(0, 8 * BLOCK_M)
            b_q = tl.load(p_query + batch * size + o_m, o_m < last, 0.0).to(tl.float32)
            b_query_square += b_q * b_q
        tl.store(p_squares + split * (num_keys + 1) + num_keys, tl.sum(b_query_square))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def select_memory_grad_cosine_kernel(
    p_own,  # [B, splits, N]
    p_mean,  # [B, parts, k]
    p_softmax,  # [B, 2, k]
    p_ranks,  # [B, N]
    p_squares,  # [B, square_splits, N + 1]
    p_scores,  # [B, N]
    p_valid,  # [B, N] bool, read only with has_valid
    has_valid,
    p_grad_scores,  # [B, N]
    p_grad_cosine,  # [B, N] float32
    p_norms,  # [B, N + 1] float32: inverse norms of the keys, then of the query
    num_keys,
    k,
    num_splits,
    num_parts,
    num_square_splits,
    inverse_temperature,
    taken_logit,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """``own_i - sum_j p_ji mean_j``, slot after slot, over the temperature, plus dscores; and the norms."""
    batch = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    inside = o_n < num_keys
    # The last place of the squares is the query's.
    p_square = p_squares + batch * num_square_splits * (num_keys + 1)
    b_square = sum_of_parts(p_square, num_keys + 1, o_n, inside, num_square_splits, BLOCK_N, BLOCK_SPLITS)
    tl.store(p_norms + batch * (num_keys + 1) + o_n, inverse_norm(b_square), inside)
    query_square = 0.0
    for split in range(num_square_splits):
        query_square += tl.load(p_square + split * (num_keys + 1) + num_keys)
    tl.store(p_norms + batch * (num_keys + 1) + num_keys, inverse_norm(query_square))

    in_n = readable_keys(p_valid, batch * num_keys + o_n, inside, has_valid)
    # [BLOCK_N]
    b_logit = tl.load(p_scores + batch * num_keys + o_n, in_n, 0.0) * inverse_temperature
    b_rank = tl.load(p_ranks + batch * num_keys + o_n, inside, 0)
    b_grad = sum_of_parts(
        p_own + batch * num_splits * num_keys, num_keys, o_n, inside, num_splits, BLOCK_N, BLOCK_SPLITS
    )
    for slot in range(k):
        mean = 0.0
        for part in range(0, num_parts, BLOCK_PARTS):
            o_p = part + tl.arange(0, BLOCK_PARTS)
            mean += tl.sum(tl.load(p_mean + (batch * num_parts + o_p) * k + slot, o_p < num_parts, 0.0))
        largest = tl.load(p_softmax + batch * 2 * k + slot)
        inverse_sum = tl.load(p_softmax + (batch * 2 + 1) * k + slot)
        b_grad -= _draw(b_logit, b_rank, slot, largest, inverse_sum, taken_logit) * mean
    b_upstream = tl.load(p_grad_scores + batch * num_keys + o_n, in_n, 0.0).to(tl.float32)
    b_grad = tl.where(in_n, b_grad * inverse_temperature + b_upstream, 0.0)
    tl.store(p_grad_cosine + batch * num_keys + o_n, b_grad, inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def select_memory_grad_keys_kernel(
    p_query,  # [B, R]
    p_keys,  # [B, N, R]
    p_valid,  # [B, N] bool, read only with has_valid
    has_valid,
    p_scores,  # [B, N]
    p_norms,  # [B, N + 1]
    p_grad_cosine,  # [B, N]
    p_grad_query,  # [B, R]
    p_grad_keys,  # [B, N, R]
    num_keys,
    size,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The cosine's gradient for a block of the R dimensions and all candidates."""
    batch = tl.program_id(0).to(tl.int64)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_r = o_r < size
    p_norm = p_norms + batch * (num_keys + 1)
    query_inverse = tl.load(p_norm + num_keys)
    # [BLOCK_R]
    b_unit = tl.load(p_query + batch * size + o_r, in_r, 0.0).to(tl.float32) * query_inverse
    b_grad_query = tl.zeros([BLOCK_R], tl.float32)
    along = 0.0
    for n in tl.range(0, num_keys, BLOCK_N, num_stages=3):
        o_n = n + tl.arange(0, BLOCK_N)
        in_n = o_n < num_keys
        o_key = batch * num_keys + o_n
        readable = readable_keys(p_valid, o_key, in_n, has_valid)
        # [BLOCK_N]
        b_grad = tl.load(p_grad_cosine + o_key, in_n, 0.0)
        b_inverse = tl.load(p_norm + o_n, in_n, 0.0)
        b_score = tl.load(p_scores + o_key, in_n, 0.0)
        # [BLOCK_N, BLOCK_R]
        o_keys = o_key[:, None] * size + o_r[None, :]
        b_key = tl.load(p_keys + o_keys, readable[:, None] & in_r[None, :], 0.0).to(tl.float32) * b_inverse[:, None]
        b_grad_query += tl.sum(b_grad[:, None] * b_key, 0)
        along += tl.sum(b_grad * b_score)
        b_grad_key = (b_unit[None, :] - b_score[:, None] * b_key) * (b_grad * b_inverse)[:, None]
        tl.store(p_grad_keys + o_keys, b_grad_key.to(p_grad_keys.dtype.element_ty), in_n[:, None] & in_r[None, :])
    b_grad_query = (b_grad_query - along * b_unit) * query_inverse
    tl.store(p_grad_query + batch * size + o_r, b_grad_query.to(p_grad_query.dtype.element_ty), in_r)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def select_memory_grad_memory_kernel(
    p_grad_selected,  # [B, k, M]
    p_indices,  # [B, k]
    p_grad_memory,  # [B, N, M]
    num_keys,
    k,
    size,
    BLOCK_M: tl.constexpr,
):
    """The upstream gradient of the slot that took the candidate, 0 where none did."""
    row = tl.program_id(0).to(tl.int64)  # of [B * N]
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = row // num_keys
    key = row % num_keys
    taker = -1
    for slot in range(0, k, 32):
        o_k = slot + tl.arange(0, 32)
        b_index = tl.load(p_indices + batch * k + o_k, o_k < k, -1)
        taker = tl.maximum(taker, tl.max(tl.where(b_index == key, o_k, -1)))
    b_g = tl.load(p_grad_selected + (batch * k + taker) * size + o_m, o_m < tl.where(taker >= 0, size, 0), 0.0)
    tl.store(p_grad_memory + row * size + o_m, b_g, o_m < size)
