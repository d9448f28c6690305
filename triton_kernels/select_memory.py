"""Straight-through top-k selection of memories, forward and backward.

Forward: cosines, the k best of a row, a gather. Backward: how much each slot would gain from each candidate, the
softmax's gradient with one row of logits in registers, then one pass over keys and memory for the gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clara_fast.triton_kernels._launch import INTERPRETING, device_guard, num_splits

_BLOCK_R = 1024
_BLOCK_M = 1024
_SLOTS = 16  # the smallest side of a matrix product


@triton.jit
def _inverse_norm(square):
    """1 / sqrt, and 0 for a zero vector, whose cosine is 0."""
    return tl.where(square == 0.0, 0.0, 1.0 / tl.sqrt(square))


@triton.jit
def select_memory_scores_kernel(
    p_query,  # [B, R]
    p_keys,  # [B, N, R]
    p_valid,  # [B, N] bool or unused
    p_scores,  # [B, N] float32
    p_norms,  # [B, N + 1] float32: inverse norms of the keys, then of the query
    num_keys,
    size,
    HAS_VALID: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    key = tl.program_id(1)
    # What is invalid may hold anything: nothing of it is read.
    readable = size
    if HAS_VALID:
        readable = tl.where(tl.load(p_valid + batch * num_keys + key) != 0, size, 0)
    p_key = p_keys + (batch * num_keys + key) * size
    # [BLOCK_R]
    b_product = tl.zeros([BLOCK_R], tl.float32)
    b_query_square = tl.zeros([BLOCK_R], tl.float32)
    b_key_square = tl.zeros([BLOCK_R], tl.float32)
    for r in range(0, size, BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R)
        in_r = o_r < size
        b_q = tl.load(p_query + batch * size + o_r, in_r, 0.0).to(tl.float32)
        b_k = tl.load(p_key + o_r, o_r < readable, 0.0).to(tl.float32)
        b_product += b_q * b_k
        b_query_square += b_q * b_q
        b_key_square += b_k * b_k
    key_inverse = _inverse_norm(tl.sum(b_key_square))
    query_inverse = _inverse_norm(tl.sum(b_query_square))
    tl.store(p_scores + batch * num_keys + key, tl.sum(b_product) * key_inverse * query_inverse)
    p_norm = p_norms + batch * (num_keys + 1)
    tl.store(p_norm + key, key_inverse)
    if key == 0:
        tl.store(p_norm + num_keys, query_inverse)


@triton.jit
def select_memory_topk_kernel(
    p_scores,  # [B, N]
    p_valid,  # [B, N] bool or unused
    p_indices,  # [B, k] int64
    num_keys,
    k,
    HAS_VALID: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    in_n = o_n < num_keys
    # [BLOCK_N]; -2 for NaN and below for what cannot be taken: cosines are at least -1.
    b_score = tl.load(p_scores + batch * num_keys + o_n, in_n, 0.0)
    b_score = tl.where(b_score == b_score, b_score, -2.0)
    if HAS_VALID:
        in_n = in_n & (tl.load(p_valid + batch * num_keys + o_n, in_n, 0) != 0)
    b_score = tl.where(in_n, b_score, -3.0)
    for slot in range(k):
        best = tl.max(b_score)
        chosen = tl.min(tl.where(b_score == best, o_n, BLOCK_N))
        index = tl.where(best > -3.0, chosen, -1)
        tl.store(p_indices + batch * k + slot, index.to(tl.int64))
        b_score = tl.where(o_n == chosen, -3.0, b_score)


@triton.jit
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
    in_m = o_m < size
    index = tl.load(p_indices + row)
    source = (row // k) * num_keys + index
    b_m = tl.load(p_memory + source * size + o_m, o_m < tl.where(index >= 0, size, 0), 0.0)
    tl.store(p_selected + row * size + o_m, b_m, in_m)


@triton.jit
def select_memory_affinity_kernel(
    p_grad_selected,  # [B, k, M]
    p_memory,  # [B, N, M]
    p_valid,  # [B, N] bool or unused
    p_affinity,  # [B, SPLITS, k, N] float32
    num_keys,
    k,
    size,
    HAS_VALID: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``a[j, i] = <grad_selected[j], memory[i]>`` over this program's part of the M elements."""
    batch = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2) % SPLITS
    o_k = (tl.program_id(2) // SPLITS) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_n = o_n < num_keys
    readable = in_n
    if HAS_VALID:
        readable = in_n & (tl.load(p_valid + batch * num_keys + o_n, in_n, 0) != 0)
    in_k = o_k < k
    per_split = tl.cdiv(tl.cdiv(size, SPLITS), BLOCK_M) * BLOCK_M
    first = split * per_split
    # [BLOCK_K, BLOCK_N]
    b_a = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for m in range(first, tl.minimum(first + per_split, size), BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        in_m = o_m < size
        p_g = p_grad_selected + (batch * k + o_k[:, None]) * size + o_m[None, :]
        b_g = tl.load(p_g, in_k[:, None] & in_m[None, :], 0.0)
        p_m = p_memory + (batch * num_keys + o_n[:, None]) * size + o_m[None, :]
        b_m = tl.load(p_m, readable[:, None] & in_m[None, :], 0.0)
        if WIDEN:
            b_g = b_g.to(tl.float32)
            b_m = b_m.to(tl.float32)
        b_a = tl.dot(b_g, tl.trans(b_m), b_a, input_precision="ieee")
    p_a = p_affinity + ((batch * SPLITS + split) * k + o_k[:, None]) * num_keys + o_n[None, :]
    tl.store(p_a, b_a, in_k[:, None] & in_n[None, :])


@triton.jit
def select_memory_logits_kernel(
    p_affinity,  # [B, SPLITS, k, N]
    p_scores,  # [B, N]
    p_indices,  # [B, k]
    p_valid,  # [B, N] bool or unused
    p_grad_scores,  # [B, N]
    p_grad_cosine,  # [B, N] float32
    num_keys,
    k,
    inverse_temperature,
    taken_logit,
    HAS_VALID: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dl_i = sum_j p_ji (a_ji - sum_i' p_ji' a_ji')``, slot after slot, over the temperature, plus dscores."""
    batch = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    in_n = o_n < num_keys
    if HAS_VALID:
        in_n = in_n & (tl.load(p_valid + batch * num_keys + o_n, in_n, 0) != 0)
    # [BLOCK_N]
    b_logit = tl.load(p_scores + batch * num_keys + o_n, in_n, 0.0) * inverse_temperature
    b_logit = tl.where(in_n, b_logit, float("-inf"))
    b_grad = tl.zeros([BLOCK_N], tl.float32)
    for slot in range(k):
        index = tl.load(p_indices + batch * k + slot)
        b_a = tl.zeros([BLOCK_N], tl.float32)
        for split in range(SPLITS):
            b_a += tl.load(p_affinity + ((batch * SPLITS + split) * k + slot) * num_keys + o_n, in_n, 0.0)
        # An empty slot has no candidate left: its softmax is over nothing.
        if index >= 0:
            b_p = tl.exp(b_logit - tl.max(b_logit))
            b_p = b_p / tl.sum(b_p)
            b_grad += b_p * (b_a - tl.sum(b_p * b_a))
        b_logit = tl.where(o_n == index, b_logit + taken_logit, b_logit)
    b_upstream = tl.load(p_grad_scores + batch * num_keys + o_n, in_n, 0.0).to(tl.float32)
    b_grad = tl.where(in_n, b_grad * inverse_temperature + b_upstream, 0.0)
    tl.store(p_grad_cosine + batch * num_keys + o_n, b_grad, o_n < num_keys)


@triton.jit
def select_memory_grad_keys_kernel(
    p_query,  # [B, R]
    p_keys,  # [B, N, R]
    p_valid,  # [B, N] bool or unused
    p_scores,  # [B, N]
    p_norms,  # [B, N + 1]
    p_grad_cosine,  # [B, N]
    p_grad_query,  # [B, R]
    p_grad_keys,  # [B, N, R]
    num_keys,
    size,
    HAS_VALID: tl.constexpr,
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
    for key in range(num_keys):
        o_key = batch * num_keys + key
        readable = size
        if HAS_VALID:
            readable = tl.where(tl.load(p_valid + o_key) != 0, size, 0)
        grad = tl.load(p_grad_cosine + o_key)
        inverse = tl.load(p_norm + key)
        score = tl.load(p_scores + o_key)
        b_key = tl.load(p_keys + o_key * size + o_r, o_r < readable, 0.0).to(tl.float32) * inverse
        b_grad_query += grad * b_key
        along += grad * score
        b_grad_key = (b_unit - score * b_key) * (grad * inverse)
        tl.store(p_grad_keys + o_key * size + o_r, b_grad_key.to(p_grad_keys.dtype.element_ty), in_r)
    b_grad_query = (b_grad_query - along * b_unit) * query_inverse
    tl.store(p_grad_query + batch * size + o_r, b_grad_query.to(p_grad_query.dtype.element_ty), in_r)


@triton.jit
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
    in_m = o_m < size
    batch = row // num_keys
    key = row % num_keys
    taker = -1
    for slot in range(k):
        taker = tl.where(tl.load(p_indices + batch * k + slot) == key, slot, taker)
    b_g = tl.load(p_grad_selected + (batch * k + taker) * size + o_m, o_m < tl.where(taker >= 0, size, 0), 0.0)
    tl.store(p_grad_memory + row * size + o_m, b_g, in_m)


def _scores(query: Tensor, keys: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, count, size = keys.shape
    scores = torch.empty((batch, count), dtype=torch.float32, device=keys.device)
    norms = torch.empty((batch, count + 1), dtype=torch.float32, device=keys.device)
    select_memory_scores_kernel[(batch, count)](
        query, keys, valid, scores, norms, count, size, HAS_VALID=valid is not None, BLOCK_R=_BLOCK_R, num_warps=4
    )
    return scores, norms


def select_memory_fwd(
    query: Tensor, keys: Tensor, memory: Tensor, k: int, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Selected memories, indices and scores of contiguous inputs; B, N, R, M and k are not 0."""
    batch, count = keys.shape[:2]
    size = memory.shape[2] * memory.shape[3]
    selected = memory.new_empty((batch, k, *memory.shape[2:]))
    indices = torch.empty((batch, k), dtype=torch.int64, device=keys.device)
    with device_guard(keys):
        scores, _ = _scores(query, keys, valid)
        select_memory_topk_kernel[(batch,)](
            scores,
            valid,
            indices,
            count,
            k,
            HAS_VALID=valid is not None,
            BLOCK_N=triton.next_power_of_2(count),
            num_warps=1 if count <= 256 else 4,
        )
        grid = (batch * k, triton.cdiv(size, _BLOCK_M))
        select_memory_gather_kernel[grid](memory, indices, selected, count, k, size, BLOCK_M=_BLOCK_M, num_warps=4)
    return selected, indices, scores


def select_memory_bwd(
    grad_selected: Tensor,
    grad_scores: Tensor,
    query: Tensor,
    keys: Tensor,
    memory: Tensor,
    indices: Tensor,
    scores: Tensor,
    temperature: float,
    taken_logit: float,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, keys and memory; all inputs contiguous."""
    batch, count, key_size = keys.shape
    k, size = indices.shape[1], memory.shape[2] * memory.shape[3]
    has_valid = valid is not None
    grad_query, grad_keys, grad_memory = torch.empty_like(query), torch.empty_like(keys), torch.empty_like(memory)
    key_blocks, slot_blocks = triton.cdiv(count, 16), triton.cdiv(k, _SLOTS)
    splits = num_splits(batch * key_blocks * slot_blocks, triton.cdiv(size, 128), keys.device, most=64)
    affinity = torch.empty((batch, splits, k, count), dtype=torch.float32, device=keys.device)
    grad_cosine = torch.empty((batch, count), dtype=torch.float32, device=keys.device)
    with device_guard(keys):
        select_memory_affinity_kernel[(batch, key_blocks, slot_blocks * splits)](
            grad_selected,
            memory,
            valid,
            affinity,
            count,
            k,
            size,
            HAS_VALID=has_valid,
            SPLITS=splits,
            WIDEN=INTERPRETING,
            BLOCK_K=_SLOTS,
            BLOCK_N=16,
            BLOCK_M=128,
            num_warps=4,
            num_stages=3,
        )
        select_memory_logits_kernel[(batch,)](
            affinity,
            scores,
            indices,
            valid,
            grad_scores,
            grad_cosine,
            count,
            k,
            1.0 / temperature,
            taken_logit,
            HAS_VALID=has_valid,
            SPLITS=splits,
            BLOCK_N=triton.next_power_of_2(count),
            num_warps=1 if count <= 256 else 4,
        )
        # Norms again rather than kept: a saved tensor would be one more output of the operator.
        _, norms = _scores(query, keys, valid)
        select_memory_grad_keys_kernel[(batch, triton.cdiv(key_size, 256))](
            query,
            keys,
            valid,
            scores,
            norms,
            grad_cosine,
            grad_query,
            grad_keys,
            count,
            key_size,
            HAS_VALID=has_valid,
            BLOCK_R=256,
            num_warps=2,
        )
        select_memory_grad_memory_kernel[(batch * count, triton.cdiv(size, _BLOCK_M))](
            grad_selected, indices, grad_memory, count, k, size, BLOCK_M=_BLOCK_M, num_warps=4
        )
    return grad_query, grad_keys, grad_memory
