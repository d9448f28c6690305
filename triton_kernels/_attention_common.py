"""What the attention kernels share: where blocks lie, what they load, and which keys a row sees.

A row of a block is one query row of one query head: the heads that share a key head are packed into the block, so
that a decode step reads its keys once. Which segment a block belongs to is found on the device, from the lengths.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Row and segment counts change from batch to batch: no kernel is compiled again for their values, nor for where small
# tensors lie. Of what is left, the launcher makes multiples of 16.
UNSPECIALIZED = [
    *("num_segments", "num_contexts", "num_rows", "num_keys", "num_heads", "num_key_heads", "num_splits"),
    *("groups", "has_lse", "has_grad_lse", "p_q_start", "p_q_len", "p_kv_start", "p_kv_len", "p_contexts"),
    *("p_readers", "p_reader_ends", "p_lse", "p_grad_lse", "p_delta", "p_part_lse"),
]
SEGMENTS_AT_ONCE = tl.constexpr(128)
LOG2_E = tl.constexpr(1.4426950408889634)
# float32 products on tensor cores, each as three of its 11-bit halves; nothing for other dtypes.
PRECISION = tl.constexpr("tf32x3")
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def find_block(p_q_len, num_segments, pid, groups, BLOCK_ROWS: tl.constexpr):
    """The segment of block ``pid`` (``num_segments`` if there is none) and the block's first row in it."""
    segment = 0
    segment_first = 0
    base = 0
    for s in range(0, num_segments, SEGMENTS_AT_ONCE):
        o_s = s + tl.arange(0, SEGMENTS_AT_ONCE)
        b_len = tl.load(p_q_len + o_s, o_s < num_segments, 0)
        b_end = base + tl.cumsum(tl.cdiv(b_len * groups, BLOCK_ROWS), 0)
        before = (b_end <= pid) & (o_s < num_segments)
        segment += tl.sum(before.to(tl.int32))
        segment_first = tl.maximum(segment_first, tl.max(tl.where(before, b_end, 0)))
        base = tl.max(b_end)
    return segment, (pid - segment_first) * BLOCK_ROWS


@triton.jit
def block_rows(row, q_start, q_len, head, groups, BLOCK_ROWS: tl.constexpr):
    """Place in the segment, row, query head and whether it exists, of the block's rows from ``row`` on."""
    o_row = row + tl.arange(0, BLOCK_ROWS)
    o_i = o_row // groups
    return o_i, q_start + o_i, head * groups + (o_row - o_i * groups), o_i < q_len


@triton.jit
def load_rows(p_rows, in_row, o_e, size, MASKED: tl.constexpr, WIDEN: tl.constexpr):
    """``[rows, columns]`` of the rows at ``p_rows``, 0 past ``size`` and, if ``MASKED``, outside of ``in_row``."""
    in_e = (o_e < size)[None, :]
    b = tl.load(p_rows[:, None] + o_e[None, :], in_row[:, None] & in_e if MASKED else in_e, 0.0)
    if WIDEN:
        b = b.to(tl.float32)
    return b


@triton.jit
def store_rows(p_rows, b, in_row, o_e, size):
    mask = in_row[:, None] & (o_e < size)[None, :]
    tl.store(p_rows[:, None] + o_e[None, :], b.to(p_rows.dtype.element_ty), mask)


@triton.jit
def products(b_left, b_right, p_left, in_left, p_right, in_right, size, CHUNK: tl.constexpr, WIDEN: tl.constexpr):
    """``left @ right.T``: of rows that are held or, with ``CHUNK``, that are read so many columns at a time.

    Wide rows of float32 do not fit the registers as the three halves that their products take.
    """
    if CHUNK == 0:
        return tl.dot(b_left, tl.trans(b_right), input_precision=PRECISION)
    else:
        b_product = tl.zeros([in_left.shape[0], in_right.shape[0]], tl.float32)
        for e in range(0, size, CHUNK):
            o_e = e + tl.arange(0, CHUNK)
            b_l = load_rows(p_left, in_left, o_e, size, True, WIDEN)
            b_r = load_rows(p_right, in_right, o_e, size, True, WIDEN)
            b_product = tl.dot(b_l, tl.trans(b_r), b_product, input_precision=PRECISION)
        return b_product


@triton.jit
def load_range(p_start, p_len, segment):
    """First row and number of rows of a segment."""
    return tl.load(p_start + segment).to(tl.int64), tl.load(p_len + segment)


@triton.jit
def find_source(p_kv_start, p_kv_len, p_contexts, segment, c, num_contexts):
    """First key and number of keys of the segment's context ``c`` or, after the last, of the segment itself."""
    source = segment
    if c < num_contexts:
        source = tl.load(p_contexts + segment.to(tl.int64) * num_contexts + c)
    start = tl.zeros([], tl.int64)
    length = 0
    if source >= 0:
        start, length = load_range(p_kv_start, p_kv_len, source)
    return start, length


@triton.jit
def seen_keys(length, is_own, row, q_len, groups, BLOCK_ROWS: tl.constexpr):
    """Row i sees keys up to ``i + shift``; keys that all rows of the block see, and that any of them sees."""
    shift = length
    everyone = length
    anyone = length
    if is_own:
        first_row = row // groups
        last_row = tl.minimum((row + BLOCK_ROWS - 1) // groups, q_len - 1)
        shift = length - q_len
        everyone = tl.maximum(tl.minimum(length, first_row + shift + 1), 0)
        anyone = tl.maximum(tl.minimum(length, last_row + shift + 1), 0)
    return shift, everyone, anyone
