"""Pooling, backward: gradients of the rows and of the norm's weight."""

from __future__ import annotations

import triton
import triton.language as tl

from clara_fast.triton_kernels._pool_common import UNSPECIALIZED, load_rows, my_rows, square_sum, store_rows, unit


@triton.jit
def _norm_bwd(b_grad, b_x, b_rstd, b_w, b_mean):
    """The norm's gradient of the rows, where ``b_mean`` is mean(grad * weight * normalised)."""
    b_normalised = b_x.to(tl.float32) * b_rstd[:, None]
    return (b_grad * b_w[None, :] - b_normalised * b_mean[:, None]) * b_rstd[:, None]


@triton.jit
def _norm_pull(b_grad, b_x, b_w):
    return tl.sum(b_grad * b_w[None, :] * b_x.to(tl.float32), 1)


@triton.jit
def _zero_rows(p_rows, low, high, o_d, width):
    """Zeros in rows [low, high), each by one of the programs."""
    b_zero = tl.zeros(o_d.shape, p_rows.dtype.element_ty)
    mine = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    for row in range(low + mine, high, tl.num_programs(0) * tl.num_programs(1)):
        tl.store(p_rows + row * width + o_d, b_zero, o_d < width)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def pool_memory_bwd_kernel(
    p_grad_memory,  # [S, m, D]
    p_grad_mse,  # [S] float32
    p_difference,  # [S, D] float32
    p_hidden,  # [T, D]
    p_offsets,  # [S + 1]
    p_weight,  # [D] or unused
    p_grad_hidden,  # [T, D]
    p_grad_weight,  # [S, splits, D] float32 or unused
    num_memory,
    size,
    width,
    eps,
    num_rows,
    HAS_NORM: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    segment, start, memory_start, first, last = my_rows(p_offsets, num_memory)
    num_document = memory_start - start
    # d mse / d (mean(document) - mean(memory)), times the upstream gradient
    factor = tl.load(p_grad_mse + segment) * (2.0 / size)
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_D]
    b_step = tl.load(p_difference + segment * width + o_d, o_d < width, 0.0) * factor
    b_w = tl.zeros([BLOCK_D], tl.float32)
    b_grad_weight = tl.zeros([BLOCK_D], tl.float32)
    if HAS_NORM:
        b_w = tl.load(p_weight + o_d, o_d < width, 0.0).to(tl.float32)
    if BLOCK_TAIL:
        o_d2 = BLOCK_D + tl.arange(0, BLOCK_TAIL)
        b_step2 = tl.load(p_difference + segment * width + o_d2, o_d2 < width, 0.0) * factor
        b_w2 = tl.zeros([BLOCK_TAIL], tl.float32)
        b_grad_weight2 = tl.zeros([BLOCK_TAIL], tl.float32)
        if HAS_NORM:
            b_w2 = tl.load(p_weight + o_d2, o_d2 < width, 0.0).to(tl.float32)
    # Document rows, then memory rows.
    for is_memory in tl.static_range(2):
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
            b_grad = tl.broadcast_to(b_step[None, :] * share, [BLOCK_T, BLOCK_D])
            if BLOCK_TAIL:
                b_grad2 = tl.broadcast_to(b_step2[None, :] * share, [BLOCK_T, BLOCK_TAIL])
            if is_memory:
                o_m = segment * num_memory + (o_t - memory_start)
                b_grad += load_rows(p_grad_memory, o_m, in_t, o_d, width, WIDEN).to(tl.float32)
                if BLOCK_TAIL:
                    b_grad2 += load_rows(p_grad_memory, o_m, in_t, o_d2, width, WIDEN).to(tl.float32)
            if HAS_NORM:
                # Rows past the end load 0, and add nothing.
                b_x = load_rows(p_hidden, o_t, in_t, o_d, width, WIDEN)
                b_square, b_pull = square_sum(b_x), _norm_pull(b_grad, b_x, b_w)
                if BLOCK_TAIL:
                    b_x2 = load_rows(p_hidden, o_t, in_t, o_d2, width, WIDEN)
                    b_square += square_sum(b_x2)
                    b_pull += _norm_pull(b_grad2, b_x2, b_w2)
                b_rstd = tl.rsqrt(b_square / size + eps)
                b_mean = b_pull * b_rstd / size
                b_grad_weight += tl.sum(b_grad * unit(b_x, b_rstd).to(tl.float32), 0)
                b_grad = _norm_bwd(b_grad, b_x, b_rstd, b_w, b_mean)
                if BLOCK_TAIL:
                    b_grad_weight2 += tl.sum(b_grad2 * unit(b_x2, b_rstd).to(tl.float32), 0)
                    b_grad2 = _norm_bwd(b_grad2, b_x2, b_rstd, b_w2, b_mean)
            store_rows(p_grad_hidden, b_grad, o_t, in_t, o_d, width)
            if BLOCK_TAIL:
                store_rows(p_grad_hidden, b_grad2, o_t, in_t, o_d2, width)
    if HAS_NORM:
        p_mine = p_grad_weight + (segment * tl.num_programs(1) + tl.program_id(1)) * width
        tl.store(p_mine + o_d, b_grad_weight, o_d < width)
        if BLOCK_TAIL:
            tl.store(p_mine + o_d2, b_grad_weight2, o_d2 < width)
    # Rows outside every segment.
    before = tl.load(p_offsets).to(tl.int64)
    after = tl.load(p_offsets + tl.num_programs(0)).to(tl.int64)
    _zero_rows(p_grad_hidden, 0, before, o_d, width)
    _zero_rows(p_grad_hidden, after, num_rows, o_d, width)
    if BLOCK_TAIL:
        _zero_rows(p_grad_hidden, 0, before, o_d2, width)
        _zero_rows(p_grad_hidden, after, num_rows, o_d2, width)
