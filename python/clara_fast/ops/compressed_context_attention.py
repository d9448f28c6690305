"""Attention over packed segments, some of which read others in full."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from clara_fast.ops import _library
from clara_fast.ops.layout import ContextLayout

_TRITON_HEAD_SIZE = 256


def _triton_kernels(query: Tensor, key: Tensor, value: Tensor) -> ModuleType | None:
    if max(query.shape[2], value.shape[2]) > _TRITON_HEAD_SIZE:
        return None
    return _library.triton_kernels("compressed_context_attention", query, key, value)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _segments(layout: tuple[Tensor, ...]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each segment's query rows, the key rows it reads, and which of these ``[rows, keys]`` are hidden."""
    q_start, q_len, kv_start, kv_len, contexts = (tensor.tolist() for tensor in layout)
    device = layout[0].device
    for segment, others in enumerate(contexts):
        ranges = [range(kv_start[s], kv_start[s] + kv_len[s]) for s in (*others, segment) if s >= 0]
        keys = torch.cat([torch.arange(r.start, r.stop, device=device) for r in ranges])
        rows = slice(q_start[segment], q_start[segment] + q_len[segment])
        hidden = torch.ones(q_len[segment], len(keys), dtype=torch.bool, device=device)
        hidden = hidden.triu(len(keys) - q_len[segment] + 1)
        hidden[:, : len(keys) - kv_len[segment]] = False
        if q_len[segment]:
            yield rows, keys, hidden


def _by_key_head(rows: Tensor, heads: int) -> Tensor:
    """``[L, Hq, ...] -> [Hkv, groups * L, ...]`` in the accumulation dtype."""
    wide = rows.to(_accumulate_dtype(rows.dtype))
    return wide.unflatten(1, (heads, -1)).movedim(0, 2).flatten(1, 2)


def _by_row(values: Tensor, rows: int) -> Tensor:
    """``[Hkv, groups * L, ...] -> [L, Hq, ...]``."""
    return values.unflatten(1, (-1, rows)).movedim(2, 0).flatten(1, 2)


