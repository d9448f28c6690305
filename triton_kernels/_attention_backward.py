"""Attention, backward: one kernel per side, so that each gradient is summed by one program in one order."""

from __future__ import annotations

import triton
import triton.language as tl

from clara_fast.triton_kernels._attention_common import (
    LOG2_E,
    PRECISION,
    SEGMENTS_AT_ONCE,
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
def _load_lse(p_lse, o_q, in_row):
    """In base 2; a row that saw nothing has -inf, and sees nothing here either."""
    b_lse = tl.load(p_lse + o_q, in_row, 0.0)
    return tl.where(b_lse == float("-inf"), 0.0, b_lse) * LOG2_E


@triton.jit
def _bwd_query_step(
    b_q,  # [BLOCK_ROWS, BLOCK_E], or unused with CHUNK
    b_g,  # [BLOCK_ROWS, BLOCK_E], or unused with CHUNK
    b_lse,  # [BLOCK_ROWS]
    b_delta,  # [BLOCK_ROWS]
    b_acc,  # [BLOCK_ROWS, BLOCK_E]
    p_q,  # [BLOCK_ROWS]
    p_g,  # [BLOCK_ROWS]
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
    b_v = p_v
    if CHUNK == 0:
        b_k = load_rows(p_k, in_n, o_e, size, MASKED, WIDEN)
        b_v = load_rows(p_v, in_n, o_e, value_size, MASKED, WIDEN)
    # [BLOCK_ROWS, BLOCK_KEYS]
    b_s = products(b_q, b_k, p_q, in_row, p_k, in_n, size, CHUNK, WIDEN) * scale
    b_p = tl.exp2(b_s - b_lse[:, None])
    if MASKED:
        b_p = tl.where(in_n[None, :] & (o_n[None, :] <= b_last[:, None]), b_p, 0.0)
    b_dp = products(b_g, b_v, p_g, in_row, p_v, in_n, value_size, CHUNK, WIDEN)
    b_ds = b_p * (b_dp - b_delta[:, None])
    if CHUNK > 0:
        b_k = load_rows(p_k, in_n, o_e, size, MASKED, WIDEN)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_bwd_query_kernel(
    p_query,  # [Tq, Hq, E]
    p_key,  # [Tk, Hkv, E]
    p_value,  # [Tk, Hkv, Ev]
    p_grad_out,  # [Tq, Hq, Ev] contiguous
    p_out,  # [Tq, Hq, Ev] contiguous
    p_grad_lse,  # [Tq, Hq] float32, read only with has_grad_lse
    p_lse,  # [Tq, Hq] float32
    p_delta,  # [Tq, Hq] float32: written, rowsum(grad_out * out) - grad_lse
    p_grad_query,  # [Tq, Hq, E]
    p_q_start,
    p_q_len,
    p_kv_start,
    p_kv_len,
    p_contexts,
    scale,
    num_segments,
    num_contexts,
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
    has_grad_lse,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    segment, row = find_block(p_q_len, num_segments, pid, groups, BLOCK_ROWS)
    if segment >= num_segments:
        return
    head = tl.program_id(1).to(tl.int64)
    q_start, q_len = load_range(p_q_start, p_q_len, segment)
    o_i, o_t, o_h, in_row = block_rows(row, q_start, q_len, head, groups, BLOCK_ROWS)
    o_e = tl.arange(0, BLOCK_E)
    o_block = tl.arange(0, BLOCK_KEYS)
    o_q = o_t * num_heads + o_h
    # [BLOCK_ROWS], [BLOCK_ROWS, BLOCK_E]
    p_g = p_grad_out + o_q * value_size
    b_g = load_rows(p_g, in_row, o_e, value_size, True, WIDEN)
    b_out = load_rows(p_out + o_q * value_size, in_row, o_e, value_size, True, WIDEN)
    # [BLOCK_ROWS]
    b_delta = tl.sum(b_g.to(tl.float32) * b_out.to(tl.float32), 1)
    if has_grad_lse != 0:
        b_delta -= tl.load(p_grad_lse + o_q, in_row, 0.0)
    tl.store(p_delta + o_q, b_delta, in_row)
    b_lse = _load_lse(p_lse, o_q, in_row)
    # [BLOCK_ROWS], [BLOCK_ROWS, BLOCK_E]
    p_q = p_query + o_t * stride_qt + o_h * stride_qh
    b_q = p_q
    if CHUNK == 0:
        b_q = load_rows(p_q, in_row, o_e, size, True, WIDEN)
    b_acc = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
    # [BLOCK_KEYS]; the launcher keeps strides below 2^24.
    o_key = o_block * stride_kt
    o_value = o_block * stride_vt
    scale_2 = scale * LOG2_E
    for c in range(num_contexts + 1):
        start, length = find_source(p_kv_start, p_kv_len, p_contexts, segment, c, num_contexts)
        shift, everyone, anyone = seen_keys(length, c == num_contexts, row, q_len, groups, BLOCK_ROWS)
        whole = everyone // BLOCK_KEYS * BLOCK_KEYS
        for n in range(0, whole, BLOCK_KEYS):
            p_k = p_key + ((start + n) * stride_kt + head * stride_kh) + o_key
            p_v = p_value + ((start + n) * stride_vt + head * stride_vh) + o_value
            b_acc = _bwd_query_step(
                b_q, b_g, b_lse, b_delta, b_acc, p_q, p_g, in_row, p_k, p_v, n + o_block, o_i + shift, anyone, scale_2,
                o_e, size, value_size, False, WIDEN, CHUNK,
            )  # fmt: skip
        for n in range(whole, anyone, BLOCK_KEYS):
            p_k = p_key + ((start + n) * stride_kt + head * stride_kh) + o_key
            p_v = p_value + ((start + n) * stride_vt + head * stride_vh) + o_value
            b_acc = _bwd_query_step(
                b_q, b_g, b_lse, b_delta, b_acc, p_q, p_g, in_row, p_k, p_v, n + o_block, o_i + shift, anyone, scale_2,
                o_e, size, value_size, True, WIDEN, CHUNK,
            )  # fmt: skip
    store_rows(p_grad_query + o_q * size, b_acc * scale, in_row, o_e, size)


@triton.jit
def _bwd_key_step(
    b_k,  # [BLOCK_KEYS, BLOCK_E], or unused with CHUNK
    b_v,  # [BLOCK_KEYS, BLOCK_E], or unused with CHUNK
    b_dk,  # [BLOCK_KEYS, BLOCK_E]
    b_dv,  # [BLOCK_KEYS, BLOCK_E]
    p_k,  # [BLOCK_KEYS]
    p_v,  # [BLOCK_KEYS]
    in_k,  # [BLOCK_KEYS]
    p_query,
    p_grad_out,
    p_lse,
    p_delta,
    o_n,  # [BLOCK_KEYS], places of the keys in their segment
    row,
    q_start,
    q_len,
    length,
    shift,
    head,
    scale,
    stride_qt,
    stride_qh,
    num_heads,
    groups,
    o_e,
    size,
    value_size,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    o_i, o_t, o_h, in_row = block_rows(row, q_start, q_len, head, groups, BLOCK_ROWS)
    o_q = o_t * num_heads + o_h
    # [BLOCK_ROWS], [BLOCK_ROWS, BLOCK_E]; rows past the segment's are 0, and add nothing.
    p_q = p_query + o_t * stride_qt + o_h * stride_qh
    p_g = p_grad_out + o_q * value_size
    b_q = p_q
    b_g = p_g
    if CHUNK == 0:
        b_q = load_rows(p_q, in_row, o_e, size, True, WIDEN)
        b_g = load_rows(p_g, in_row, o_e, value_size, True, WIDEN)
    b_lse = _load_lse(p_lse, o_q, in_row)
    b_delta = tl.load(p_delta + o_q, in_row, 0.0)
    # [BLOCK_KEYS, BLOCK_ROWS]
    b_s = products(b_k, b_q, p_k, in_k, p_q, in_row, size, CHUNK, WIDEN) * scale
    b_p = tl.exp2(b_s - b_lse[None, :])
    if MASKED:
        in_n = (o_n >= 0) & (o_n < length)
        b_p = tl.where(in_n[:, None] & (o_n[:, None] <= o_i[None, :] + shift), b_p, 0.0)
    if CHUNK > 0:
        b_g = load_rows(p_g, in_row, o_e, value_size, True, WIDEN)
    b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)
    b_dp = products(b_v, b_g, p_v, in_k, p_g, in_row, value_size, CHUNK, WIDEN)
    b_ds = b_p * (b_dp - b_delta[None, :])
    if CHUNK > 0:
        b_q = load_rows(p_q, in_row, o_e, size, True, WIDEN)
    return tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION), b_dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_bwd_key_kernel(
    p_query,  # [Tq, Hq, E]
    p_key,  # [Tk, Hkv, E]
    p_value,  # [Tk, Hkv, Ev]
    p_grad_out,  # [Tq, Hq, Ev] contiguous
    p_lse,  # [Tq, Hq] float32
    p_delta,  # [Tq, Hq] float32
    p_grad_key,  # [Tk, Hkv, E]
    p_grad_value,  # [Tk, Hkv, Ev]
    p_q_start,
    p_q_len,
    p_kv_start,
    p_kv_len,
    p_readers,  # segments that read a context, by context, then by segment
    p_reader_ends,  # [S + 1], where the readers of each context start; the first entry counts the -1s
    scale,
    num_segments,
    num_contexts,
    num_keys,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    num_heads,
    num_key_heads,
    groups,
    size,
    value_size,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A block of key rows gathers from every segment that sees it: its own, and the readers of that as a context."""
    first = tl.program_id(0) * BLOCK_KEYS
    head = tl.program_id(1).to(tl.int64)
    o_block = tl.arange(0, BLOCK_KEYS)
    o_k = first.to(tl.int64) + o_block
    in_k = o_k < num_keys
    o_e = tl.arange(0, BLOCK_E)
    # [BLOCK_KEYS], [BLOCK_KEYS, BLOCK_E]
    p_k = p_key + o_k * stride_kt + head * stride_kh
    p_v = p_value + o_k * stride_vt + head * stride_vh
    b_k = p_k
    b_v = p_v
    if CHUNK == 0:
        b_k = load_rows(p_k, in_k, o_e, size, True, WIDEN)
        b_v = load_rows(p_v, in_k, o_e, value_size, True, WIDEN)
    b_dk = tl.zeros([BLOCK_KEYS, BLOCK_E], tl.float32)
    b_dv = tl.zeros([BLOCK_KEYS, BLOCK_E], tl.float32)
    scale_2 = scale * LOG2_E
    for s in range(0, num_segments, SEGMENTS_AT_ONCE):
        o_s = s + tl.arange(0, SEGMENTS_AT_ONCE)
        b_start = tl.load(p_kv_start + o_s, o_s < num_segments, 0)
        b_end = b_start + tl.load(p_kv_len + o_s, o_s < num_segments, 0)
        b_owns = (b_start < first + BLOCK_KEYS) & (b_end > first) & (b_start < b_end)
        owner = -1
        for _ in range(tl.sum(b_owns.to(tl.int32))):
            # The next segment that has some of the keys.
            owner = tl.min(tl.where(b_owns & (o_s > owner), o_s, num_segments))
            start = tl.load(p_kv_start + owner)
            length = tl.load(p_kv_len + owner)
            # Places in the owner's keys, and whether all of them are there.
            o_n = first - start + o_block
            inside = (start <= first) & (start + length >= first + BLOCK_KEYS)
            first_key = tl.maximum(first - start, 0)
            last_key = tl.minimum(first + BLOCK_KEYS - start, length) - 1
            reader = 0
            end = 0
            if num_contexts > 0:
                reader = tl.load(p_reader_ends + owner)
                end = tl.load(p_reader_ends + owner + 1)
            # The readers in full, then the owner's own rows up to the diagonal.
            for r in range(reader, end + 1):
                segment = owner
                if r < end:
                    segment = tl.load(p_readers + r)
                q_start, q_len = load_range(p_q_start, p_q_len, segment)
                # Row i sees keys up to i + shift: none of the block before first_row, all from whole_row on.
                shift = length
                first_row = 0
                whole_row = 0
                if r == end:
                    shift = length - q_len
                    first_row = tl.maximum(first_key - shift, 0)
                    whole_row = tl.maximum(last_key - shift, 0)
                end_row = q_len * groups
                begin = first_row * groups // BLOCK_ROWS * BLOCK_ROWS
                whole = tl.cdiv(whole_row * groups, BLOCK_ROWS) * BLOCK_ROWS
                if not inside:
                    whole = end_row
                for row in range(begin, tl.minimum(whole, end_row), BLOCK_ROWS):
                    b_dk, b_dv = _bwd_key_step(
                        b_k, b_v, b_dk, b_dv, p_k, p_v, in_k, p_query, p_grad_out, p_lse, p_delta, o_n, row, q_start,
                        q_len, length, shift, head, scale_2, stride_qt, stride_qh, num_heads, groups, o_e, size,
                        value_size, True, WIDEN, BLOCK_ROWS, CHUNK,
                    )  # fmt: skip
                for row in range(whole, end_row, BLOCK_ROWS):
                    b_dk, b_dv = _bwd_key_step(
                        b_k, b_v, b_dk, b_dv, p_k, p_v, in_k, p_query, p_grad_out, p_lse, p_delta, o_n, row, q_start,
                        q_len, length, shift, head, scale_2, stride_qt, stride_qh, num_heads, groups, o_e, size,
                        value_size, False, WIDEN, BLOCK_ROWS, CHUNK,
                    )  # fmt: skip
    o_out = o_k * num_key_heads + head
    store_rows(p_grad_key + o_out * size, b_dk * scale, in_k, o_e, size)
    store_rows(p_grad_value + o_out * value_size, b_dv, in_k, o_e, value_size)
