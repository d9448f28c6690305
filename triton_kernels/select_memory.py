"""Straight-through top-k selection of memories, forward and backward.

Forward: cosines, the k best of a row, a gather. Backward: how much each slot would gain from each candidate, the
softmax's gradient with one row of logits in registers, then one pass over the keys for their gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clara_fast.triton_kernels._launch import INTERPRETING, Blocks, device_guard, num_splits

# Candidates, slots and splits change from batch to batch: no kernel is compiled again for their values.
_COUNTS = ["num_keys", "k", "num_splits", "num_square_splits"]
_SLOTS = 16  # the smallest side of a matrix product
# Blocks of the passes over candidates: a thread holds 32 elements, 16 bytes of each row.
_ROWS: Blocks = {"BLOCK_N": 4, "BLOCK_R": 512, "num_warps": 2}
_COPY: Blocks = {"BLOCK_M": 1024, "num_warps": 4}


def _affinity_blocks(element_size: int) -> Blocks:
    """256 bytes of 16 candidates and 16 slots at a time, four deep."""
    return {"BLOCK_K": _SLOTS, "BLOCK_N": 16, "BLOCK_M": 256 // element_size, "num_warps": 4, "num_stages": 4}


def _row_of_candidates(count: int) -> Blocks:
    """All candidates of a question in the registers of one program, and the parts of a sum taken at a time."""
    block = max(triton.next_power_of_2(count), 16)
    warps = 1 if block <= 128 else 4 if block <= 2048 else 8
    return {"BLOCK_N": block, "BLOCK_SPLITS": max(min(2048 // block, 16), 1), "num_warps": warps}


@triton.jit
def _inverse_norm(square):
    """1 / sqrt, and 0 for a zero vector, whose cosine is 0."""
    return tl.where(square == 0.0, 0.0, 1.0 / tl.sqrt(square))


@triton.jit
def _split_range(size, split, num_splits, BLOCK: tl.constexpr):
    """The part [first, last) of ``size`` elements that is one of ``num_splits``."""
    per_split = tl.cdiv(tl.cdiv(size, num_splits), BLOCK) * BLOCK
    first = split * per_split
    return first, tl.minimum(first + per_split, size)


@triton.jit
def _readable(p_valid, o_key, in_n, HAS_VALID: tl.constexpr):
    """What is invalid may hold anything: nothing of it is read."""
    if HAS_VALID:
        return in_n & (tl.load(p_valid + o_key, in_n, 0) != 0)
    return in_n


@triton.jit
def _sum_of_parts(p_parts, stride, o_n, in_n, num_splits, BLOCK_N: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """``[BLOCK_N]``: the sum over ``num_splits`` rows, ``stride`` apart."""
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    for split in range(0, num_splits, BLOCK_SPLITS):
        o_s = split + tl.arange(0, BLOCK_SPLITS)
        p_part = p_parts + o_s[:, None].to(tl.int64) * stride + o_n[None, :]
        b_sum += tl.sum(tl.load(p_part, (o_s < num_splits)[:, None] & in_n[None, :], 0.0), 0)
    return b_sum


@triton.jit(do_not_specialize=_COUNTS)
def select_memory_products_kernel(
    p_query,  # [B, R]
    p_keys,  # [B, N, R]
    p_valid,  # [B, N] bool or unused
    p_products,  # [B, splits, N + 1] float32: <query, key>
    p_squares,  # [B, splits, N + 1] float32: of the keys, then of the query
    num_keys,
    size,
    HAS_VALID: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = o_n < num_keys
    o_key = batch * num_keys + o_n
    readable = _readable(p_valid, o_key, in_n, HAS_VALID)
    # [BLOCK_N, BLOCK_R], summed over R at the end
    b_product = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    b_square = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    b_query_square = tl.zeros([BLOCK_R], tl.float32)
    first, last = _split_range(size, tl.program_id(2), tl.num_programs(2), BLOCK_R)
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


@triton.jit(do_not_specialize=_COUNTS)
def select_memory_topk_kernel(
    p_products,  # [B, splits, N + 1]
    p_squares,  # [B, splits, N + 1]
    p_valid,  # [B, N] bool or unused
    p_scores,  # [B, N] float32
    p_indices,  # [B, k] int64
    num_keys,
    k,
    num_splits,
    HAS_VALID: tl.constexpr,
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
    b_square = _sum_of_parts(p_squares + part, num_keys + 1, o_n, in_n, num_splits, BLOCK_N, BLOCK_SPLITS)
    b_score = _sum_of_parts(p_products + part, num_keys + 1, o_n, in_n, num_splits, BLOCK_N, BLOCK_SPLITS)
    b_score = b_score * _inverse_norm(b_square) * _inverse_norm(query_square)
    tl.store(p_scores + batch * num_keys + o_n, b_score, in_n)
    # [BLOCK_N]; -2 for NaN and below for what cannot be taken: cosines are at least -1.
    b_score = tl.where(b_score == b_score, b_score, -2.0)
    b_score = tl.where(_readable(p_valid, batch * num_keys + o_n, in_n, HAS_VALID), b_score, -3.0)
    for slot in range(k):
        best = tl.max(b_score)
        chosen = tl.min(tl.where(b_score == best, o_n, BLOCK_N))
        index = tl.where(best > -3.0, chosen, -1)
        tl.store(p_indices + batch * k + slot, index.to(tl.int64))
        b_score = tl.where(o_n == chosen, -3.0, b_score)


@triton.jit(do_not_specialize=_COUNTS)
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


@triton.jit(do_not_specialize=_COUNTS)
def select_memory_affinity_kernel(
    p_grad_selected,  # [B, k, M]
    p_memory,  # [B, N, M]
    p_query,  # [B, M], or unused without squares
    p_valid,  # [B, N] bool or unused
    p_affinity,  # [B, splits, k, N] float32
    p_squares,  # [B, splits, N + 1] float32 or unused: of the memory, then of the query
    num_keys,
    k,
    size,
    num_splits,
    HAS_VALID: tl.constexpr,
    SQUARES: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``a[j, i] = <grad_selected[j], memory[i]>`` over this program's part of the M elements.

    Where the memory is the keys as well, their squares come from the same loads.
    """
    batch = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2) % num_splits
    slots = tl.program_id(2) // num_splits
    o_k = slots * BLOCK_K + tl.arange(0, BLOCK_K)
    in_n, in_k = o_n < num_keys, o_k < k
    o_key = batch * num_keys + o_n
    readable = _readable(p_valid, o_key, in_n, HAS_VALID)
    first, last = _split_range(size, split, num_splits, BLOCK_M)
    # [BLOCK_K, BLOCK_N], [BLOCK_N]
    b_a = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    b_square = tl.zeros([BLOCK_N], tl.float32)
    for m in range(first, last, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        in_m = o_m < last
        p_g = p_grad_selected + (batch * k + o_k[:, None]) * size + o_m[None, :]
        b_g = tl.load(p_g, in_k[:, None] & in_m[None, :], 0.0)
        b_m = tl.load(p_memory + o_key[:, None] * size + o_m[None, :], readable[:, None] & in_m[None, :], 0.0)
        if WIDEN:
            b_g = b_g.to(tl.float32)
            b_m = b_m.to(tl.float32)
        if SQUARES:
            b_wide = b_m.to(tl.float32)
            b_square += tl.sum(b_wide * b_wide, 1)
        b_a = tl.dot(b_g, tl.trans(b_m), b_a, input_precision="tf32x3")
    part = batch * num_splits + split
    p_a = p_affinity + (part * k + o_k[:, None]) * num_keys + o_n[None, :]
    tl.store(p_a, b_a, in_k[:, None] & in_n[None, :])
    if SQUARES:
        p_square = p_squares + part * (num_keys + 1)
        if slots == 0:
            tl.store(p_square + o_n, b_square, in_n)
            if tl.program_id(1) == 0:
                b_query_square = tl.zeros([8 * BLOCK_M], tl.float32)
                for m in range(first, last, 8 * BLOCK_M):
                    o_m = m + tl.arange(0, 8 * BLOCK_M)
                    b_q = tl.load(p_query + batch * size + o_m, o_m < last, 0.0).to(tl.float32)
                    b_query_square += b_q * b_q
                tl.store(p_square + num_keys, tl.sum(b_query_square))


@triton.jit(do_not_specialize=_COUNTS)
def select_memory_logits_kernel(
    p_affinity,  # [B, splits, k, N]
    p_squares,  # [B, square_splits, N + 1]
    p_scores,  # [B, N]
    p_indices,  # [B, k]
    p_valid,  # [B, N] bool or unused
    p_grad_scores,  # [B, N]
    p_grad_cosine,  # [B, N] float32
    p_norms,  # [B, N + 1] float32: inverse norms of the keys, then of the query
    num_keys,
    k,
    num_splits,
    num_square_splits,
    inverse_temperature,
    taken_logit,
    HAS_VALID: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """``dl_i = sum_j p_ji (a_ji - sum_i' p_ji' a_ji')``, slot after slot, over the temperature, plus dscores."""
    batch = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    inside = o_n < num_keys
    # The last place of the squares is the query's.
    p_square = p_squares + batch * num_square_splits * (num_keys + 1)
    b_square = _sum_of_parts(p_square, num_keys + 1, o_n, inside, num_square_splits, BLOCK_N, BLOCK_SPLITS)
    tl.store(p_norms + batch * (num_keys + 1) + o_n, _inverse_norm(b_square), inside)
    query_square = 0.0
    for split in range(num_square_splits):
        query_square += tl.load(p_square + split * (num_keys + 1) + num_keys)
    tl.store(p_norms + batch * (num_keys + 1) + num_keys, _inverse_norm(query_square))

    in_n = _readable(p_valid, batch * num_keys + o_n, inside, HAS_VALID)
    # [BLOCK_N]
    b_logit = tl.load(p_scores + batch * num_keys + o_n, in_n, 0.0) * inverse_temperature
    b_logit = tl.where(in_n, b_logit, float("-inf"))
    b_grad = tl.zeros([BLOCK_N], tl.float32)
    for slot in range(k):
        index = tl.load(p_indices + batch * k + slot)
        p_a = p_affinity + (batch * num_splits * k + slot) * num_keys
        b_a = _sum_of_parts(p_a, k.to(tl.int64) * num_keys, o_n, in_n, num_splits, BLOCK_N, BLOCK_SPLITS)
        # An empty slot has no candidate left: its softmax is over nothing.
        if index >= 0:
            b_p = tl.exp(b_logit - tl.max(b_logit))
            b_p = b_p / tl.sum(b_p)
            b_grad += b_p * (b_a - tl.sum(b_p * b_a))
        b_logit = tl.where(o_n == index, b_logit + taken_logit, b_logit)
    b_upstream = tl.load(p_grad_scores + batch * num_keys + o_n, in_n, 0.0).to(tl.float32)
    b_grad = tl.where(in_n, b_grad * inverse_temperature + b_upstream, 0.0)
    tl.store(p_grad_cosine + batch * num_keys + o_n, b_grad, inside)


@triton.jit(do_not_specialize=_COUNTS)
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
        readable = _readable(p_valid, o_key, in_n, HAS_VALID)
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


@triton.jit(do_not_specialize=_COUNTS)
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


def _products(query: Tensor, keys: Tensor, valid: Tensor | None) -> Tensor:
    """``[2, B, splits, N + 1]``: parts of the products with the query and of the squares."""
    batch, count, size = keys.shape
    blocks = triton.cdiv(count, _ROWS["BLOCK_N"])
    splits = num_splits(batch * blocks, min(triton.cdiv(size, 4 * _ROWS["BLOCK_R"]), 64), keys.device, per_processor=8)
    parts = torch.empty((2, batch, splits, count + 1), dtype=torch.float32, device=keys.device)
    select_memory_products_kernel[(batch, blocks, splits)](
        query, keys, valid, parts[0], parts[1], count, size, HAS_VALID=valid is not None, **_ROWS
    )
    return parts


def select_memory_fwd(
    query: Tensor, keys: Tensor, memory: Tensor, k: int, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Selected memories, indices and scores of contiguous inputs; B, N, R, M and k are not 0.

    Floor: ``B * N * R`` elements read and ``B * k * M`` read and written; 4 floating-point operations a key element.
    """
    batch, count = keys.shape[:2]
    size = memory.shape[2] * memory.shape[3]
    selected = memory.new_empty((batch, k, *memory.shape[2:]))
    indices = torch.empty((batch, k), dtype=torch.int64, device=keys.device)
    scores = torch.empty((batch, count), dtype=torch.float32, device=keys.device)
    with device_guard(keys):
        products, squares = _products(query, keys, valid)
        select_memory_topk_kernel[(batch,)](
            products,
            squares,
            valid,
            scores,
            indices,
            count,
            k,
            products.shape[1],
            HAS_VALID=valid is not None,
            **_row_of_candidates(count),
        )
        grid = (batch * k, triton.cdiv(size, _COPY["BLOCK_M"]))
        select_memory_gather_kernel[grid](memory, indices, selected, count, k, size, **_COPY)
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
    """Gradients of query, keys and memory; all inputs contiguous.

    Floor: ``B * N * M`` elements read for what each slot would gain, ``B * N * R`` read for the gradient that follows
    from it, and both written; ``2 * k`` floating-point operations a memory element, on tensor cores, and 6 a key
    element. That is what is read where keys and memory are one tensor; other keys are read once more, for their norms.
    """
    batch, count, key_size = keys.shape
    k, size = indices.shape[1], memory.shape[2] * memory.shape[3]
    has_valid = valid is not None
    one_tensor = keys.data_ptr() == memory.data_ptr() and key_size == size
    grad_query, grad_keys, grad_memory = torch.empty_like(query), torch.empty_like(keys), torch.empty_like(memory)
    blocks = _affinity_blocks(memory.element_size())
    key_blocks, slot_blocks = triton.cdiv(count, blocks["BLOCK_N"]), triton.cdiv(k, _SLOTS)
    most = min(triton.cdiv(size, 4 * blocks["BLOCK_M"]), 64)
    splits = num_splits(batch * key_blocks * slot_blocks, most, keys.device)
    affinity = torch.empty((batch, splits, k, count), dtype=torch.float32, device=keys.device)
    grad_cosine = torch.empty((batch, count), dtype=torch.float32, device=keys.device)
    norms = torch.empty((batch, count + 1), dtype=torch.float32, device=keys.device)
    with device_guard(keys):
        if one_tensor:
            squares = torch.empty((batch, splits, count + 1), dtype=torch.float32, device=keys.device)
        else:
            squares = _products(query, keys, valid)[1]
        select_memory_affinity_kernel[(batch, key_blocks, slot_blocks * splits)](
            grad_selected,
            memory,
            query,
            valid,
            affinity,
            squares,
            count,
            k,
            size,
            splits,
            HAS_VALID=has_valid,
            SQUARES=one_tensor,
            WIDEN=INTERPRETING,
            **blocks,
        )
        select_memory_logits_kernel[(batch,)](
            affinity,
            squares,
            scores,
            indices,
            valid,
            grad_scores,
            grad_cosine,
            norms,
            count,
            k,
            splits,
            squares.shape[1],
            1.0 / temperature,
            taken_logit,
            HAS_VALID=has_valid,
            **_row_of_candidates(count),
        )
        select_memory_grad_keys_kernel[(batch, triton.cdiv(key_size, _ROWS["BLOCK_R"]))](
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
            **_ROWS,
        )
        grid = (batch * count, triton.cdiv(size, _COPY["BLOCK_M"]))
        select_memory_grad_memory_kernel[grid](grad_selected, indices, grad_memory, count, k, size, **_COPY)
    return grad_query, grad_keys, grad_memory
