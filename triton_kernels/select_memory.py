"""Straight-through top-k selection of memories: launchers of the forward and backward kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from clara_fast.triton_kernels._launch import INTERPRETING, Blocks, aligned, device_guard, num_splits
from clara_fast.triton_kernels._select_backward import (
    select_memory_affinity_kernel,
    select_memory_grad_cosine_kernel,
    select_memory_grad_keys_kernel,
    select_memory_grad_memory_kernel,
    select_memory_softmax_kernel,
)
from clara_fast.triton_kernels._select_forward import (
    select_memory_gather_kernel,
    select_memory_products_kernel,
    select_memory_topk_kernel,
)

_SLOTS = 16  # the smallest side of a matrix product
# Blocks of the passes over candidates: a thread holds 32 elements, 16 bytes of each row.
_ROWS: Blocks = {"BLOCK_N": 4, "BLOCK_R": 512, "num_warps": 2}
_PARTS: Blocks = {"BLOCK_PARTS": 128}
_COPY: Blocks = {"BLOCK_M": 1024, "num_warps": 4}


def _affinity_blocks(element_size: int, size: int) -> Blocks:
    """256 bytes of 16 candidates and 16 slots at a time, four deep; half of it where elements are loaded one by one."""
    step = (128 if size % 16 else 256) // element_size
    return {"BLOCK_K": _SLOTS, "BLOCK_N": 16, "BLOCK_M": step, "num_warps": 4, "num_stages": 4}


def _row_of_candidates(count: int) -> Blocks:
    """All candidates of a question in the registers of one program, and the parts of a sum taken at a time."""
    block = 128 if count <= 128 else 1024 if count <= 1024 else max(triton.next_power_of_2(count), 4096)
    warps = 1 if block == 128 else 4 if block == 1024 else 16
    return {"BLOCK_N": block, "BLOCK_SPLITS": max(2048 // block, 1), "num_warps": warps}


def _mask(keys: Tensor, valid: Tensor | None) -> tuple[Tensor, int]:
    """``valid``, or something in its place, and whether it is to be read."""
    return (keys.new_empty(1, dtype=torch.bool), 0) if valid is None else (valid, 1)


def _products(query: Tensor, keys: Tensor, valid: Tensor | None) -> Tensor:
    """``[2, B, splits, N + 1]``: parts of the products with the query and of the squares."""
    batch, count, size = keys.shape
    blocks = triton.cdiv(count, _ROWS["BLOCK_N"])
    splits = num_splits(batch * blocks, min(triton.cdiv(size, 4 * _ROWS["BLOCK_R"]), 64), keys.device, per_processor=8)
    parts = torch.empty((2, batch, splits, count + 1), dtype=torch.float32, device=keys.device)
    select_memory_products_kernel[(batch, blocks, splits)](
        query, keys, *_mask(keys, valid), parts[0], parts[1], count, size, **_ROWS
    )
    return parts


def select_memory_fwd(
    query: Tensor, keys: Tensor, memory: Tensor, k: int, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Selected memories, indices and scores of contiguous inputs; B, N, R, M and k are not 0.

    Floor: ``B * N * R`` elements read and ``B * k * M`` read and written; 4 floating-point operations a key element.
    """
    query, keys, memory = aligned(query), aligned(keys), aligned(memory)
    batch, count = keys.shape[:2]
    size = memory.shape[2] * memory.shape[3]
    selected = memory.new_empty((batch, k, *memory.shape[2:]))
    indices = torch.empty((batch, k), dtype=torch.int64, device=keys.device)
    scores = torch.empty((batch, count), dtype=torch.float32, device=keys.device)
    with device_guard(keys):
        products, squares = _products(query, keys, valid)
        select_memory_topk_kernel[(batch,)](
            products,
            squares,
            scores,
            indices,
            *_mask(keys, valid),
            count,
            k,
            products.shape[1],
            **_row_of_candidates(count),
        )
        grid = (batch * k, triton.cdiv(size, _COPY["BLOCK_M"]))
        select_memory_gather_kernel[grid](memory, indices, selected, count, k, size, **_COPY)
    return selected, indices, scores


def select_memory_bwd(
    grad_selected: Tensor,
    grad_scores: Tensor,
    query: Tensor,
    keys: Tensor,
    memory: Tensor,
    indices: Tensor,
    scores: Tensor,
    temperature: float,
    taken_logit: float,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, keys and memory; all inputs contiguous.

    Floor: ``B * N * M`` elements read for what each slot would gain, ``B * N * R`` read for the gradient that follows
    from it, and both written; ``2 * k`` floating-point operations a memory element, on tensor cores, and 6 a key
    element. That is what is read where keys and memory are one tensor; other keys are read once more, for their norms.
    """
    grad_selected, query, keys, memory = aligned(grad_selected), aligned(query), aligned(keys), aligned(memory)
    batch, count, key_size = keys.shape
    k, size = indices.shape[1], memory.shape[2] * memory.shape[3]
    one_tensor = keys.data_ptr() == memory.data_ptr() and key_size == size
    blocks, row = _affinity_blocks(memory.element_size(), size), _row_of_candidates(count)
    splits = num_splits(batch, min(triton.cdiv(size, 4 * blocks["BLOCK_M"]), 64), keys.device)
    parts = num_splits(batch * splits, min(triton.cdiv(count, blocks["BLOCK_N"]), 16), keys.device)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=keys.device)

    ranks, softmax = new(batch, count, dtype=torch.int32), new(batch, 2, k)
    own, mean = new(batch, splits, count), new(batch, parts * splits, k)
    grad_cosine, norms = new(batch, count), new(batch, count + 1)
    grad_query, grad_keys, grad_memory = torch.empty_like(query), torch.empty_like(keys), torch.empty_like(memory)
    mask, inverse_temperature = _mask(keys, valid), 1.0 / temperature
    with device_guard(keys):
        squares = new(batch, splits, count + 1) if one_tensor else _products(query, keys, valid)[1]
        select_memory_softmax_kernel[(batch,)](
            scores, indices, *mask, ranks, softmax, count, k, inverse_temperature, taken_logit,
            BLOCK_N=row["BLOCK_N"], num_warps=row["num_warps"],
        )  # fmt: skip
        # Each adds to what those before it have left in ``own``.
        for slot in range(0, k, _SLOTS):
            select_memory_affinity_kernel[(batch, parts, splits)](
                grad_selected, memory, query, *mask, scores, ranks, softmax, own, mean, squares, count, k, slot, size,
                inverse_temperature, taken_logit, SQUARES=one_tensor and slot == 0, WIDEN=INTERPRETING, **blocks,
            )  # fmt: skip
        select_memory_grad_cosine_kernel[(batch,)](
            own, mean, softmax, ranks, squares, scores, *mask, grad_scores, grad_cosine, norms, count, k, splits,
            mean.shape[1], squares.shape[1], inverse_temperature, taken_logit, **_PARTS, **row,
        )  # fmt: skip
        select_memory_grad_keys_kernel[(batch, triton.cdiv(key_size, _ROWS["BLOCK_R"]))](
            query, keys, *mask, scores, norms, grad_cosine, grad_query, grad_keys, count, key_size, **_ROWS
        )
        grid = (batch * count, triton.cdiv(size, _COPY["BLOCK_M"]))
        select_memory_grad_memory_kernel[grid](grad_selected, indices, grad_memory, count, k, size, **_COPY)
    return grad_query, grad_keys, grad_memory
