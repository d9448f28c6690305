"""Memory rows of packed sequences and the distance of their mean to the document's: launchers of the kernels.

Each segment's rows are shared out to a fixed number of programs, so that the grid follows from shapes alone and
the sums are always taken in the same order. A row is held whole, since the norm needs it: as one block of a power of
two, or as two where that wastes fewer lanes (576 <= 512 + 256).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from clara_fast.triton_kernels._launch import INTERPRETING, Blocks, aligned, device_guard, num_splits, padded
from clara_fast.triton_kernels._pool_backward import pool_memory_bwd_kernel
from clara_fast.triton_kernels._pool_forward import pool_memory_fwd_kernel, pool_memory_fwd_sum_kernel

# Rows that are worth a program of their own, and programs whose sums are worth adding up afterwards.
_SPLIT_ROWS, _MOST_SPLITS = 32, 128
_SUM: Blocks = {"BLOCK_SPLITS": 8, "BLOCK_D": 1024, "num_warps": 8}
# Bytes of shared memory that loads may run ahead into: two blocks of threads fit the smallest processor.
_MOST_SHARED = 48 * 1024


def _row_blocks(size: int) -> Blocks:
    """One block of a power of two or, where that is enough, one and a half: at most a third of the lanes idle."""
    block = max(triton.next_power_of_2(size), 512)
    if 512 < block <= 4096 and size <= block // 4 * 3:
        return {"BLOCK_D": block // 2, "BLOCK_TAIL": block // 4}
    return {"BLOCK_D": block, "BLOCK_TAIL": 0}


def _tile(size: int, element_size: int) -> Blocks:
    """The blocks, and how many rows are taken at a time.

    A warp takes 512 elements of a row (two loads of 16 bytes a lane in bfloat16), so that most rows are summed within
    a warp. Loads run ahead through shared memory, as deep as it allows.
    """
    blocks = _row_blocks(size)
    block = blocks["BLOCK_D"]
    width = (block + blocks["BLOCK_TAIL"]) * element_size
    warps = 16 if block > 4096 else block // 512
    rows = max(512 * warps // block, 1)
    # The backward pass loads two tiles of memory rows.
    stages = max(min(3, 1 + _MOST_SHARED // (2 * rows * width)), 1)
    return {**blocks, "BLOCK_T": rows, "STAGES": stages, "num_warps": warps}


def _rows(tensor: Tensor) -> Tensor:
    return aligned(padded(tensor))


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
    hidden, norm_weight = _rows(hidden), None if norm_weight is None else _rows(norm_weight)
    splits, width = _splits(hidden, segments), hidden.shape[1]
    memory = hidden.new_empty((segments, num_memory, width))
    mse = torch.empty(segments, dtype=torch.float32, device=hidden.device)
    difference = torch.empty((segments, width), dtype=torch.float32, device=hidden.device)
    parts = difference if splits == 1 else difference.new_empty((segments, splits, width))
    with device_guard(hidden):
        pool_memory_fwd_kernel[(segments, splits)](
            hidden,
            offsets,
            norm_weight,
            memory,
            parts,
            mse,
            num_memory,
            size,
            width,
            norm_eps,
            HAS_NORM=norm_weight is not None,
            WIDEN=INTERPRETING,
            **_tile(size, hidden.element_size()),
        )
        if splits > 1:
            pool_memory_fwd_sum_kernel[(segments,)](parts, difference, mse, size, width, splits, **_SUM)
    return memory[..., :size].contiguous(), mse, difference[:, :size].contiguous()


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
    hidden, grad_memory, difference = _rows(hidden), _rows(grad_memory), _rows(difference)
    splits, width = _splits(hidden, segments), hidden.shape[1]
    grad_hidden = torch.empty_like(hidden)
    grad_weight = None
    if norm_weight is not None:
        norm_weight = _rows(norm_weight)
        grad_weight = torch.empty((segments * splits, width), dtype=torch.float32, device=hidden.device)
    with device_guard(hidden):
        pool_memory_bwd_kernel[(segments, splits)](
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
            width,
            norm_eps,
            hidden.shape[0],
            HAS_NORM=norm_weight is not None,
            WIDEN=INTERPRETING,
            **_tile(size, hidden.element_size()),
        )
    grad_hidden = grad_hidden[:, :size].contiguous()
    if norm_weight is None or grad_weight is None:
        return grad_hidden, hidden.new_empty(0)
    return grad_hidden, grad_weight[:, :size].sum(0).to(norm_weight.dtype)
