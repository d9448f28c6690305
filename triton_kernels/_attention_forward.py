"""Attention, forward: one pass over the keys that a block of rows sees, with a running softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from clara_fast.triton_kernels._attention_common import (
    LN_2,
    LOG2_E,
    PRECISION,
    UNSPECIALIZED,
    block_rows,
    find_block,
    find_source,
    load_range,
    load_rows,
    products,
    seen_keys,
    store_rows,
)


@triton.jit
def _fwd_step(
    b_q,  # [BLOCK_ROWS, BLOCK_E], or unused with CHUNK
    b_max,  # [BLOCK_ROWS], the largest score so far
    b_sum,  # [BLOCK_ROWS], the sum of exp2(score - b_max)
    b_acc,  # [BLOCK_ROWS, BLOCK_E]
    p_q,  # [BLOCK_ROWS]
    in_row,  # [BLOCK_ROWS]
    p_k,  # [BLOCK_KEYS]
    p_v,  # [BLOCK_KEYS]
    o_n,  # [BLOCK_KEYS], places of the keys in their segment
    b_last,  # [BLOCK_ROWS], the last key that a row sees
    length,
    scale,
    o_e,
    size,
    value_size,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    in_n = o_n < length
    b_k = p_k
    if CHUNK == 0:
        b_k = load_rows(p_k, in_n, o_e, size, MASKED, WIDEN)
    b_v = load_rows(p_v, in_n, o_e, value_size, MASKED, WIDEN)
    # [BLOCK_ROWS, BLOCK_KEYS]
    b_s = products(b_q, b_k, p_q, in_row, p_k, in_n, size, CHUNK, WIDEN) * scale
    if MASKED:
        b_s = tl.where(in_n[None, :] & (o_n[None, :] <= b_last[:, None]), b_s, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
    # A row that has seen nothing yet: subtract 0, so that exp2(-inf) is 0 and not NaN.
    b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max) if MASKED else b_new_max
    b_p = tl.exp2(b_s - b_base[:, None])
    b_decay = tl.exp2(b_max - b_base)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION)
    return b_new_max, b_sum, b_acc


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_fwd_kernel(
    p_query,  # [Tq, Hq, E]
    p_key,  # [Tk, Hkv, E]
    p_value,  # [Tk, Hkv, Ev]
    p_out,  # [Tq, Hq, Ev] or, with DECODE, [splits, Tq, Hq, Ev] float32
    p_lse,  # [Tq, Hq] float32 or, with DECODE, [splits, Tq, Hq]
    p_q_start,
    p_q_len,
    p_kv_start,
    p_kv_len,
    p_contexts,
    scale,
    num_segments,
    num_contexts,
    num_rows,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    num_heads,
    groups,
    size,
    value_size,
    DECODE: tl.constexpr,  # few rows: several programs may share the keys of a block
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # Later blocks of a segment see more keys: they start first.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    segment, row = find_block(p_q_len, num_segments, pid, groups, BLOCK_ROWS)
    if segment >= num_segments:
        return
    head = tl.program_id(1).to(tl.int64)
    q_start, q_len = load_range(p_q_start, p_q_len, segment)
    o_i, o_t, o_h, in_row = block_rows(row, q_start, q_len, head, groups, BLOCK_ROWS)
    o_e = tl.arange(0, BLOCK_E)
    o_block = tl.arange(0, BLOCK_KEYS)
    # [BLOCK_ROWS], [BLOCK_ROWS, BLOCK_E]
    p_q = p_query + o_t * stride_qt + o_h * stride_qh
    b_q = p_q
    if CHUNK == 0:
        b_q = load_rows(p_q, in_row, o_e, size, True, WIDEN)
    # [BLOCK_KEYS]; the launcher keeps strides below 2^24.
    o_key = o_block * stride_kt
    o_value = o_block * stride_vt
    b_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    b_acc = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
    scale_2 = scale * LOG2_E
    # This program's keys [low, high), counted through all of the sources.
    low = 0
    high = 0
    before = 0
    if DECODE:
        total = 0
        for c in range(num_contexts + 1):
            total += find_source(p_kv_start, p_kv_len, p_contexts, segment, c, num_contexts)[1]
        share = tl.cdiv(tl.cdiv(total, tl.num_programs(2)), BLOCK_KEYS) * BLOCK_KEYS
        low = tl.program_id(2) * share
        high = low + share
    # The contexts in full, then the segment's own keys up to the diagonal.
    for c in range(num_contexts + 1):
        start, length = find_source(p_kv_start, p_kv_len, p_contexts, segment, c, num_contexts)
        shift, everyone, anyone = seen_keys(length, c == num_contexts, row, q_len, groups, BLOCK_ROWS)
        # Blocks that nobody need mask, then the rest; where few rows wait for their keys, masks cost nothing.
        whole = everyone // BLOCK_KEYS * BLOCK_KEYS
        if DECODE:
            whole = tl.maximum(low - before, 0)
            anyone = tl.minimum(anyone, high - before)
            before += length
        if not DECODE:
            for n in range(0, whole, BLOCK_KEYS):
                p_k = p_key + ((start + n) * stride_kt + head * stride_kh) + o_key
                p_v = p_value + ((start + n) * stride_vt + head * stride_vh) + o_value
                b_max, b_sum, b_acc = _fwd_step(
                    b_q, b_max, b_sum, b_acc, p_q, in_row, p_k, p_v, n + o_block, o_i + shift, anyone, scale_2, o_e,
                    size, value_size, False, WIDEN, CHUNK,
                )  # fmt: skip
        for n in range(whole, anyone, BLOCK_KEYS):
            p_k = p_key + ((start + n) * stride_kt + head * stride_kh) + o_key
            p_v = p_value + ((start + n) * stride_vt + head * stride_vh) + o_value
            b_max, b_sum, b_acc = _fwd_step(
                b_q, b_max, b_sum, b_acc, p_q, in_row, p_k, p_v, n + o_block, o_i + shift, anyone, scale_2, o_e,
                size, value_size, True, WIDEN, CHUNK,
            )  # fmt: skip
    o_q = o_t * num_heads + o_h
    if DECODE:
        o_q += tl.program_id(2).to(tl.int64) * num_rows * num_heads
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    store_rows(p_out + o_q * value_size, b_out, in_row, o_e, value_size)
    tl.store(p_lse + o_q, (b_max + tl.log2(b_sum)) * LN_2, in_row)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_fwd_merge_kernel(
    p_part_out,  # [splits, Tq * Hq, Ev] float32
    p_part_lse,  # [splits, Tq * Hq] float32, -inf where a part saw nothing
    p_out,  # [Tq * Hq, Ev]
    p_lse,  # [Tq * Hq] float32
    num_rows,
    num_splits,
    value_size,
    BLOCK_E: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """One row of one head from its parts, always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_SPLITS)
    o_e = tl.arange(0, BLOCK_E)
    o_part = o_s.to(tl.int64) * num_rows + row
    # [BLOCK_SPLITS]
    b_lse = tl.load(p_part_lse + o_part, o_s < num_splits, float("-inf"))
    largest = tl.max(b_lse)
    b_weight = tl.exp(b_lse - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(b_weight)
    # [BLOCK_SPLITS, BLOCK_E]; what saw nothing may hold anything.
    inside = (b_weight > 0.0)[:, None] & (o_e < value_size)[None, :]
    b_part = tl.load(p_part_out + o_part[:, None] * value_size + o_e[None, :], inside, 0.0)
    b_out = tl.sum(b_part * b_weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(p_out + row * value_size + o_e, b_out.to(p_out.dtype.element_ty), o_e < value_size)
    tl.store(p_lse + row, largest + tl.log(total))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_clear_kernel(
    p_rows,  # [Tq, width]
    p_lse,  # [Tq, Hq] float32, written with has_lse
    p_q_start,
    p_q_len,
    num_segments,
    num_rows,
    width,
    num_heads,
    has_lse,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """0, and -inf in ``lse``, in the rows of no segment; nothing is written to others."""
    first = tl.program_id(0) * BLOCK_T
    o_t = first + tl.arange(0, BLOCK_T)
    # [BLOCK_T]
    b_covered = tl.zeros([BLOCK_T], tl.int32)
    for s in range(0, num_segments, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        b_start = tl.load(p_q_start + o_s, o_s < num_segments, 0)
        b_end = b_start + tl.load(p_q_len + o_s, o_s < num_segments, 0)
        inside = (o_t[:, None] >= b_start[None, :]) & (o_t[:, None] < b_end[None, :])
        b_covered += tl.sum(inside.to(tl.int32), 1)
    b_open = (b_covered == 0) & (o_t < num_rows)
    num_open = tl.sum(b_open.to(tl.int32))
    row = first - 1
    for _ in range(num_open):
        # The next of them.
        row = tl.min(tl.where(b_open & (o_t > row), o_t, num_rows))
        p_row = p_rows + row.to(tl.int64) * width
        for w in range(0, width, BLOCK_W):
            o_w = w + tl.arange(0, BLOCK_W)
            tl.store(p_row + o_w, tl.zeros([BLOCK_W], p_rows.dtype.element_ty), o_w < width)
        if has_lse != 0:
            for h in range(0, num_heads, BLOCK_S):
                o_h = h + tl.arange(0, BLOCK_S)
                b_lse = tl.full([BLOCK_S], float("-inf"), tl.float32)
                tl.store(p_lse + row.to(tl.int64) * num_heads + o_h, b_lse, o_h < num_heads)
