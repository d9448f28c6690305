"""Straight-through top-k selection of memories."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from clara_fast.ops import _library
from clara_fast.ops.cosine_topk import descending_topk

_TRITON_CANDIDATES = 4096


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _inverse_norm(rows: Tensor) -> Tensor:
    norm = rows.norm(dim=-1)
    return torch.where(norm == 0, 0, 1 / norm)


def _forward(
    query: Tensor,
    keys: Tensor,
    memory: Tensor,
    k: int,
    temperature: float,
    taken_logit: float,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if 0 < k <= keys.shape[1]:
        tensors = (query.contiguous(), keys.contiguous(), memory.contiguous())
        mask = None if valid is None else valid.contiguous()
        if kernel := _library.native_kernel("select_memory_forward", *tensors):
            return kernel(*tensors, k, temperature, mask)
        if triton := _triton_kernels(*tensors):
            return triton.select_memory_fwd(*tensors, k, mask)
    return _forward_plain(query, keys, memory, k, valid)


def _triton_kernels(query: Tensor, keys: Tensor, *others: Tensor) -> ModuleType | None:
    """The launchers, for as many candidates as fit a program's registers."""
    few = keys.shape[1] <= _TRITON_CANDIDATES
    return _library.triton_kernels("select_memory", query, keys, *others) if few else None