def _scores(query: Tensor, key: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """``[Hkv, groups * L, keys]``."""
    scores = (query @ key.transpose(1, 2)).mul_(scale)
    scores.unflatten(1, (-1, hidden.shape[0])).masked_fill_(hidden, -math.inf)
    return scores


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """The softmax of ``scores``; zeros where a row sees nothing."""
    return (scores - lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)).exp_()


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_start: Tensor,
    q_len: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    contexts: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    layout = (q_start, q_len, kv_start, kv_len, contexts)
    if triton := _triton_kernels(query, key, value):
        return triton.compressed_context_attention_fwd(query, key, value, [x.contiguous() for x in layout], scale)
    rows, q_heads, _ = query.shape
    lse = query.new_empty((rows, q_heads), dtype=_accumulate_dtype(query.dtype))
    if kernel := _library.native_kernel("compressed_context_attention_forward", query, key, value):
        return kernel(query, key, value, *layout, scale, lse), lse
    if query.is_cpu:
        ContextLayout(*layout).validate(rows, key.shape[0])
    out = query.new_zeros((rows, q_heads, value.shape[2]))
    lse.fill_(-math.inf)
    heads = key.shape[1]
    for segment, keys, hidden in _segments(layout):
        b_key, b_value = (_by_key_head(source[keys], heads) for source in (key, value))
        scores = _scores(_by_key_head(query[segment], heads), b_key, hidden, scale)
        b_lse = scores.logsumexp(-1)
        out[segment] = _by_row(_weights(scores, b_lse) @ b_value, hidden.shape[0]).to(out.dtype)
        lse[segment] = _by_row(b_lse, hidden.shape[0])
    return out, lse


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    q_start: Tensor,
    q_len: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    contexts: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient with the weights P recomputed: dS = P * (dP - rowsum(P * dP) + dlse), where dP = dO V^T."""
    layout = (q_start, q_len, kv_start, kv_len, contexts)
    if triton := _triton_kernels(query, key, value):
        tensors = (grad_out, grad_lse, query, key, value, out, lse)
        return triton.compressed_context_attention_bwd(*tensors, [x.contiguous() for x in layout], scale)
    if kernel := _library.native_kernel("compressed_context_attention_backward", query, key, value, grad_out):
        grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        kernel(grad_out, grad_lse, query, key, value, out, lse, *layout, scale, *grads)
        return grads
    # Contexts are read by many segments: their gradients add up in the accumulation dtype.
    dtype, heads = lse.dtype, key.shape[1]
    grad_query, grad_key, grad_value = (x.new_zeros(x.shape, dtype=dtype) for x in (query, key, value))
    for segment, keys, hidden in _segments(layout):
        b_key, b_value = (_by_key_head(source[keys], heads) for source in (key, value))
        b_query, b_grad, b_lse = (_by_key_head(x[segment], heads) for x in (query, grad_out, lse))
        weights = _weights(_scores(b_query, b_key, hidden, scale), b_lse)
        grad_weights = b_grad @ b_value.transpose(1, 2)
        delta = (weights * grad_weights).sum(-1)
        if grad_lse is not None:
            delta -= _by_key_head(grad_lse[segment], heads)
        grad_scores = (grad_weights - delta.unsqueeze(-1)).mul_(weights).mul_(scale)
        grad_query[segment] = _by_row(grad_scores @ b_key, hidden.shape[0])
        grad_key.index_add_(0, keys, (grad_scores.transpose(1, 2) @ b_query).transpose(0, 1))
        grad_value.index_add_(0, keys, (weights.transpose(1, 2) @ b_grad).transpose(0, 1))
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _fake(query, key, value, q_start, q_len, kv_start, kv_len, contexts, scale):
    out = query.new_empty((query.shape[0], query.shape[1], value.shape[2]))
    return out, query.new_empty((query.shape[0], query.shape[1]), dtype=_accumulate_dtype(query.dtype))


def _backward_fake(grad_out, grad_lse, query, key, value, *rest):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad_out, grad_lse):
    query, key, value, *layout, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 9
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _backward_op(grad_out, grad_lse, query, key, value, out, lse, *layout, ctx.scale)
    return *grads, None, None, None, None, None, None


_backward_op = _library.define(
    "compressed_context_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
    f"Tensor value, Tensor out, Tensor lse, {_library.LAYOUT_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
_op = _library.define(
    f"compressed_context_attention(Tensor query, Tensor key, Tensor value, {_library.LAYOUT_SCHEMA}) "
    "-> (Tensor out, Tensor lse)",
    _forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    q_shape, k_shape, v_shape, dtype = query.shape, key.shape, value.shape, query.dtype
    alike = dtype in _library.FLOAT_DTYPES and key.dtype is dtype and value.dtype is dtype
    if not (alike and len(q_shape) == len(k_shape) == len(v_shape) == 3):
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dim() != 3:
                raise ValueError(f"{name} must have 3 dimensions [rows, heads, size], got {list(tensor.shape)}")
            if tensor.dtype is not dtype or dtype not in _library.FLOAT_DTYPES:
                raise ValueError(f"{name} must be floating point like query ({dtype}), got {tensor.dtype}")
    if k_shape[0] != v_shape[0] or k_shape[1] != v_shape[1]:
        raise ValueError(f"value rows and heads {list(v_shape[:2])} must be those of key {list(k_shape[:2])}")
    if q_shape[2] == 0:
        raise ValueError(f"query head size ({q_shape[2]}) must be at least 1")
    if q_shape[2] != k_shape[2]:
        raise ValueError(f"query head size ({q_shape[2]}) must be that of key ({k_shape[2]})")
    if k_shape[1] == 0 or q_shape[1] % k_shape[1]:
        raise ValueError(f"query heads ({q_shape[1]}) must be a multiple of key heads ({k_shape[1]})")


def compressed_context_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: ContextLayout, *, scale: float | None = None
) -> Tensor:
    """Attention in which each segment reads its contexts in full and itself causally.

    Equivalent to ``softmax(scale * query @ key.T + mask) @ value`` with the mask that ``layout`` describes; a
    query row of no segment, or with nothing to attend to, gives zeros. A context does not look at its
    readers, so computing it once for many questions is exact.

    Args:
        query: ``[Tq, Hq, E]``.
        key: ``[Tk, Hkv, E]``; ``Hq`` is a multiple of ``Hkv``, query head h shares key heads in order.
        value: ``[Tk, Hkv, Ev]``.
        layout: the segments, on the device of ``query``. Its ranges must lie inside the rows
            (``layout.validate``).
        scale: multiplies the scores; ``E ** -0.5`` by default.

    Returns:
        ``[Tq, Hq, Ev]`` in the dtype of ``query`` (under autocast, in its dtype); scores and sums are in
        float32 (float64 for float64).

    Raises:
        TypeError, ValueError: on shapes or dtypes that do not fit.
    """
    if not isinstance(layout, ContextLayout):
        raise TypeError(f"layout must be a ContextLayout, got {type(layout).__name__}")
    _library.check_tensors("query key value layout", query, key, value, layout.q_len)
    if _library.autocasts(query):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check(query, key, value)
    if scale is None:
        scale = query.shape[2] ** -0.5
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale ({scale}) must be finite")
    tensors = layout.tensors()
    if not _library.is_plain_inference(query):
        _library.refuse_transforms("compressed_context_attention", query, key, value)
        return _op(query, key, value, *tensors, scale)[0]
    if kernel := _library.native_kernel("compressed_context_attention_forward", query, key, value):
        return kernel(query, key, value, *tensors, scale, None)
    return _forward(query, key, value, *tensors, scale)[0]
