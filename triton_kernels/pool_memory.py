"""Memory rows of packed sequences and the distance of their mean to the document's, forward and backward.

Each segment's rows are shared out to a fixed number of programs, so that the grid follows from shapes alone and
the sums are always taken in the same order. A row is held whole, since the norm needs it: as one block of a power of
two, or as two where that wastes fewer lanes (576 = 512 + 64).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clara_fast.triton_kernels._launch import INTERPRETING, Blocks, device_guard, launch, num_splits

# Segments and rows change from batch to batch: no kernel is compiled again for their values.
_COUNTS = ["num_memory", "num_rows", "num_splits"]
# Rows that are worth a program of their own, and programs whose sums are worth adding up afterwards.
_SPLIT_ROWS, _MOST_SPLITS = 32, 128
# Bytes of shared memory that loads may run ahead into: two blocks of threads fit the smallest processor.
_MOST_SHARED = 48 * 1024


@triton.jit
def _load_rows(p_rows, o_t, in_t, o_d, size, WIDEN: tl.constexpr):
    # [BLOCK_T, BLOCK_D]
    b_x = tl.load(p_rows + o_t[:, None] * size + o_d[None, :], in_t[:, None] & (o_d < size)[None, :], 0.0)
    if WIDEN:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def _store_rows(p_rows, b_x, o_t, in_t, o_d, size):
    p_out = p_rows + o_t[:, None] * size + o_d[None, :]
    tl.store(p_out, b_x.to(p_rows.dtype.element_ty), in_t[:, None] & (o_d < size)[None, :])


@triton.jit
def _square_sum(b_x):
    b_wide = b_x.to(tl.float32)
    return tl.sum(b_wide * b_wide, 1)


@triton.jit
def _unit(b_x, b_rstd):
    """Rows over their RMS, rounded as LlamaRMSNorm rounds them."""
    return (b_x.to(tl.float32) * b_rstd[:, None]).to(b_x.dtype)


@triton.jit
def _normed(b_x, b_rstd, b_w):
    return (_unit(b_x, b_rstd).to(tl.float32) * b_w[None, :]).to(b_x.dtype)


@triton.jit
def _my_rows(p_offsets, num_memory):
    """The segment's document and memory rows begin and end, and this program's share of all of them."""
    segment = tl.program_id(0).to(tl.int64)
    start = tl.load(p_offsets + segment).to(tl.int64)
    end = tl.load(p_offsets + segment + 1).to(tl.int64)
    per_split = tl.cdiv(end - start, tl.num_programs(1))
    first = start + tl.program_id(1) * per_split
    return segment, start, end - num_memory, first, tl.minimum(first + per_split, end)


@triton.jit(do_not_specialize=_COUNTS)
def pool_memory_fwd_kernel(
    p_hidden,  # [T, D]
    p_offsets,  # [S + 1]
    p_weight,  # [D] or unused
    p_memory,  # [S, m, D]
    p_difference,  # [S, splits, D] float32: this program's part of mean(document) - mean(memory)
    p_mse,  # [S] float32, or unused where a segment has several programs
    num_memory,
    size,
    eps,
    HAS_NORM: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,  # 0: none
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    segment, start, memory_start, first, last = _my_rows(p_offsets, num_memory)
    num_document = memory_start - start
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_D]; what is held of the tail has the same names with a 2.
    b_w = tl.zeros([BLOCK_D], tl.float32)
    b_difference = tl.zeros([BLOCK_D], tl.float32)
    if HAS_NORM:
        b_w = tl.load(p_weight + o_d, o_d < size, 0.0).to(tl.float32)
    if BLOCK_TAIL:
        o_d2 = BLOCK_D + tl.arange(0, BLOCK_TAIL)
        b_difference2 = tl.zeros([BLOCK_TAIL], tl.float32)
        b_w2 = tl.zeros([BLOCK_TAIL], tl.float32)
        if HAS_NORM:
            b_w2 = tl.load(p_weight + o_d2, o_d2 < size, 0.0).to(tl.float32)
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
            b_x = _load_rows(p_hidden, o_t, in_t, o_d, size, WIDEN)
            if BLOCK_TAIL:
                b_x2 = _load_rows(p_hidden, o_t, in_t, o_d2, size, WIDEN)
            if HAS_NORM:
                b_square = _square_sum(b_x)
                if BLOCK_TAIL:
                    b_square += _square_sum(b_x2)
                b_rstd = tl.rsqrt(b_square / size + eps)
                b_x = _normed(b_x, b_rstd, b_w)
                if BLOCK_TAIL:
                    b_x2 = _normed(b_x2, b_rstd, b_w2)
            b_sum += tl.sum(b_x.to(tl.float32), 0)
            if BLOCK_TAIL:
                b_sum2 += tl.sum(b_x2.to(tl.float32), 0)
            if is_memory:
                o_m = segment * num_memory + (o_t - memory_start)
                _store_rows(p_memory, b_x, o_m, in_t, o_d, size)
                if BLOCK_TAIL:
                    _store_rows(p_memory, b_x2, o_m, in_t, o_d2, size)
        b_difference += b_sum * share
        if BLOCK_TAIL:
            b_difference2 += b_sum2 * share
    # Without a document there is no distance.
    b_difference = tl.where(num_document > 0, b_difference, 0.0)
    p_mine = p_difference + (segment * tl.num_programs(1) + tl.program_id(1)) * size
    tl.store(p_mine + o_d, b_difference, o_d < size)
    if ONE_SPLIT:
        square = tl.sum(b_difference * b_difference)
    if BLOCK_TAIL:
        b_difference2 = tl.where(num_document > 0, b_difference2, 0.0)
        tl.store(p_mine + o_d2, b_difference2, o_d2 < size)
        if ONE_SPLIT:
            square += tl.sum(b_difference2 * b_difference2)
    if ONE_SPLIT:
        tl.store(p_mse + segment, square / size)


@triton.jit(do_not_specialize=_COUNTS)
def pool_memory_fwd_sum_kernel(
    p_parts,  # [S, splits, D] float32
    p_difference,  # [S, D] float32
    p_mse,  # [S] float32
    size,
    num_splits,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    total = 0.0
    for d in range(0, size, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        in_d = o_d < size
        b_difference = tl.zeros([BLOCK_D], tl.float32)
        for split in range(0, num_splits, BLOCK_SPLITS):
            o_s = split + tl.arange(0, BLOCK_SPLITS)
            # [BLOCK_SPLITS, BLOCK_D]
            p_part = p_parts + (segment * num_splits + o_s[:, None]) * size + o_d[None, :]
            b_difference += tl.sum(tl.load(p_part, (o_s < num_splits)[:, None] & in_d[None, :], 0.0), 0)
        tl.store(p_difference + segment * size + o_d, b_difference, in_d)
        total += tl.sum(b_difference * b_difference)
    tl.store(p_mse + segment, total / size)


@triton.jit
def _norm_bwd(b_grad, b_x, b_rstd, b_w, b_mean):
    """The norm's gradient of the rows, where ``b_mean`` is mean(grad * weight * normalised)."""
    b_normalised = b_x.to(tl.float32) * b_rstd[:, None]
    return (b_grad * b_w[None, :] - b_normalised * b_mean[:, None]) * b_rstd[:, None]