def _forward_plain(
    query: Tensor, keys: Tensor, memory: Tensor, k: int, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _accumulate_dtype(query.dtype)
    batch, count = keys.shape[:2]
    wide, wide_keys = query.to(dtype), keys.to(dtype)
    # Not a matrix product: that may round equal keys differently, and so break ties.
    scores = (wide_keys * wide.unsqueeze(1)).sum(-1)
    scores = scores * _inverse_norm(wide_keys) * _inverse_norm(wide).unsqueeze(1)
    ranked = scores.masked_fill(scores.isnan(), -math.inf)
    if valid is not None:
        scores = scores.masked_fill(~valid, 0)
        # Below every valid candidate, also one whose score is NaN: cosines are at least -1.
        ranked = ranked.clamp(min=-2).masked_fill(~valid, -3)
    places = torch.arange(count, device=query.device).expand(batch, -1)
    best, indices = descending_topk(ranked, places, min(k, count))
    if valid is not None:
        indices = indices.masked_fill(best == -3, -1)
    if k > count:
        indices = torch.nn.functional.pad(indices, (0, k - count), value=-1)
    return _gather(memory, indices), indices, scores


def _gather(memory: Tensor, indices: Tensor) -> Tensor:
    """``memory [B, N, m, D]`` at ``indices [B, k]``, zero at -1."""
    batch, count, *size = memory.shape
    if count == 0:
        return memory.new_zeros((batch, indices.shape[1], *size))
    rows = torch.arange(batch, device=memory.device).unsqueeze(1)
    return memory[rows, indices.clamp(min=0)].masked_fill((indices < 0)[..., None, None], 0)


def _backward(
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
    if 0 < indices.shape[1] <= keys.shape[1]:
        mask = None if valid is None else valid.contiguous()
        tensors = [tensor.contiguous() for tensor in (query, keys, memory)]
        upstream = (grad_selected.contiguous(), grad_scores.contiguous())
        arguments = (*upstream, *tensors, indices.contiguous(), scores.contiguous(), temperature, taken_logit, mask)
        if kernel := _library.native_kernel("select_memory_backward", *tensors, grad_selected):
            return kernel(*arguments)
        if triton := _triton_kernels(*tensors, grad_selected):
            return triton.select_memory_bwd(*arguments)
    return _backward_plain(
        grad_selected, grad_scores, query, keys, memory, indices, scores, temperature, taken_logit, valid
    )


def _grad_logits(affinity: Tensor, logits: Tensor, indices: Tensor, taken_logit: float) -> Tensor:
    """``dl_i = sum_j p_ji (a_ji - sum_i' p_ji' a_ji')`` for ``affinity [B, k, N]``, a slot at a time."""
    grad = torch.zeros_like(logits)
    logits = logits.clone()
    for slot in range(indices.shape[1]):
        chosen = indices[:, slot : slot + 1]
        live = chosen >= 0
        soft = logits.softmax(1).masked_fill(~live, 0)
        a = affinity[:, slot]
        grad += soft * (a - (soft * a).sum(1, keepdim=True))
        penalty = torch.full_like(chosen, taken_logit, dtype=logits.dtype).masked_fill_(~live, 0)
        logits.scatter_add_(1, chosen.clamp(min=0), penalty)
    return grad


def _backward_plain(
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
    dtype = _accumulate_dtype(query.dtype)
    if keys.shape[1] == 0:
        return torch.zeros_like(query), torch.zeros_like(keys), torch.zeros_like(memory)
    flat_grad = grad_selected.flatten(2).to(dtype)
    flat_memory = memory.flatten(2).to(dtype)
    affinity = torch.bmm(flat_grad, flat_memory.transpose(1, 2))
    logits = scores / temperature
    if valid is not None:
        logits = logits.masked_fill(~valid, -math.inf)
        affinity = affinity.masked_fill(~valid.unsqueeze(1), 0)
    # A slot with one candidate left has no gradient, and one whose candidates are all taken was never filled.
    grad_cosine = _grad_logits(affinity, logits, indices, taken_logit) / temperature + grad_scores
    if valid is not None:
        grad_cosine = grad_cosine.masked_fill(~valid, 0)

    wide, wide_keys = query.to(dtype), keys.to(dtype)
    if valid is not None:
        # Padding may hold anything, and 0 * NaN is NaN.
        wide_keys = wide_keys.masked_fill(~valid.unsqueeze(-1), 0)
    q_inverse, k_inverse = _inverse_norm(wide).unsqueeze(-1), _inverse_norm(wide_keys).unsqueeze(-1)
    q_unit = wide * q_inverse
    weight = grad_cosine.unsqueeze(-1) * k_inverse
    projection = (grad_cosine * scores).unsqueeze(-1)
    grad_query = (wide_keys * weight).sum(1) - projection.sum(1) * q_unit
    grad_keys = weight * q_unit.unsqueeze(1) - wide_keys * (projection * k_inverse.square())

    grad_memory = torch.zeros_like(flat_memory)
    live = (indices >= 0).unsqueeze(-1)
    rows = indices.clamp(min=0).unsqueeze(-1).expand(-1, -1, flat_memory.shape[2])
    grad_memory.scatter_add_(1, rows, flat_grad.masked_fill(~live, 0))
    return (
        (grad_query * q_inverse).to(query.dtype),
        grad_keys.to(keys.dtype),
        grad_memory.view(memory.shape).to(memory.dtype),
    )


def _fake(query, keys, memory, k, temperature, taken_logit, valid):
    batch, count = keys.shape[:2]
    selected = memory.new_empty((batch, k, *memory.shape[2:]))
    scores = query.new_empty((batch, count), dtype=_accumulate_dtype(query.dtype))
    return selected, query.new_empty((batch, k), dtype=torch.int64), scores


def _backward_fake(grad_selected, grad_scores, query, keys, memory, *rest):
    return query.new_empty(query.shape), keys.new_empty(keys.shape), memory.new_empty(memory.shape)


def _setup_context(ctx, inputs, output) -> None:
    query, keys, memory, _, ctx.temperature, ctx.taken_logit, valid = inputs
    _, indices, scores = output
    ctx.save_for_backward(query, keys, memory, indices, scores, valid)
    ctx.mark_non_differentiable(indices)


def _autograd_backward(ctx, grad_selected, _, grad_scores):
    *tensors, valid = ctx.saved_tensors
    grads = _backward_op(grad_selected, grad_scores, *tensors, ctx.temperature, ctx.taken_logit, valid)
    return *grads, None, None, None, None


_backward_op = _library.define(
    "select_memory_backward(Tensor grad_selected, Tensor grad_scores, Tensor query, Tensor keys, "
    "Tensor memory, Tensor indices, Tensor scores, float temperature, float taken_logit, Tensor? valid) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
_op = _library.define(
    "select_memory(Tensor query, Tensor keys, Tensor memory, SymInt k, float temperature, float taken_logit, "
    "Tensor? valid) -> (Tensor, Tensor, Tensor)",
    _forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
)


def _check(
    query: Tensor,
    keys: Tensor,
    memory: Tensor,
    k: int,
    temperature: float,
    taken_logit: float,
    valid: Tensor | None,
) -> None:
    q_shape, k_shape, m_shape, dtype = query.shape, keys.shape, memory.shape, query.dtype
    if len(q_shape) != 2 or dtype not in _library.FLOAT_DTYPES:
        raise ValueError(f"query must be floating point [B, R], got {query.dtype} {list(query.shape)}")
    b, n, r = k_shape if len(k_shape) == 3 else (-1, -1, -1)
    if q_shape != (b, r):
        raise ValueError(
            f"keys must have shape [B, N, R] with B = {query.shape[0]} and R = {query.shape[1]}, got {list(keys.shape)}"
        )
    if len(m_shape) != 4 or m_shape[0] != b or m_shape[1] != n:
        raise ValueError(f"memory must have shape [B, N, m, D] with [B, N] = {[b, n]}, got {list(memory.shape)}")
    if keys.dtype is not dtype or memory.dtype is not dtype:
        raise ValueError(f"keys and memory must have the dtype of query ({dtype}), got {keys.dtype}, {memory.dtype}")
    if valid is not None:
        _library.check_tensors("query valid", query, valid)
    if valid is not None and (valid.shape != keys.shape[:2] or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool [B, N] = {list(keys.shape[:2])}, got {valid.dtype} {list(valid.shape)}")
    _library.check_integer("k", k)
    if k < 0:
        raise ValueError(f"k ({k}) must not be negative")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature ({temperature}) must be positive and finite")
    if not taken_logit <= 0:
        raise ValueError(f"taken_logit ({taken_logit}) must not be positive")


def select_memory(
    query: Tensor,
    keys: Tensor,
    memory: Tensor,
    k: int,
    *,
    temperature: float = 0.02,
    valid: Tensor | None = None,
    taken_logit: float = -math.inf,
) -> tuple[Tensor, Tensor, Tensor]:
    """Selects the memories of the k best candidates, with the gradient of a softmax.

    The forward pass gathers the k candidates of highest cosine. The backward pass is that of k softmax draws
    without replacement over ``cosine / temperature`` (arXiv 2511.18659, straight-through top-k of the joint
    stage), computed analytically. ``scores`` is differentiable too.

    Args:
        query: ``[B, R]``.
        keys: ``[B, N, R]``; may share storage with ``memory`` when R = m * D.
        memory: ``[B, N, m, D]``, in the dtype of ``query`` (under autocast, all three meet in the widest).
        k: how many to select; it may exceed the number of candidates.
        temperature: divides the cosines.
        valid: bool ``[B, N]``, False for padding.
        taken_logit: added to the logit of a candidate that an earlier slot took. Exact masking by default;
            ``math.log(1e-8)`` reproduces the reference implementation, whose softmax leaks to taken
            candidates.

    Returns:
        memory ``[B, k, m, D]``, indices ``[B, k]`` int64 and scores ``[B, N]`` float32 (float64 for float64).
        Where fewer than k candidates are valid, the memory is zero and the index -1; the score of an invalid
        candidate is 0.

    Raises:
        TypeError, ValueError: on shapes, dtypes or values that do not fit.
    """
    _library.check_tensors("query keys memory", query, keys, memory)
    if _library.autocasts(query):
        dtype = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), memory.dtype)
        query, keys, memory = query.to(dtype), keys.to(dtype), memory.to(dtype)
    _check(query, keys, memory, k, temperature, taken_logit, valid)
    if _library.is_plain_inference(query):
        return _forward(query, keys, memory, k, temperature, taken_logit, valid)
    _library.refuse_transforms("select_memory", query, keys, memory)
    return _op(query, keys, memory, k, temperature, taken_logit, valid)
