"""Exact cosine search."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from clara_fast.ops import _library

_QUANTISED = (torch.int8, torch.float8_e4m3fn)
# Keys per block: a block's float32 copy stays within some tens of megabytes at the widths in use.
_BLOCK_NUMBERS = 1 << 24
_PANEL_ROWS = 64
# What the CUDA kernel keeps on chip, and how many keys it can number.
_CUDA_K = 1024
_CUDA_KEYS = 2**32
# Columns that share a scale in the CPU kernel: a multiple of these, or all of a row.
_GROUP_COLUMNS = 64


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by their norm; zero rows stay zero."""
    norm = rows.norm(dim=-1, keepdim=True)
    return rows / norm.masked_fill(norm == 0, 1)


def descending_topk(scores: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of ``scores [B, N]``, NaN last, ties in their order, and their ``indices [B, N]``."""
    ranked = (scores + 0.0).masked_fill(scores.isnan(), -math.inf)
    if scores.dtype == torch.float32 and scores.shape[1] > k:
        # topk does not order ties; an integer that holds the score above the position has none.
        bits = ranked.view(torch.int32).to(torch.int64)
        bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        place = torch.arange(scores.shape[1], device=scores.device)
        order = (bits * 2**32 - place).topk(k, dim=1).indices
    else:
        order = ranked.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), indices.gather(1, order)


def _scaled(rows: Tensor, scales: Tensor | None) -> Tensor:
    """``rows [..., R]`` times their scales ``[...]``, or ``[..., G]`` for G groups of columns."""
    if scales is None:
        return rows
    scales = scales.to(rows.dtype)
    if scales.dim() < rows.dim():
        return rows * scales.unsqueeze(-1)
    return (rows.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)


def kernel_for(queries: Tensor, keys: Tensor, k: int, key_scales: Tensor | None) -> Callable | None:
    """The kernel that searches these keys, if there is one."""
    # Queries and keys may differ in dtype: float32 queries over a bfloat16 store are the usual case.
    if k == 0 or not keys.numel() or not (keys.dtype in _QUANTISED or keys.dtype in _library.KERNEL_DTYPES):
        return None
    groups = key_scales.shape[1] if key_scales is not None and key_scales.dim() == 2 else 1
    if groups > 1 and (queries.is_cuda or keys.shape[1] // groups % _GROUP_COLUMNS):
        return None
    if not queries.is_cuda:
        return _library.native_kernel("cosine_topk", queries)
    return _library.cuda_kernel("cosine_topk", queries) if k <= _CUDA_K and keys.shape[0] < _CUDA_KEYS else None


def _forward(queries: Tensor, keys: Tensor, k: int, key_scales: Tensor | None) -> tuple[Tensor, Tensor]:
    kernel = kernel_for(queries, keys, k, key_scales)
    if kernel is not None:
        scales = None if key_scales is None else key_scales.to(torch.float32).contiguous()
        if scales is not None and scales.dim() == 2 and scales.shape[1] == 1:
            scales = scales[:, 0]
        return kernel(queries.contiguous(), keys.contiguous(), k, scales)
    return _forward_plain(queries, keys, k, key_scales)


def _forward_plain(queries: Tensor, keys: Tensor, k: int, key_scales: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = _accumulate_dtype(
        torch.promote_types(queries.dtype, keys.dtype) if keys.dtype not in _QUANTISED else queries.dtype
    )
    batch, count = queries.shape[0], keys.shape[0]
    unit = unit_rows(queries.to(dtype))
    best = queries.new_empty((batch, 0), dtype=dtype)
    best_indices = torch.empty((batch, 0), dtype=torch.int64, device=queries.device)
    step = max(_BLOCK_NUMBERS // max(keys.shape[1], 1), k, 1)
    for start in range(0, count, step):
        scales = None if key_scales is None else key_scales[start : start + step]
        # Groups of columns may differ in size by more than float32 squares have room for.
        wide = torch.float64 if scales is not None and scales.dim() == 2 else dtype
        block = unit_rows(_scaled(keys[start : start + step].to(wide), scales)).to(dtype)
        rows = block.shape[0]
        # Whole panels of keys: in the remainder of a matrix product equal keys may round differently, which
        # breaks ties.
        block = torch.nn.functional.pad(block, (0, 0, 0, -rows % _PANEL_ROWS))
        scores = torch.cat((best, (unit @ block.T)[:, :rows]), 1)
        places = torch.arange(start, start + rows, device=keys.device).expand(batch, -1)
        best, best_indices = descending_topk(scores, torch.cat((best_indices, places), 1), min(k, scores.shape[1]))
    return best, best_indices


def _backward(
    grad_scores: Tensor, queries: Tensor, keys: Tensor, indices: Tensor, key_scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The cosine's gradient over the k chosen keys; for quantised keys the second is empty."""
    dtype = grad_scores.dtype
    wide = queries.to(dtype)
    chosen = _scaled(keys[indices].to(dtype), None if key_scales is None else key_scales[indices])
    q_norm, k_norm = wide.norm(dim=-1), chosen.norm(dim=-1)
    q_inverse = torch.where(q_norm == 0, 0, 1 / q_norm)
    k_inverse = torch.where(k_norm == 0, 0, 1 / k_norm)
    q_unit, k_unit = wide * q_inverse.unsqueeze(-1), chosen * k_inverse.unsqueeze(-1)
    scores = torch.einsum("br,bkr->bk", q_unit, k_unit)
    grad_queries = torch.einsum("bk,bkr->br", grad_scores, k_unit)
    grad_queries = (grad_queries - (grad_scores * scores).sum(1, keepdim=True) * q_unit) * q_inverse.unsqueeze(-1)
    if keys.dtype in _QUANTISED:
        return grad_queries.to(queries.dtype), queries.new_empty(0)
    grad_chosen = q_unit.unsqueeze(1) - scores.unsqueeze(-1) * k_unit
    grad_chosen = grad_chosen * (grad_scores * k_inverse).unsqueeze(-1)
    grad_keys = keys.new_zeros(keys.shape, dtype=dtype)
    if grad_keys.is_cuda:
        # Sorts where index_add_ would add in any order.
        grad_keys.index_put_((indices.flatten(),), grad_chosen.flatten(0, 1), accumulate=True)
    else:
        grad_keys.index_add_(0, indices.flatten(), grad_chosen.flatten(0, 1))
    return grad_queries.to(queries.dtype), grad_keys.to(keys.dtype)


def _fake(queries, keys, k, key_scales):
    float64 = torch.float64 in (queries.dtype, keys.dtype)
    scores = queries.new_empty((queries.shape[0], k), dtype=torch.float64 if float64 else torch.float32)
    return scores, queries.new_empty((queries.shape[0], k), dtype=torch.int64)


def _backward_fake(grad_scores, queries, keys, indices, key_scales):
    grad_keys = queries.new_empty(0) if keys.dtype in _QUANTISED else keys.new_empty(keys.shape)
    return queries.new_empty(queries.shape), grad_keys


def _setup_context(ctx, inputs, output) -> None:
    queries, keys, _, key_scales = inputs
    ctx.save_for_backward(queries, keys, output[1], key_scales)
    ctx.mark_non_differentiable(output[1])


def _autograd_backward(ctx, grad_scores, _):
    queries, keys, indices, key_scales = ctx.saved_tensors
    grad_queries, grad_keys = _backward_op(grad_scores, queries, keys, indices, key_scales)
    return grad_queries, grad_keys if keys.is_floating_point() and key_scales is None else None, None, None


_backward_op = _library.define(
    "cosine_topk_backward(Tensor grad_scores, Tensor queries, Tensor keys, Tensor indices, "
    "Tensor? key_scales) -> (Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
_op = _library.define(
    "cosine_topk(Tensor queries, Tensor keys, SymInt k, Tensor? key_scales) -> (Tensor, Tensor)",
    _forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
)


def _fits(scales: torch.Size, keys: torch.Size) -> bool:
    if scales[:1] != keys[:1]:
        return False
    return len(scales) == 1 or (len(scales) == 2 and scales[1] > 0 and keys[1] % scales[1] == 0)


def _check(queries: Tensor, keys: Tensor, k: int, key_scales: Tensor | None) -> None:
    _library.check_tensors("queries keys", queries, keys)
    q_shape, k_shape, dtype = queries.shape, keys.shape, keys.dtype
    if len(q_shape) != 2 or queries.dtype not in _library.FLOAT_DTYPES:
        raise ValueError(f"queries must be floating point [B, R], got {queries.dtype} {list(q_shape)}")
    if len(k_shape) != 2 or k_shape[1] != q_shape[1]:
        raise ValueError(f"keys must have shape [N, R] with R = {q_shape[1]}, got {list(k_shape)}")
    if dtype in _QUANTISED:
        got = None
        if key_scales is not None:
            _library.check_tensors("queries key_scales", queries, key_scales)
            got = f"{key_scales.dtype} {list(key_scales.shape)}"
        if not (key_scales is not None and key_scales.is_floating_point() and _fits(key_scales.shape, k_shape)):
            raise ValueError(
                f"key_scales must be floating point [N] = {list(k_shape[:1])} for {dtype} keys, or [N, G] where G "
                f"divides R = {k_shape[1]}; got {got}"
            )
    elif dtype not in _library.FLOAT_DTYPES:
        raise ValueError(f"keys must be floating point, int8 or float8_e4m3fn, got {dtype}")
    elif key_scales is not None:
        raise ValueError(f"key_scales must be None for {dtype} keys")
    _library.check_integer("k", k)
    if k < 0:
        raise ValueError(f"k ({k}) must not be negative")
    if k > k_shape[0]:
        raise ValueError(f"k ({k}) must be at most the number of keys ({k_shape[0]})")


def cosine_topk(queries: Tensor, keys: Tensor, k: int, *, key_scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k keys of highest cosine with each query.

    Equivalent to ``(normalize(queries) @ normalize(keys).T).topk(k)`` in float32, without the ``[B, N]``
    matrix or a normalised copy of the keys. Zero vectors score 0; NaN scores rank last; ties go to the lower
    index. Differentiable in the queries and in floating-point keys, through the k scores returned.

    Args:
        queries: ``[B, R]``.
        keys: ``[N, R]`` in float32, float64, bfloat16, float16, int8 or float8_e4m3fn.
        k: at most N.
        key_scales: ``[N]``, one scale per row, or ``[N, G]``, one for each of G groups of R / G columns (such as a
            memory token); required for int8 and float8 keys.

    Returns:
        scores ``[B, k]`` float32 (float64 for float64), descending, and indices ``[B, k]`` int64.

    Raises:
        TypeError, ValueError: on shapes, dtypes or a k that do not fit.
    """
    _check(queries, keys, k, key_scales)
    _library.refuse_transforms("cosine_topk", queries, keys, key_scales)
    run = _forward if _library.is_plain_inference(queries) else _op
    return run(queries, keys, k, key_scales)
