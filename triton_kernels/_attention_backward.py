"""Attention, backward: one kernel per side, so that each gradient is summed by one program in one order."""

from __future__ import annotations

import triton
import triton.language as tl

from clara_fast.triton_kernels._attention_common import (
    COUNTS,
    LOG2_E,
    PRECISION,
    SEGMENTS_AT_ONCE,
    block_rows,
    find_block,
    find_source,
    load_block,
    seen_keys,
)


@triton.jit
def _load_lse(p_lse, o_q, in_row):
    """In base 2; a row that saw nothing has -inf, and sees nothing here either."""
    b_lse = tl.load(p_lse + o_q, in_row, 0.0)
    return tl.where(b_lse == float("-inf"), 0.0, b_lse) * LOG2_E


@triton.jit
def _bwd_query_step(
    b_q,  # [BLOCK_ROWS, BLOCK_E]
    b_g,  # [BLOCK_ROWS, BLOCK_V]
    b_lse,  # [BLOCK_ROWS]
    b_delta,  # [BLOCK_ROWS]
    b_acc,  # [BLOCK_ROWS, BLOCK_E]
    p_k,  # [BLOCK_KEYS, BLOCK_E] pointers
    p_v,  # [BLOCK_KEYS, BLOCK_V] pointers
    o_n,  # [BLOCK_KEYS], places of the keys in their segment
    b_last,  # [BLOCK_ROWS], the last key that a row sees
    length,
    scale,
    o_e,
    o_v,
    MASKED: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    in_n = o_n < length
    b_k = load_block(p_k, in_n, o_e, SIZE, BLOCK_E, MASKED, WIDEN)
    b_v = load_block(p_v, in_n, o_v, VALUE_SIZE, BLOCK_V, MASKED, WIDEN)
    # [BLOCK_ROWS, BLOCK_KEYS]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    b_p = tl.exp2(b_s - b_lse[:, None])
    if MASKED:
        b_p = tl.where(in_n[None, :] & (o_n[None, :] <= b_last[:, None]), b_p, 0.0)
    b_dp = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=COUNTS)