@triton.jit
def _norm_pull(b_grad, b_x, b_w):
    return tl.sum(b_grad * b_w[None, :] * b_x.to(tl.float32), 1)


@triton.jit
def _zero_rows(p_rows, low, high, o_d, size):
    """Zeros in rows [low, high), each by one of the programs."""
    b_zero = tl.zeros(o_d.shape, p_rows.dtype.element_ty)
    mine = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    for row in range(low + mine, high, tl.num_programs(0) * tl.num_programs(1)):
        tl.store(p_rows + row * size + o_d, b_zero, o_d < size)


@triton.jit(do_not_specialize=_COUNTS)
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
    eps,
    num_rows,
    HAS_NORM: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    segment, start, memory_start, first, last = _my_rows(p_offsets, num_memory)
    num_document = memory_start - start
    # d mse / d (mean(document) - mean(memory)), times the upstream gradient
    factor = tl.load(p_grad_mse + segment) * (2.0 / size)
    o_d = tl.arange(0, BLOCK_D)
    # [BLOCK_D]
    b_step = tl.load(p_difference + segment * size + o_d, o_d < size, 0.0) * factor
    b_w = tl.zeros([BLOCK_D], tl.float32)
    b_grad_weight = tl.zeros([BLOCK_D], tl.float32)
    if HAS_NORM:
        b_w = tl.load(p_weight + o_d, o_d < size, 0.0).to(tl.float32)
    if BLOCK_TAIL:
        o_d2 = BLOCK_D + tl.arange(0, BLOCK_TAIL)
        b_step2 = tl.load(p_difference + segment * size + o_d2, o_d2 < size, 0.0) * factor
        b_w2 = tl.zeros([BLOCK_TAIL], tl.float32)
        b_grad_weight2 = tl.zeros([BLOCK_TAIL], tl.float32)
        if HAS_NORM:
            b_w2 = tl.load(p_weight + o_d2, o_d2 < size, 0.0).to(tl.float32)
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
                b_grad += _load_rows(p_grad_memory, o_m, in_t, o_d, size, WIDEN).to(tl.float32)
                if BLOCK_TAIL:
                    b_grad2 += _load_rows(p_grad_memory, o_m, in_t, o_d2, size, WIDEN).to(tl.float32)
            if HAS_NORM:
                # Rows past the end load 0, and add nothing.
                b_x = _load_rows(p_hidden, o_t, in_t, o_d, size, WIDEN)
                b_square, b_pull = _square_sum(b_x), _norm_pull(b_grad, b_x, b_w)
                if BLOCK_TAIL:
                    b_x2 = _load_rows(p_hidden, o_t, in_t, o_d2, size, WIDEN)
                    b_square += _square_sum(b_x2)
                    b_pull += _norm_pull(b_grad2, b_x2, b_w2)
                b_rstd = tl.rsqrt(b_square / size + eps)
                b_mean = b_pull * b_rstd / size
                b_grad_weight += tl.sum(b_grad * _unit(b_x, b_rstd).to(tl.float32), 0)
                b_grad = _norm_bwd(b_grad, b_x, b_rstd, b_w, b_mean)
                if BLOCK_TAIL:
                    b_grad_weight2 += tl.sum(b_grad2 * _unit(b_x2, b_rstd).to(tl.float32), 0)
                    b_grad2 = _norm_bwd(b_grad2, b_x2, b_rstd, b_w2, b_mean)
            _store_rows(p_grad_hidden, b_grad, o_t, in_t, o_d, size)
            if BLOCK_TAIL:
                _store_rows(p_grad_hidden, b_grad2, o_t, in_t, o_d2, size)
    if HAS_NORM:
        p_mine = p_grad_weight + (segment * tl.num_programs(1) + tl.program_id(1)) * size
        tl.store(p_mine + o_d, b_grad_weight, o_d < size)
        if BLOCK_TAIL:
            tl.store(p_mine + o_d2, b_grad_weight2, o_d2 < size)
    # Rows outside every segment.
    before = tl.load(p_offsets).to(tl.int64)
    after = tl.load(p_offsets + tl.num_programs(0)).to(tl.int64)
    _zero_rows(p_grad_hidden, 0, before, o_d, size)
    _zero_rows(p_grad_hidden, after, num_rows, o_d, size)
    if BLOCK_TAIL:
        _zero_rows(p_grad_hidden, 0, before, o_d2, size)
        _zero_rows(p_grad_hidden, after, num_rows, o_d2, size)


