"""Pooling, forward: memory rows, and the mean of a segment's document rows minus that of its memory rows."""

from __future__ import annotations

import triton
import triton.language as tl

from clara_fast.triton_kernels._pool_common import (
    UNSPECIALIZED,
    load_rows,
    my_rows,
    normed,
    square_sum,
    store_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def pool_memory_fwd_kernel(
    p_hidden,  # [T, D]
    p_offsets,  # [S + 1]
    p_weight,  # [D] or unused
    p_memory,  # [S, m, D]
    p_difference,  # [S, splits, D] float32: this program's part of mean(document) - mean(memory)
    p_mse,  # [S] float32, only written where a segment has one program
    num_memory,
    size,
    width,
    eps,
    HAS_NORM: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,  # 0: none
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    segment, start, memory_start, first, last = my_rows(p_offsets, num_memory)
    num_document = memory_start - start
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_D]; what is held of the tail has the same names with a 2.
    b_w = tl.zeros([BLOCK_D], tl.float32)
    b_difference = tl.zeros([BLOCK_D], tl.float32)
    if HAS_NORM:
        b_w = tl.load(p_weight + o_d, o_d < width, 0.0).to(tl.float32)
    if BLOCK_TAIL:
        o_d2 = BLOCK_D + tl.arange(0, BLOCK_TAIL)
        b_difference2 = tl.zeros([BLOCK_TAIL], tl.float32)
        b_w2 = tl.zeros([BLOCK_TAIL], tl.float32)
        if HAS_NORM:
            b_w2 = tl.load(p_weight + o_d2, o_d2 < width, 0.0).to(tl.float32)
    # Document rows, then memory rows.
    for is_memory in tl.static_range(2):
        b_sum = tl.zeros([BLOCK_D], tl.float32)
        if BLOCK_TAIL:
            b_sum2 = tl.zeros([BLOCK_TAIL], tl.float32)
        if is_memory:
            low, high = tl.maximum(first, memory_start), last
            share = -1.0 / num_memory
        else:
            low, high = first, tl.minimum(last, memory_start)
            share = 1.0 / tl.maximum(num_document, 1)
        for row in tl.range(low, high, BLOCK_T, num_stages=STAGES):
            o_t = row + tl.arange(0, BLOCK_T).to(tl.int64)
            in_t = o_t < high
            # [BLOCK_T, BLOCK_D]
            b_x = load_rows(p_hidden, o_t, in_t, o_d, width, WIDEN)
            if BLOCK_TAIL:
                b_x2 = load_rows(p_hidden, o_t, in_t, o_d2, width, WIDEN)
            if HAS_NORM:
                b_square = square_sum(b_x)
                if BLOCK_TAIL:
                    b_square += square_sum(b_x2)
                b_rstd = tl.rsqrt(b_square / size + eps)
                b_x = normed(b_x, b_rstd, b_w)
                if BLOCK_TAIL:
                    b_x2 = normed(b_x2, b_rstd, b_w2)
            b_sum += tl.sum(b_x.to(tl.float32), 0)
            if BLOCK_TAIL:
                b_sum2 += tl.sum(b_x2.to(tl.float32), 0)
            if is_memory:
                o_m = segment * num_memory + (o_t - memory_start)
                store_rows(p_memory, b_x, o_m, in_t, o_d, width)
                if BLOCK_TAIL:
                    store_rows(p_memory, b_x2, o_m, in_t, o_d2, width)
        b_difference += b_sum * share
        if BLOCK_TAIL:
            b_difference2 += b_sum2 * share
    # Without a document there is no distance.
    b_difference = tl.where(num_document > 0, b_difference, 0.0)
    p_mine = p_difference + (segment * tl.num_programs(1) + tl.program_id(1)) * width
    tl.store(p_mine + o_d, b_difference, o_d < width)
    square = tl.sum(b_difference * b_difference)
    if BLOCK_TAIL:
        b_difference2 = tl.where(num_document > 0, b_difference2, 0.0)
        tl.store(p_mine + o_d2, b_difference2, o_d2 < width)
        square += tl.sum(b_difference2 * b_difference2)
    if tl.num_programs(1) == 1:
        tl.store(p_mse + segment, square / size)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def pool_memory_fwd_sum_kernel(
    p_parts,  # [S, splits, D] float32
    p_difference,  # [S, D] float32
    p_mse,  # [S] float32
    size,
    width,
    num_splits,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    total = 0.0
    for d in range(0, width, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        in_d = o_d < width
        b_difference = tl.zeros([BLOCK_D], tl.float32)
        for split in range(0, num_splits, BLOCK_SPLITS):
            o_s = split + tl.arange(0, BLOCK_SPLITS)
            # [BLOCK_SPLITS, BLOCK_D]
            p_part = p_parts + (segment * num_splits + o_s[:, None]) * width + o_d[None, :]
            b_difference += tl.sum(tl.load(p_part, (o_s < num_splits)[:, None] & in_d[None, :], 0.0), 0)
        tl.store(p_difference + segment * width + o_d, b_difference, in_d)
        total += tl.sum(b_difference * b_difference)
    tl.store(p_mse + segment, total / size)
