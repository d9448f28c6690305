"""What the attention kernels share: where blocks lie, what they load, and which keys a row sees.

A row of a block is one query row of one query head: the heads that share a key head are packed into the block, so
that a decode step reads its keys once. Which segment a block belongs to is found on the device, from the lengths.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Row and segment counts change from batch to batch: no kernel is compiled again for their values.
COUNTS = ["num_segments", "num_contexts", "num_rows", "num_keys", "num_heads", "num_key_heads", "num_splits"]
SEGMENTS_AT_ONCE = tl.constexpr(128)
LOG2_E = tl.constexpr(1.4426950408889634)
# float32 products on tensor cores, each as three of its 11-bit halves; nothing for other dtypes.
PRECISION = tl.constexpr("tf32x3")
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def find_block(p_q_len, num_segments, pid, GROUPS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """The segment of block ``pid`` (``num_segments`` if there is none) and the block's place in it."""
    segment = 0
    segment_first = 0
    base = 0
    for s in range(0, num_segments, SEGMENTS_AT_ONCE):
        o_s = s + tl.arange(0, SEGMENTS_AT_ONCE)
        b_len = tl.load(p_q_len + o_s, o_s < num_segments, 0)
        b_end = base + tl.cumsum(tl.cdiv(b_len * GROUPS, BLOCK_ROWS), 0)
        before = (b_end <= pid) & (o_s < num_segments)
        segment += tl.sum(before.to(tl.int32))
        segment_first = tl.maximum(segment_first, tl.max(tl.where(before, b_end, 0)))
        base = tl.max(b_end)
    return segment, pid - segment_first


@triton.jit
def block_rows(row, q_start, q_len, head, GROUPS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Place in the segment, row, query head and whether it exists, of the block's rows from ``row`` on."""
    o_row = row + tl.arange(0, BLOCK_ROWS)
    o_i = o_row // GROUPS
    return o_i, q_start + o_i, head * GROUPS + o_row % GROUPS, o_i < q_len


@triton.jit
def load_block(
    p_block, in_row, o_e, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, WIDEN: tl.constexpr
):
    """``[rows, BLOCK]`` at the pointers ``p_block``, 0 past ``SIZE`` and, if ``MASKED``, outside of ``in_row``."""
    if MASKED and SIZE != BLOCK:
        b = tl.load(p_block, in_row[:, None] & (o_e < SIZE)[None, :], 0.0)
    elif MASKED:
        b = tl.load(p_block, in_row[:, None], 0.0)
    elif SIZE != BLOCK:
        b = tl.load(p_block, (o_e < SIZE)[None, :], 0.0)
    else:
        b = tl.load(p_block)
    if WIDEN:
        b = b.to(tl.float32)
    return b


@triton.jit
def find_source(p_kv_start, p_kv_len, p_contexts, segment, c, num_contexts):
    """First key and number of keys of the segment's context ``c`` or, after the last, of the segment itself."""
    source = segment
    if c < num_contexts:
        source = tl.load(p_contexts + segment.to(tl.int64) * num_contexts + c)
    start = tl.zeros([], tl.int64)
    length = 0
    if source >= 0:
        start = tl.load(p_kv_start + source).to(tl.int64)
        length = tl.load(p_kv_len + source)
    return start, length


@triton.jit
def seen_keys(length, is_own, q_len, first_row, last_row):
    """Row i sees keys up to ``i + shift``; keys that all of the rows see, and that any of them sees."""
    shift = length
    everyone = length
    anyone = length
    if is_own:
        shift = length - q_len
        everyone = tl.maximum(tl.minimum(length, first_row + shift + 1), 0)
        anyone = tl.maximum(tl.minimum(length, last_row + shift + 1), 0)
    return shift, everyone, anyone