def _row_blocks(size: int) -> Blocks:
    """One block of a power of two, or the largest inside and a second for the rest, if that is at most half of it."""
    block = max(triton.next_power_of_2(size), 16)
    tail = size - block // 2
    if 32 < block <= 4096 and tail <= block // 4:
        return {"BLOCK_D": block // 2, "BLOCK_TAIL": max(triton.next_power_of_2(tail), 16)}
    return {"BLOCK_D": block, "BLOCK_TAIL": 0}


def _tiles(size: int, element_size: int) -> list[Blocks]:
    """Configurations for rows of ``size``: the usual one, then others to try.

    A warp takes 512 elements of a row (two loads of 16 bytes a lane in bfloat16), so that most rows are summed within
    a warp. Loads run ahead through shared memory, as deep as it allows.
    """
    blocks = _row_blocks(size)
    block = blocks["BLOCK_D"]
    width = (block + blocks["BLOCK_TAIL"]) * element_size

    def tile(elements: int, stages: int) -> Blocks:
        warps = 16 if size > 4096 else max(min(block // 512, 8), 1)
        rows = max(elements * 32 * warps // block, 1)
        # The backward pass loads two tiles of memory rows.
        stages = max(min(stages, 1 + _MOST_SHARED // (2 * rows * width)), 1)
        return {"BLOCK_T": rows, "num_warps": warps, "STAGES": stages}

    tiles = [tile(16, 3), tile(16, 4), tile(16, 1), tile(32, 2)]
    return [candidate for place, candidate in enumerate(tiles) if candidate not in tiles[:place]]


def _splits(hidden: Tensor, segments: int) -> int:
    rows = hidden.shape[0] // max(segments, 1)
    return num_splits(segments, min(rows // _SPLIT_ROWS, _MOST_SPLITS), hidden.device)


def pool_memory_fwd(
    hidden: Tensor, offsets: Tensor, num_memory: int, norm_weight: Tensor | None, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """memory ``[S, m, D]``, mse ``[S]`` and the difference of the means ``[S, D]`` of contiguous ``hidden [T, D]``.

    S and D are not 0. Floor: ``T * D`` elements read and ``S * m * D`` written, and ``S * D`` float32 for the
    backward pass; 3 floating-point operations an element, 8 with a norm, and its conversions.
    """
    segments, size = offsets.shape[0] - 1, hidden.shape[1]
    splits = _splits(hidden, segments)
    memory = hidden.new_empty((segments, num_memory, size))
    mse = torch.empty(segments, dtype=torch.float32, device=hidden.device)
    difference = torch.empty((segments, size), dtype=torch.float32, device=hidden.device)
    parts = difference if splits == 1 else difference.new_empty((segments, splits, size))
    with device_guard(hidden):
        launch(
            pool_memory_fwd_kernel,
            (segments, splits),
            hidden,
            offsets,
            norm_weight,
            memory,
            parts,
            mse,
            num_memory,
            size,
            norm_eps,
            HAS_NORM=norm_weight is not None,
            ONE_SPLIT=splits == 1,
            WIDEN=INTERPRETING,
            **_row_blocks(size),
            candidates=_tiles(size, hidden.element_size()),
        )
        if splits > 1:
            pool_memory_fwd_sum_kernel[(segments,)](
                parts, difference, mse, size, splits, BLOCK_SPLITS=8, BLOCK_D=1024, num_warps=8
            )
    return memory, mse, difference


def pool_memory_bwd(
    grad_memory: Tensor,
    grad_mse: Tensor,
    difference: Tensor,
    hidden: Tensor,
    offsets: Tensor,
    num_memory: int,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``hidden`` and of the norm's weight (empty without one); all inputs contiguous.

    Floor: ``T * D`` elements written, as many read with a norm (none without), and ``grad_memory`` read; about 20
    floating-point operations an element with a norm.
    """
    segments, size = offsets.shape[0] - 1, hidden.shape[1]
    splits = _splits(hidden, segments)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = None
    if norm_weight is not None:
        grad_weight = torch.empty((segments * splits, size), dtype=torch.float32, device=hidden.device)
    with device_guard(hidden):
        launch(
            pool_memory_bwd_kernel,
            (segments, splits),
            grad_memory,
            grad_mse,
            difference,
            hidden,
            offsets,
            norm_weight,
            grad_hidden,
            grad_weight,
            num_memory,
            size,
            norm_eps,
            hidden.shape[0],
            HAS_NORM=norm_weight is not None,
            WIDEN=INTERPRETING,
            **_row_blocks(size),
            candidates=_tiles(size, hidden.element_size()),
        )
        if grad_weight is None:
            return grad_hidden, hidden.new_empty(0)
        return grad_hidden, grad_weight.sum(0).to(norm_weight.dtype)
