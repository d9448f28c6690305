"""What the pooling kernels share: rows, the RMSNorm of rows, and which of a segment's rows a program takes."""

from __future__ import annotations

import triton
import triton.language as tl

# Segments and rows change from batch to batch: no kernel is compiled again for their values. ``size`` counts the
# columns, ``width`` is the length of a row, which the launcher makes a multiple of 16.
UNSPECIALIZED = ["num_memory", "num_rows", "num_splits", "size", "p_offsets", "p_mse", "p_grad_mse"]


@triton.jit
def load_rows(p_rows, o_t, in_t, o_d, width, WIDEN: tl.constexpr):
    # [BLOCK_T, BLOCK_D]
    b_x = tl.load(p_rows + o_t[:, None] * width + o_d[None, :], in_t[:, None] & (o_d < width)[None, :], 0.0)
    if WIDEN:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def store_rows(p_rows, b_x, o_t, in_t, o_d, width):
    p_out = p_rows + o_t[:, None] * width + o_d[None, :]
    tl.store(p_out, b_x.to(p_rows.dtype.element_ty), in_t[:, None] & (o_d < width)[None, :])


@triton.jit
def square_sum(b_x):
    b_wide = b_x.to(tl.float32)
    return tl.sum(b_wide * b_wide, 1)


@triton.jit
def unit(b_x, b_rstd):
    """Rows over their RMS, rounded as LlamaRMSNorm rounds them."""
    return (b_x.to(tl.float32) * b_rstd[:, None]).to(b_x.dtype)


@triton.jit
def normed(b_x, b_rstd, b_w):
    return (unit(b_x, b_rstd).to(tl.float32) * b_w[None, :]).to(b_x.dtype)


@triton.jit
def my_rows(p_offsets, num_memory):
    """The segment's document and memory rows begin and end, and this program's share of all of them."""
    segment = tl.program_id(0).to(tl.int64)
    start = tl.load(p_offsets + segment).to(tl.int64)
    end = tl.load(p_offsets + segment + 1).to(tl.int64)
    per_split = tl.cdiv(end - start, tl.num_programs(1))
    first = start + tl.program_id(1) * per_split
    return segment, start, end - num_memory, first, tl.minimum(first + per_split, end)