def attention_bwd_query_kernel(
    p_query,  # [Tq, Hq, E]
    p_key,  # [Tk, Hkv, E]
    p_value,  # [Tk, Hkv, Ev]
    p_grad_out,  # [Tq, Hq, Ev] contiguous
    p_out,  # [Tq, Hq, Ev] contiguous
    p_grad_lse,  # [Tq, Hq] or unused
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
    HAS_GRAD_LSE: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    segment, block = find_block(p_q_len, num_segments, pid, GROUPS, BLOCK_ROWS)
    if segment >= num_segments:
        return
    head = tl.program_id(1).to(tl.int64)
    q_start = tl.load(p_q_start + segment).to(tl.int64)
    q_len = tl.load(p_q_len + segment)
    o_i, o_t, o_h, in_row = block_rows(block * BLOCK_ROWS, q_start, q_len, head, GROUPS, BLOCK_ROWS)
    first_row = block * BLOCK_ROWS // GROUPS
    last_row = tl.minimum((block * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUPS, q_len - 1)
    o_e = tl.arange(0, BLOCK_E)
    o_v = tl.arange(0, BLOCK_V)
    o_block = tl.arange(0, BLOCK_KEYS)
    o_q = o_t * num_heads + o_h
    # [BLOCK_ROWS, BLOCK_V]
    o_out = o_q[:, None] * VALUE_SIZE + o_v[None, :]
    b_g = load_block(p_grad_out + o_out, in_row, o_v, VALUE_SIZE, BLOCK_V, True, WIDEN)
    b_out = load_block(p_out + o_out, in_row, o_v, VALUE_SIZE, BLOCK_V, True, WIDEN)
    # [BLOCK_ROWS]
    b_delta = tl.sum(b_g.to(tl.float32) * b_out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        b_delta -= tl.load(p_grad_lse + o_q, in_row, 0.0)
    tl.store(p_delta + o_q, b_delta, in_row)
    b_lse = _load_lse(p_lse, o_q, in_row)
    # [BLOCK_ROWS, BLOCK_E]
    p_q = p_query + o_t[:, None] * stride_qt + o_h[:, None] * stride_qh + o_e[None, :]
    b_q = load_block(p_q, in_row, o_e, SIZE, BLOCK_E, True, WIDEN)
    b_acc = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
    # [BLOCK_KEYS, BLOCK_E], [BLOCK_KEYS, BLOCK_V]; the launcher keeps strides below 2^24.
    o_key = o_block[:, None] * stride_kt + o_e[None, :]
    o_value = o_block[:, None] * stride_vt + o_v[None, :]
    scale_2 = scale * LOG2_E
    for c in range(num_contexts + 1):
        start, length = find_source(p_kv_start, p_kv_len, p_contexts, segment, c, num_contexts)
        shift, everyone, anyone = seen_keys(length, c == num_contexts, q_len, first_row, last_row)
        whole = everyone // BLOCK_KEYS * BLOCK_KEYS
        for n in range(0, whole, BLOCK_KEYS):
            p_k = p_key + ((start + n) * stride_kt + head * stride_kh) + o_key
            p_v = p_value + ((start + n) * stride_vt + head * stride_vh) + o_value
            b_acc = _bwd_query_step(
                b_q, b_g, b_lse, b_delta, b_acc, p_k, p_v, n + o_block, o_i + shift, anyone, scale_2, o_e, o_v,
                False, SIZE, VALUE_SIZE, WIDEN, BLOCK_E, BLOCK_V,
            )  # fmt: skip
        for n in range(whole, anyone, BLOCK_KEYS):
            p_k = p_key + ((start + n) * stride_kt + head * stride_kh) + o_key
            p_v = p_value + ((start + n) * stride_vt + head * stride_vh) + o_value
            b_acc = _bwd_query_step(
                b_q, b_g, b_lse, b_delta, b_acc, p_k, p_v, n + o_block, o_i + shift, anyone, scale_2, o_e, o_v,
                True, SIZE, VALUE_SIZE, WIDEN, BLOCK_E, BLOCK_V,
            )  # fmt: skip
    p_grad = p_grad_query + o_q[:, None] * SIZE + o_e[None, :]
    tl.store(p_grad, (b_acc * scale).to(p_grad_query.dtype.element_ty), in_row[:, None] & (o_e < SIZE)[None, :])


@triton.jit
def _bwd_key_step(
    b_k,  # [BLOCK_KEYS, BLOCK_E]
    b_v,  # [BLOCK_KEYS, BLOCK_V]
    b_dk,  # [BLOCK_KEYS, BLOCK_E]
    b_dv,  # [BLOCK_KEYS, BLOCK_V]
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
    o_e,
    o_v,
    MASKED: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    o_i, o_t, o_h, in_row = block_rows(row, q_start, q_len, head, GROUPS, BLOCK_ROWS)
    o_q = o_t * num_heads + o_h
    # [BLOCK_ROWS, BLOCK_E], [BLOCK_ROWS, BLOCK_V]; rows past the segment's are 0, and add nothing.
    p_q = p_query + o_t[:, None] * stride_qt + o_h[:, None] * stride_qh + o_e[None, :]
    p_g = p_grad_out + o_q[:, None] * VALUE_SIZE + o_v[None, :]
    b_q = load_block(p_q, in_row, o_e, SIZE, BLOCK_E, True, WIDEN)
    b_g = load_block(p_g, in_row, o_v, VALUE_SIZE, BLOCK_V, True, WIDEN)
    b_lse = _load_lse(p_lse, o_q, in_row)
    b_delta = tl.load(p_delta + o_q, in_row, 0.0)
    # [BLOCK_KEYS, BLOCK_ROWS]
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
    b_p = tl.exp2(b_s - b_lse[None, :])
    if MASKED:
        in_n = (o_n >= 0) & (o_n < length)
        b_p = tl.where(in_n[:, None] & (o_n[:, None] <= o_i[None, :] + shift), b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)
    b_dp = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :])
    return tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION), b_dv


@triton.jit(do_not_specialize=COUNTS)
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
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A block of key rows gathers from every segment that sees it: its own, and the readers of that as a context."""
    first = tl.program_id(0) * BLOCK_KEYS
    head = tl.program_id(1).to(tl.int64)
    o_block = tl.arange(0, BLOCK_KEYS)
    o_k = first.to(tl.int64) + o_block
    in_k = o_k < num_keys
    o_e = tl.arange(0, BLOCK_E)
    o_v = tl.arange(0, BLOCK_V)
    # [BLOCK_KEYS, BLOCK_E], [BLOCK_KEYS, BLOCK_V]
    p_k = p_key + o_k[:, None] * stride_kt + head * stride_kh + o_e[None, :]
    p_v = p_value + o_k[:, None] * stride_vt + head * stride_vh + o_v[None, :]
    b_k = load_block(p_k, in_k, o_e, SIZE, BLOCK_E, True, WIDEN)
    b_v = load_block(p_v, in_k, o_v, VALUE_SIZE, BLOCK_V, True, WIDEN)
    b_dk = tl.zeros([BLOCK_KEYS, BLOCK_E], tl.float32)
    b_dv = tl.zeros([BLOCK_KEYS, BLOCK_V], tl.float32)
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
                q_start = tl.load(p_q_start + segment).to(tl.int64)
                q_len = tl.load(p_q_len + segment)
                # Row i sees keys up to i + shift: none of the block before first_row, all from whole_row on.
                shift = length
                first_row = 0
                whole_row = 0
                if r == end:
                    shift = length - q_len
                    first_row = tl.maximum(first_key - shift, 0)
                    whole_row = tl.maximum(last_key - shift, 0)
                end_row = q_len * GROUPS
                begin = first_row * GROUPS // BLOCK_ROWS * BLOCK_ROWS
                whole = tl.cdiv(whole_row * GROUPS, BLOCK_ROWS) * BLOCK_ROWS
                if not inside:
                    whole = end_row
                for row in range(begin, tl.minimum(whole, end_row), BLOCK_ROWS):
                    b_dk, b_dv = _bwd_key_step(
                        b_k, b_v, b_dk, b_dv, p_query, p_grad_out, p_lse, p_delta, o_n, row, q_start, q_len, length,
                        shift, head, scale_2, stride_qt, stride_qh, num_heads, o_e, o_v,
                        True, GROUPS, SIZE, VALUE_SIZE, WIDEN, BLOCK_ROWS, BLOCK_E, BLOCK_V,
                    )  # fmt: skip
                for row in range(whole, end_row, BLOCK_ROWS):
                    b_dk, b_dv = _bwd_key_step(
                        b_k, b_v, b_dk, b_dv, p_query, p_grad_out, p_lse, p_delta, o_n, row, q_start, q_len, length,
                        shift, head, scale_2, stride_qt, stride_qh, num_heads, o_e, o_v,
                        False, GROUPS, SIZE, VALUE_SIZE, WIDEN, BLOCK_ROWS, BLOCK_E, BLOCK_V,
                    )  # fmt: skip
    o_out = o_k * num_key_heads + head
    p_dk = p_grad_key + o_out[:, None] * SIZE + o_e[None, :]
    p_dv = p_grad_value + o_out[:, None] * VALUE_SIZE + o_v[None, :]
    tl.store(p_dk, (b_dk * scale).to(p_grad_key.dtype.element_ty), in_k[:, None] & (o_e < SIZE)[None, :])
    tl.store(p_dv, b_dv.to(p_grad_value.dtype.element_ty), in_k[:, None] & (o_v < VALUE_SIZE)[None, :])
