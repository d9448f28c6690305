"""Attention over packed segments, some of which read others in full, forward and backward.

A row of a block is one query row of one query head: the heads that share a key head are packed into the block, so
that a decode step reads its keys once. Which segment a block belongs to is found on the device, from the lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clara_fast.triton_kernels._launch import INTERPRETING, device_guard

_BLOCK_S = 128


@triton.jit
def _find_block(p_q_len, num_segments, pid, GROUPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_S: tl.constexpr):
    """The segment of block ``pid`` (``num_segments`` if there is none) and the block's place in it."""
    segment = 0
    segment_first = 0
    base = 0
    for s in range(0, num_segments, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        b_len = tl.load(p_q_len + o_s, o_s < num_segments, 0)
        b_end = base + tl.cumsum(tl.cdiv(b_len * GROUPS, BLOCK_ROWS), 0)
        before = (b_end <= pid) & (o_s < num_segments)
        segment += tl.sum(before.to(tl.int32))
        segment_first = tl.maximum(segment_first, tl.max(tl.where(before, b_end, 0)))
        base = tl.max(b_end)
    return segment, pid - segment_first


@triton.jit
def _row_pointers(base, o_t, o_h, stride_t, stride_h, o_e):
    return base + o_t[:, None] * stride_t + o_h[:, None] * stride_h + o_e[None, :]


@triton.jit
def attention_fwd_kernel(
    p_query,  # [Tq, Hq, E]
    p_key,  # [Tk, Hkv, E]
    p_value,  # [Tk, Hkv, Ev]
    p_out,  # [Tq, Hq, Ev]
    p_lse,  # [Tq, Hq] float32
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
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    segment, block = _find_block(p_q_len, num_segments, tl.program_id(0), GROUPS, BLOCK_ROWS, BLOCK_S)
    if segment >= num_segments:
        return
    head = tl.program_id(1).to(tl.int64)
    q_start = tl.load(p_q_start + segment).to(tl.int64)
    q_len = tl.load(p_q_len + segment)
    own_len = tl.load(p_kv_len + segment)
    # Rows of the block: (query row, head in group).
    o_row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_i = o_row // GROUPS
    o_t = q_start + o_i
    o_h = head * GROUPS + o_row % GROUPS
    in_row = o_i < q_len
    o_e = tl.arange(0, BLOCK_E)
    o_v = tl.arange(0, BLOCK_V)
    # [BLOCK_ROWS, BLOCK_E]
    b_q = tl.load(
        _row_pointers(p_query, o_t, o_h, stride_qt, stride_qh, o_e), in_row[:, None] & (o_e < SIZE)[None, :], 0.0
    )
    if WIDEN:
        b_q = b_q.to(tl.float32)
    # [BLOCK_ROWS]; the maximum and the sum of exp2(scores - maximum).
    b_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    # [BLOCK_ROWS, BLOCK_V]
    b_acc = tl.zeros([BLOCK_ROWS, BLOCK_V], tl.float32)
    last_row = tl.minimum((block * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUPS, q_len - 1)
    for c in range(num_contexts + 1):
        # The contexts in full, then the segment's own keys up to the diagonal.
        is_own = c == num_contexts
        source = segment
        if not is_own:
            source = tl.load(p_contexts + segment * num_contexts + c)
        length = 0
        start = tl.zeros([], tl.int64)
        if source >= 0:
            length = tl.load(p_kv_len + source)
            start = tl.load(p_kv_start + source).to(tl.int64)
        # Row i sees keys up to i + shift.
        shift = length
        if is_own:
            shift = own_len - q_len
            length = tl.maximum(tl.minimum(length, last_row + shift + 1), 0)
        for n in range(0, length, BLOCK_KEYS):
            o_n = n + tl.arange(0, BLOCK_KEYS)
            in_n = o_n < length
            o_k = start + o_n
            # [BLOCK_KEYS, BLOCK_E]
            p_k = p_key + o_k[:, None] * stride_kt + head * stride_kh + o_e[None, :]
            b_k = tl.load(p_k, in_n[:, None] & (o_e < SIZE)[None, :], 0.0)
            # [BLOCK_KEYS, BLOCK_V]
            p_v = p_value + o_k[:, None] * stride_vt + head * stride_vh + o_v[None, :]
            b_v = tl.load(p_v, in_n[:, None] & (o_v < VALUE_SIZE)[None, :], 0.0)
            if WIDEN:
                b_k = b_k.to(tl.float32)
                b_v = b_v.to(tl.float32)
            # [BLOCK_ROWS, BLOCK_KEYS]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * 1.4426950408889634)
            seen = in_n[None, :] & (o_n[None, :] <= o_i[:, None] + shift)
            b_s = tl.where(seen, b_s, float("-inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
            # A row that has seen nothing yet: subtract 0, so that exp2(-inf) is 0 and not NaN.
            b_base = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
            b_p = tl.exp2(b_s - b_base[:, None])
            b_decay = tl.exp2(b_max - b_base)
            b_sum = b_sum * b_decay + tl.sum(b_p, 1)
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision="ieee")
            b_max = b_new_max
    b_out = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    o_q = o_t * num_heads + o_h
    tl.store(
        p_out + o_q[:, None] * VALUE_SIZE + o_v[None, :],
        b_out.to(p_out.dtype.element_ty),
        in_row[:, None] & (o_v < VALUE_SIZE)[None, :],
    )
    tl.store(p_lse + o_q, (b_max + tl.log2(b_sum)) * 0.6931471805599453, in_row)


@triton.jit
def attention_bwd_delta_kernel(
    p_grad_out,  # [Tq, Hq, Ev]
    p_out,  # [Tq, Hq, Ev]
    p_grad_lse,  # [Tq, Hq] or unused
    p_delta,  # [Tq, Hq] float32
    num_rows,
    HAS_GRAD_LSE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``delta = rowsum(grad_out * out) - grad_lse``."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_v = tl.arange(0, BLOCK_V)
    in_row = o_row < num_rows
    inside = in_row[:, None] & (o_v < VALUE_SIZE)[None, :]
    o_out = o_row[:, None] * VALUE_SIZE + o_v[None, :]
    b_grad = tl.load(p_grad_out + o_out, inside, 0.0).to(tl.float32)
    b_delta = tl.sum(b_grad * tl.load(p_out + o_out, inside, 0.0).to(tl.float32), 1)
    if HAS_GRAD_LSE:
        b_delta -= tl.load(p_grad_lse + o_row, in_row, 0.0)
    tl.store(p_delta + o_row, b_delta, in_row)


@triton.jit
def attention_bwd_query_kernel(
    p_query,
    p_key,
    p_value,
    p_grad_out,  # [Tq, Hq, Ev] contiguous
    p_lse,
    p_delta,
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
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    segment, block = _find_block(p_q_len, num_segments, tl.program_id(0), GROUPS, BLOCK_ROWS, BLOCK_S)
    if segment >= num_segments:
        return
    head = tl.program_id(1).to(tl.int64)
    q_start = tl.load(p_q_start + segment).to(tl.int64)
    q_len = tl.load(p_q_len + segment)
    own_len = tl.load(p_kv_len + segment)
    o_row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_i = o_row // GROUPS
    o_t = q_start + o_i
    o_h = head * GROUPS + o_row % GROUPS
    in_row = o_i < q_len
    o_e = tl.arange(0, BLOCK_E)
    o_v = tl.arange(0, BLOCK_V)
    in_e = in_row[:, None] & (o_e < SIZE)[None, :]
    in_v = in_row[:, None] & (o_v < VALUE_SIZE)[None, :]
    o_q = o_t * num_heads + o_h
    # [BLOCK_ROWS, BLOCK_E], [BLOCK_ROWS, BLOCK_V]
    b_q = tl.load(_row_pointers(p_query, o_t, o_h, stride_qt, stride_qh, o_e), in_e, 0.0)
    b_g = tl.load(p_grad_out + o_q[:, None] * VALUE_SIZE + o_v[None, :], in_v, 0.0)
    if WIDEN:
        b_q = b_q.to(tl.float32)
        b_g = b_g.to(tl.float32)
    # [BLOCK_ROWS]; a row that saw nothing has lse -inf and sees nothing here either.
    b_lse = tl.load(p_lse + o_q, in_row, 0.0)
    b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse) * 1.4426950408889634
    b_delta = tl.load(p_delta + o_q, in_row, 0.0)
    # [BLOCK_ROWS, BLOCK_E]
    b_acc = tl.zeros([BLOCK_ROWS, BLOCK_E], tl.float32)
    last_row = tl.minimum((block * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUPS, q_len - 1)
    for c in range(num_contexts + 1):
        is_own = c == num_contexts
        source = segment
        if not is_own:
            source = tl.load(p_contexts + segment * num_contexts + c)
        length = 0
        start = tl.zeros([], tl.int64)
        if source >= 0:
            length = tl.load(p_kv_len + source)
            start = tl.load(p_kv_start + source).to(tl.int64)
        shift = length
        if is_own:
            shift = own_len - q_len
            length = tl.maximum(tl.minimum(length, last_row + shift + 1), 0)
        for n in range(0, length, BLOCK_KEYS):
            o_n = n + tl.arange(0, BLOCK_KEYS)
            in_n = o_n < length
            o_k = start + o_n
            p_k = p_key + o_k[:, None] * stride_kt + head * stride_kh + o_e[None, :]
            b_k = tl.load(p_k, in_n[:, None] & (o_e < SIZE)[None, :], 0.0)
            p_v = p_value + o_k[:, None] * stride_vt + head * stride_vh + o_v[None, :]
            b_v = tl.load(p_v, in_n[:, None] & (o_v < VALUE_SIZE)[None, :], 0.0)
            if WIDEN:
                b_k = b_k.to(tl.float32)
                b_v = b_v.to(tl.float32)
            # [BLOCK_ROWS, BLOCK_KEYS]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * 1.4426950408889634)
            seen = in_row[:, None] & in_n[None, :] & (o_n[None, :] <= o_i[:, None] + shift)
            b_p = tl.where(seen, tl.exp2(b_s - b_lse[:, None]), 0.0)
            b_dp = tl.dot(b_g, tl.trans(b_v), input_precision="ieee")
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_acc = tl.dot(b_ds.to(b_k.dtype), b_k, b_acc, input_precision="ieee")
    p_out = p_grad_query + o_q[:, None] * SIZE + o_e[None, :]
    tl.store(p_out, (b_acc * scale).to(p_grad_query.dtype.element_ty), in_e)


@triton.jit
def attention_bwd_key_kernel(
    p_query,
    p_key,
    p_value,
    p_grad_out,  # [Tq, Hq, Ev] contiguous
    p_lse,
    p_delta,
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
    first = tl.program_id(0).to(tl.int64) * BLOCK_KEYS
    head = tl.program_id(1).to(tl.int64)
    o_k = first + tl.arange(0, BLOCK_KEYS)
    in_k = o_k < num_keys
    o_e = tl.arange(0, BLOCK_E)
    o_v = tl.arange(0, BLOCK_V)
    # [BLOCK_KEYS, BLOCK_E], [BLOCK_KEYS, BLOCK_V]
    in_ke = in_k[:, None] & (o_e < SIZE)[None, :]
    in_kv = in_k[:, None] & (o_v < VALUE_SIZE)[None, :]
    b_k = tl.load(p_key + o_k[:, None] * stride_kt + head * stride_kh + o_e[None, :], in_ke, 0.0)
    b_v = tl.load(p_value + o_k[:, None] * stride_vt + head * stride_vh + o_v[None, :], in_kv, 0.0)
    if WIDEN:
        b_k = b_k.to(tl.float32)
        b_v = b_v.to(tl.float32)
    b_dk = tl.zeros([BLOCK_KEYS, BLOCK_E], tl.float32)
    b_dv = tl.zeros([BLOCK_KEYS, BLOCK_V], tl.float32)
    for owner in range(num_segments):
        start = tl.load(p_kv_start + owner)
        length = tl.load(p_kv_len + owner)
        if (start < first + BLOCK_KEYS) & (start + length > first):
            # Places in the owner's keys.
            o_n = (o_k - start).to(tl.int32)
            in_n = (o_n >= 0) & (o_n < length)
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
                # Row i sees keys up to i + shift; rows before the first that sees this block are skipped.
                shift = length
                first_row = 0
                if r == end:
                    shift = length - q_len
                    first_key = tl.maximum(first - start, 0).to(tl.int32)
                    first_row = tl.maximum(first_key - shift, 0)
                for row in range((first_row * GROUPS // BLOCK_ROWS) * BLOCK_ROWS, q_len * GROUPS, BLOCK_ROWS):
                    o_row = row + tl.arange(0, BLOCK_ROWS)
                    o_i = o_row // GROUPS
                    o_t = q_start + o_i
                    o_h = head * GROUPS + o_row % GROUPS
                    in_row = o_i < q_len
                    o_q = o_t * num_heads + o_h
                    b_q = tl.load(
                        _row_pointers(p_query, o_t, o_h, stride_qt, stride_qh, o_e),
                        in_row[:, None] & (o_e < SIZE)[None, :],
                        0.0,
                    )
                    p_g = p_grad_out + o_q[:, None] * VALUE_SIZE + o_v[None, :]
                    b_g = tl.load(p_g, in_row[:, None] & (o_v < VALUE_SIZE)[None, :], 0.0)
                    if WIDEN:
                        b_q = b_q.to(tl.float32)
                        b_g = b_g.to(tl.float32)
                    b_lse = tl.load(p_lse + o_q, in_row, 0.0)
                    b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse) * 1.4426950408889634
                    b_delta = tl.load(p_delta + o_q, in_row, 0.0)
                    # [BLOCK_KEYS, BLOCK_ROWS]
                    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * (scale * 1.4426950408889634)
                    seen = in_n[:, None] & in_row[None, :] & (o_n[:, None] <= o_i[None, :] + shift)
                    b_p = tl.where(seen, tl.exp2(b_s - b_lse[None, :]), 0.0)
                    b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision="ieee")
                    b_dp = tl.dot(b_v, tl.trans(b_g), input_precision="ieee")
                    b_ds = b_p * (b_dp - b_delta[None, :])
                    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    o_out = o_k * num_key_heads + head
    tl.store(p_grad_key + o_out[:, None] * SIZE + o_e[None, :], (b_dk * scale).to(p_grad_key.dtype.element_ty), in_ke)
    tl.store(p_grad_value + o_out[:, None] * VALUE_SIZE + o_v[None, :], b_dv.to(p_grad_value.dtype.element_ty), in_kv)


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _sizes(query: Tensor, value: Tensor) -> dict[str, int]:
    return {
        "SIZE": query.shape[2],
        "VALUE_SIZE": value.shape[2],
        "BLOCK_E": max(triton.next_power_of_2(query.shape[2]), 16),
        "BLOCK_V": max(triton.next_power_of_2(value.shape[2]), 16),
    }


def _fwd_blocks(query: Tensor, rows: int, widest: int) -> dict[str, int]:
    """Few rows, as in decoding, take small blocks of rows and many keys at a time."""
    if query.element_size() == 4:
        return {"BLOCK_ROWS": 32, "BLOCK_KEYS": 32, "num_warps": 8, "num_stages": 2}
    if rows <= 16:
        return {"BLOCK_ROWS": 16, "BLOCK_KEYS": 64 if widest > 128 else 128, "num_warps": 4, "num_stages": 2}
    if widest > 128:
        return {"BLOCK_ROWS": 64, "BLOCK_KEYS": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_ROWS": 128, "BLOCK_KEYS": 64, "num_warps": 8, "num_stages": 3 if widest <= 64 else 2}


def _bwd_blocks(query: Tensor, widest: int) -> dict[str, int]:
    if query.element_size() == 4 or widest > 128:
        return {"BLOCK_ROWS": 32, "BLOCK_KEYS": 32, "num_warps": 8, "num_stages": 1}
    return {"BLOCK_ROWS": 64, "BLOCK_KEYS": 64, "num_warps": 4 if widest <= 64 else 8, "num_stages": 2}


def compressed_context_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, layout: tuple[Tensor, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """out ``[Tq, Hq, Ev]`` and lse ``[Tq, Hq]`` of ``query [Tq, Hq, E]``, ``key`` and ``value [Tk, Hkv, E or Ev]``.

    ``layout`` is ``q_start, q_len, kv_start, kv_len [S]`` and ``contexts [S, C]``, int32 and contiguous.
    """
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    rows, heads, key_heads = query.shape[0], query.shape[1], key.shape[1]
    segments, contexts = layout[4].shape
    # Rows of no segment stay 0 and -inf.
    out = query.new_zeros((rows, heads, value.shape[2]))
    lse = torch.full((rows, heads), float("-inf"), dtype=torch.float32, device=query.device)
    groups, sizes = heads // key_heads, _sizes(query, value)
    blocks = _fwd_blocks(query, rows * groups // max(segments, 1), max(sizes["BLOCK_E"], sizes["BLOCK_V"]))
    grid = (triton.cdiv(rows * groups, blocks["BLOCK_ROWS"]) + segments, key_heads)
    with device_guard(query):
        attention_fwd_kernel[grid](
            query,
            key,
            value,
            out,
            lse,
            *layout,
            scale,
            segments,
            contexts,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            heads,
            GROUPS=groups,
            WIDEN=INTERPRETING,
            BLOCK_S=_BLOCK_S,
            **sizes,
            **blocks,
        )
    return out, lse


def _readers(contexts: Tensor) -> tuple[Tensor, Tensor]:
    """The segments that read each context, in order, and where each context's begin, without leaving the device."""
    segments, width = contexts.shape
    read, order = contexts.flatten().sort(stable=True)
    bounds = torch.arange(segments + 1, dtype=torch.int32, device=contexts.device)
    return (order // max(width, 1)).to(torch.int32), torch.searchsorted(read, bounds, out_int32=True)


def compressed_context_attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: tuple[Tensor, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; ``out`` and ``lse`` as the forward pass returned them."""
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    grad_out, out = grad_out.contiguous(), out.contiguous()
    rows, heads, key_heads = query.shape[0], query.shape[1], key.shape[1]
    segments, contexts = layout[4].shape
    groups, sizes = heads // key_heads, _sizes(query, value)
    grad_query = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    grad_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    delta = torch.empty((rows, heads), dtype=torch.float32, device=query.device)
    blocks = _bwd_blocks(query, max(sizes["BLOCK_E"], sizes["BLOCK_V"]))
    strides = (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    with device_guard(query):
        attention_bwd_delta_kernel[(triton.cdiv(rows * heads, 64),)](
            grad_out,
            out,
            None if grad_lse is None else grad_lse.contiguous(),
            delta,
            rows * heads,
            HAS_GRAD_LSE=grad_lse is not None,
            VALUE_SIZE=sizes["VALUE_SIZE"],
            BLOCK_ROWS=64,
            BLOCK_V=sizes["BLOCK_V"],
            num_warps=4,
        )
        grid = (triton.cdiv(rows * groups, blocks["BLOCK_ROWS"]) + segments, key_heads)
        attention_bwd_query_kernel[grid](
            query,
            key,
            value,
            grad_out,
            lse,
            delta,
            grad_query,
            *layout,
            scale,
            segments,
            contexts,
            *strides,
            heads,
            GROUPS=groups,
            WIDEN=INTERPRETING,
            BLOCK_S=_BLOCK_S,
            **sizes,
            **blocks,
        )
        readers, reader_ends = _readers(layout[4]) if contexts else (layout[0], layout[0])
        attention_bwd_key_kernel[(triton.cdiv(key.shape[0], blocks["BLOCK_KEYS"]), key_heads)](
            query,
            key,
            value,
            grad_out,
            lse,
            delta,
            grad_key,
            grad_value,
            *layout[:4],
            readers,
            reader_ends,
            scale,
            segments,
            contexts,
            key.shape[0],
            *strides,
            heads,
            key_heads,
            GROUPS=groups,
            WIDEN=INTERPRETING,
            **sizes,
            **blocks,
        )
    return grad_query, grad_key, grad_value
