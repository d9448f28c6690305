"""Memory rows of packed sequences and the distance of their mean to the document's, forward and backward.

Each segment's rows are shared out to a fixed number of programs, so that the grid follows from shapes alone and
the sums are always taken in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clara_fast.triton_kernels._launch import INTERPRETING, device_guard, num_splits, warps_for

# Elements of hidden that one program holds at a time: enough in flight to saturate the memory, and for the
# backward pass, which keeps several such tiles, few enough for two programs on a processor.
_FWD_TILE, _BWD_TILE = 8192, 4096


@triton.jit
def _normalise(b_x, size, eps):
    """Rows over their RMS as LlamaRMSNorm rounds them, and the inverse RMS."""
    b_wide = b_x.to(tl.float32)
    b_rstd = tl.rsqrt(tl.sum(b_wide * b_wide, 1) / size + eps)
    return (b_wide * b_rstd[:, None]).to(b_x.dtype), b_rstd


@triton.jit
def _bounds(p_offsets, segment):
    return tl.load(p_offsets + segment).to(tl.int64), tl.load(p_offsets + segment + 1).to(tl.int64)


@triton.jit
def _my_rows(start, end, split, SPLITS: tl.constexpr):
    """This program's rows [first, last) of a segment."""
    per_split = tl.cdiv(end - start, SPLITS)
    first = start + split * per_split
    return first, tl.minimum(first + per_split, end)


@triton.jit
def pool_memory_sums_kernel(
    p_hidden,  # [T, D]
    p_offsets,  # [S + 1]
    p_weight,  # [D] or unused
    p_memory,  # [S, m, D] or unused
    p_sums,  # [S, SPLITS, 2, D] float32: document rows, memory rows
    num_memory,
    size,
    eps,
    HAS_NORM: tl.constexpr,
    STORE_MEMORY: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    start, end = _bounds(p_offsets, segment)
    first, last = _my_rows(start, end, split, SPLITS)
    memory_start = end - num_memory
    o_d = tl.arange(0, BLOCK_D)
    in_d = o_d < size
    # [BLOCK_D]
    b_document = tl.zeros([BLOCK_D], tl.float32)
    b_memory = tl.zeros([BLOCK_D], tl.float32)
    b_w = tl.zeros([BLOCK_D], tl.float32)
    if HAS_NORM:
        b_w = tl.load(p_weight + o_d, in_d, 0.0).to(tl.float32)
    for row in range(first, last, BLOCK_T):
        o_t = row + tl.arange(0, BLOCK_T).to(tl.int64)
        in_t = o_t < last
        # [BLOCK_T, BLOCK_D]
        inside = in_t[:, None] & in_d[None, :]
        b_x = tl.load(p_hidden + o_t[:, None] * size + o_d[None, :], inside, 0.0)
        if WIDEN:
            b_x = b_x.to(tl.float32)
        if HAS_NORM:
            b_unit = _normalise(b_x, size, eps)[0]
            b_x = (b_unit.to(tl.float32) * b_w[None, :]).to(b_x.dtype)
        is_memory = o_t >= memory_start
        b_wide = b_x.to(tl.float32)
        # where, not a product: an infinite document row must not reach the memory's sum as NaN.
        b_document += tl.sum(tl.where(is_memory[:, None], 0.0, b_wide), 0)
        b_memory += tl.sum(tl.where(is_memory[:, None], b_wide, 0.0), 0)
        if STORE_MEMORY:
            o_m = segment * num_memory + (o_t - memory_start)
            p_out = p_memory + o_m[:, None] * size + o_d[None, :]
            tl.store(p_out, b_x.to(p_memory.dtype.element_ty), inside & is_memory[:, None])
    p_mine = p_sums + (segment * SPLITS + split) * 2 * size + o_d
    tl.store(p_mine, b_document, in_d)
    tl.store(p_mine + size, b_memory, in_d)


@triton.jit
def pool_memory_mse_kernel(
    p_sums,  # [S, SPLITS, 2, D]
    p_offsets,  # [S + 1]
    p_mse,  # [S] float32 or unused
    p_grad_mse,  # [S] or unused
    p_step,  # [S, D] float32 or unused: d mse / d (document mean), times the upstream gradient
    num_memory,
    size,
    BACKWARD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    start, end = _bounds(p_offsets, segment)
    num_document = end - num_memory - start
    total = 0.0
    for d in range(0, size, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        in_d = o_d < size
        b_document = tl.zeros([BLOCK_D], tl.float32)
        b_memory = tl.zeros([BLOCK_D], tl.float32)
        for split in range(SPLITS):
            p_mine = p_sums + (segment * SPLITS + split) * 2 * size + o_d
            b_document += tl.load(p_mine, in_d, 0.0)
            b_memory += tl.load(p_mine + size, in_d, 0.0)
        b_difference = b_document / tl.maximum(num_document, 1) - b_memory / num_memory
        b_difference = tl.where(num_document > 0, b_difference, 0.0)
        if BACKWARD:
            grad = tl.load(p_grad_mse + segment).to(tl.float32)
            tl.store(p_step + segment * size + o_d, b_difference * (2.0 / size) * grad, in_d)
        else:
            total += tl.sum(tl.where(in_d, b_difference * b_difference, 0.0))
    if not BACKWARD:
        tl.store(p_mse + segment, total / size)


@triton.jit
def pool_memory_bwd_kernel(
    p_grad_memory,  # [S, m, D]
    p_step,  # [S, D]
    p_hidden,  # [T, D]
    p_offsets,  # [S + 1]
    p_weight,  # [D] or unused
    p_grad_hidden,  # [T, D]
    p_grad_weight,  # [S, SPLITS, D] float32 or unused
    num_memory,
    size,
    eps,
    num_rows,
    HAS_NORM: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    start, end = _bounds(p_offsets, segment)
    first, last = _my_rows(start, end, split, SPLITS)
    memory_start = end - num_memory
    num_document = memory_start - start
    o_d = tl.arange(0, BLOCK_D)
    in_d = o_d < size
    # [BLOCK_D]
    b_step = tl.load(p_step + segment * size + o_d, in_d, 0.0)
    b_to_document = b_step / tl.maximum(num_document, 1)
    b_to_memory = -b_step / num_memory
    b_w = tl.zeros([BLOCK_D], tl.float32)
    b_grad_weight = tl.zeros([BLOCK_D], tl.float32)
    if HAS_NORM:
        b_w = tl.load(p_weight + o_d, in_d, 0.0).to(tl.float32)
    for row in range(first, last, BLOCK_T):
        o_t = row + tl.arange(0, BLOCK_T).to(tl.int64)
        in_t = o_t < last
        # [BLOCK_T, BLOCK_D]
        inside = in_t[:, None] & in_d[None, :]
        is_memory = o_t >= memory_start
        o_m = segment * num_memory + (o_t - memory_start)
        p_upstream = p_grad_memory + o_m[:, None] * size + o_d[None, :]
        b_grad = tl.load(p_upstream, inside & is_memory[:, None], 0.0).to(tl.float32)
        b_grad += tl.where(is_memory[:, None], b_to_memory[None, :], b_to_document[None, :])
        if HAS_NORM:
            b_x = tl.load(p_hidden + o_t[:, None] * size + o_d[None, :], inside, 0.0)
            if WIDEN:
                b_x = b_x.to(tl.float32)
            b_unit, b_rstd = _normalise(b_x, size, eps)
            b_grad_weight += tl.sum(tl.where(inside, b_grad * b_unit.to(tl.float32), 0.0), 0)
            b_normalised = b_x.to(tl.float32) * b_rstd[:, None]
            b_grad = b_grad * b_w[None, :]
            b_mean = tl.sum(b_grad * b_normalised, 1) / size
            b_grad = (b_grad - b_normalised * b_mean[:, None]) * b_rstd[:, None]
        p_out = p_grad_hidden + o_t[:, None] * size + o_d[None, :]
        tl.store(p_out, b_grad.to(p_grad_hidden.dtype.element_ty), inside)
    if HAS_NORM:
        tl.store(p_grad_weight + (segment * SPLITS + split) * size + o_d, b_grad_weight, in_d)
    # Rows outside every segment, if any.
    if split == 0:
        b_zero = tl.zeros([BLOCK_D], tl.float32).to(p_grad_hidden.dtype.element_ty)
        if segment == 0:
            for row in range(start):
                tl.store(p_grad_hidden + row * size + o_d, b_zero, in_d)
        if segment == tl.num_programs(0) - 1:
            for row in range(end, num_rows):
                tl.store(p_grad_hidden + row * size + o_d, b_zero, in_d)


def _blocks(size: int, tile: int) -> dict[str, int]:
    block = max(triton.next_power_of_2(size), 16)
    return {"BLOCK_T": max(tile // block, 1), "BLOCK_D": block, "num_warps": warps_for(max(block, tile))}


def _sums(
    hidden: Tensor,
    offsets: Tensor,
    num_memory: int,
    norm_weight: Tensor | None,
    norm_eps: float,
    memory: Tensor | None,
) -> Tensor:
    segments, size = offsets.shape[0] - 1, hidden.shape[1]
    splits = num_splits(segments, hidden.shape[0] // max(segments, 1), hidden.device)
    sums = torch.empty((segments, splits, 2, size), dtype=torch.float32, device=hidden.device)
    pool_memory_sums_kernel[(segments, splits)](
        hidden,
        offsets,
        norm_weight,
        memory,
        sums,
        num_memory,
        size,
        norm_eps,
        HAS_NORM=norm_weight is not None,
        STORE_MEMORY=memory is not None,
        SPLITS=splits,
        WIDEN=INTERPRETING,
        **_blocks(size, _FWD_TILE),
    )
    return sums


def pool_memory_fwd(
    hidden: Tensor, offsets: Tensor, num_memory: int, norm_weight: Tensor | None, norm_eps: float
) -> tuple[Tensor, Tensor]:
    """memory ``[S, m, D]`` and mse ``[S]`` of contiguous ``hidden [T, D]``; S and D are not 0."""
    segments, size = offsets.shape[0] - 1, hidden.shape[1]
    memory = hidden.new_empty((segments, num_memory, size))
    mse = torch.empty(segments, dtype=torch.float32, device=hidden.device)
    with device_guard(hidden):
        sums = _sums(hidden, offsets, num_memory, norm_weight, norm_eps, memory)
        pool_memory_mse_kernel[(segments,)](
            sums,
            offsets,
            mse,
            None,
            None,
            num_memory,
            size,
            BACKWARD=False,
            SPLITS=sums.shape[1],
            BLOCK_D=1024,
            num_warps=4,
        )
    return memory, mse


def pool_memory_bwd(
    grad_memory: Tensor,
    grad_mse: Tensor,
    hidden: Tensor,
    offsets: Tensor,
    num_memory: int,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``hidden`` and of the norm's weight (empty without one); all inputs contiguous."""
    segments, size = offsets.shape[0] - 1, hidden.shape[1]
    grad_hidden = torch.empty_like(hidden)
    step = torch.empty((segments, size), dtype=torch.float32, device=hidden.device)
    with device_guard(hidden):
        sums = _sums(hidden, offsets, num_memory, norm_weight, norm_eps, None)
        splits = sums.shape[1]
        pool_memory_mse_kernel[(segments,)](
            sums,
            offsets,
            None,
            grad_mse,
            step,
            num_memory,
            size,
            BACKWARD=True,
            SPLITS=splits,
            BLOCK_D=1024,
            num_warps=4,
        )
        grad_weight = None
        if norm_weight is not None:
            grad_weight = torch.empty((segments * splits, size), dtype=torch.float32, device=hidden.device)
        pool_memory_bwd_kernel[(segments, splits)](
            grad_memory,
            step,
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
            SPLITS=splits,
            WIDEN=INTERPRETING,
            **_blocks(size, _BWD_TILE),
        )
    if grad_weight is None:
        return grad_hidden, hidden.new_empty(0)
    return grad_hidden, grad_weight.sum(0).to(norm_weight.dtype)
