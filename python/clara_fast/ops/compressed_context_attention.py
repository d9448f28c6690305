"""Attention over packed segments, some of which read others in full."""

from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from clara_fast.ops import _library
from clara_fast.ops._attention_plan import Batch, Plan, make_plan
from clara_fast.ops.layout import ContextLayout

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_NEVER = 1 << 62
_TRITON_HEAD_SIZE = 256


def _triton_kernels(query: Tensor, key: Tensor, value: Tensor) -> ModuleType | None:
    if max(query.shape[2], value.shape[2]) > _TRITON_HEAD_SIZE:
        return None
    return _library.triton_kernels("compressed_context_attention", query, key, value)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=1)
def _cpu_multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _matmul_dtype(query: Tensor) -> torch.dtype:
    """The dtype of the products: a CPU without instructions for bfloat16 multiplies it 20 times slower."""
    if query.device.type != "cpu" or query.dtype in (torch.float32, torch.float64):
        return query.dtype
    return torch.bfloat16 if query.dtype == torch.bfloat16 and _cpu_multiplies_bfloat16() else torch.float32


def _plan(query: Tensor, value: Tensor, layout: tuple[Tensor, ...], backward: bool) -> Plan:
    """Leaves to the CPU's flash kernel what it was measured to be faster at than products of tiles.

    On AVX2 with 9 heads of 64: forward, always (2.6 against 2.8 ms for 276 rows, 85 against 119 for 2048);
    backward, in float32 for few rows and for many. With instructions for bfloat16, tiles win forward as well
    at some hundred rows.
    """
    if query.device.type != "cpu" or query.shape[2] != value.shape[2] or query.shape[2] == 0:
        return make_plan(layout, _NEVER, 0)
    if backward and query.dtype in (torch.bfloat16, torch.float16):
        return make_plan(layout, _NEVER, 1)
    tiles_win = backward or (query.dtype == torch.bfloat16 and _cpu_multiplies_bfloat16())
    return make_plan(layout, 1024, 64) if tiles_win else make_plan(layout, 0, 0)


def _flash_inputs(batch: Batch, *sources: Tensor, heads: int) -> tuple[list[Tensor], bool]:
    """``[count, heads, L, E]`` of queries and what has their shape, and whether the kernel is causal."""
    views = [batch.q.take(source) for source in sources]
    if batch.num_rows > 1:
        return [view.transpose(1, 2) for view in views], True
    # One row sees all keys: the query heads of a key head are that head's rows.
    return [view.reshape(view.shape[0], heads, -1, view.shape[3]) for view in views], False


def _flash_keys(batch: Batch, source: Tensor, query_heads: int) -> Tensor:
    """``[count, heads, keys, E]``; for several query rows a head is repeated for each of its query heads."""
    keys = batch.kv.take(source).transpose(1, 2)
    return keys if batch.num_rows == 1 else keys.repeat_interleave(query_heads // keys.shape[1], 1)


def _flash_rows(batch: Batch, values: Tensor) -> Tensor:
    """The kernel's ``[count, heads, L, E]`` as ``[count, L, Hq, E]``."""
    if batch.num_rows > 1:
        return values.transpose(1, 2)
    return values.flatten(1, 2).unsqueeze(1)


def _add_flash_keys(batch: Batch, target: Tensor, values: Tensor) -> None:
    count, _, keys, size = values.shape
    values = values.view(count, target.shape[1], -1, keys, size).sum(2)
    batch.kv.add(target, values.transpose(1, 2))


def _weights(batch: Batch, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scores and their softmax ``[count * Hkv, groups * L, keys]`` in the accumulation dtype."""
    scores = torch.bmm(query, key.transpose(1, 2)).to(_accumulate_dtype(query.dtype)).mul_(scale)
    batch.hide_future_(scores)
    # softmax, not exp(scores - lse): twice as fast, and not slowed down where exp underflows.
    return scores, scores.softmax(-1)


def _whole_forward(batch: Batch, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``[count, L, Hq, E]`` and ``[count, L, Hq]`` from the library's kernel."""
    (b_query,), causal = _flash_inputs(batch, query, heads=key.shape[1])
    b_key, b_value = (_flash_keys(batch, source, query.shape[1]) for source in (key, value))
    out, lse = _flash(b_query, b_key, b_value, 0.0, causal, scale=scale)
    return _flash_rows(batch, out), _flash_rows(batch, lse)


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
    plan = _plan(query, value, layout, backward=False)
    heads, matmul, dtype = key.shape[1], _matmul_dtype(query), _accumulate_dtype(query.dtype)
    out_shape = (query.shape[0], query.shape[1], value.shape[2])
    if plan.covers(query.shape[0]) and len(plan.whole) == 1 and not plan.tiles:
        out, lse = _whole_forward(plan.whole[0], query, key, value, scale)
        return out.flatten(0, 1).contiguous(), lse.flatten(0, 1).contiguous()
    if plan.covers(query.shape[0]):
        out, lse = query.new_empty(out_shape), query.new_empty(query.shape[:2], dtype=dtype)
    else:
        out = query.new_zeros(out_shape)
        lse = query.new_full(query.shape[:2], -math.inf, dtype=dtype)
    lse_column = lse.unsqueeze(-1)

    for batch in plan.whole:
        b_out, b_lse = _whole_forward(batch, query, key, value, scale)
        batch.q.put(out, b_out)
        batch.q.put(lse, b_lse)
    for batch in plan.tiles:
        b_query, b_key = batch.queries(query, heads).to(matmul), batch.keys(key).to(matmul)
        scores, weights = _weights(batch, b_query, b_key, scale)
        batch.put_queries(out, torch.bmm(weights.to(matmul), batch.keys(value).to(matmul)))
        # The largest weight is exp(largest score - lse).
        b_lse = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log_()
        batch.put_queries(lse_column, b_lse)
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
    """The gradient with the weights P recomputed: dS = P * (dO V^T - rowsum(dO * O) + dlse)."""
    layout = (q_start, q_len, kv_start, kv_len, contexts)
    if triton := _triton_kernels(query, key, value):
        tensors = (grad_out, grad_lse, query, key, value, out, lse)
        return triton.compressed_context_attention_bwd(*tensors, [x.contiguous() for x in layout], scale)
    # The library's kernel has no gradient of lse.
    plan = _plan(query, value, layout, backward=True) if grad_lse is None else make_plan(layout, _NEVER, 0)
    heads, matmul, dtype = key.shape[1], _matmul_dtype(query), _accumulate_dtype(query.dtype)
    grad_query = query.new_empty(query.shape) if plan.covers(query.shape[0]) else query.new_zeros(query.shape)
    # Contexts are read by many segments: their gradients add up in the accumulation dtype.
    grad_key = key.new_zeros(key.shape, dtype=dtype)
    grad_value = value.new_zeros(value.shape, dtype=dtype)

    for batch in plan.whole:
        rows, causal = _flash_inputs(batch, grad_out, query, out, lse.unsqueeze(-1), heads=heads)
        b_grad, b_query, b_out, b_lse = rows
        b_key, b_value = (_flash_keys(batch, source, query.shape[1]) for source in (key, value))
        b_lse = b_lse.squeeze(-1)
        grads = _flash_backward(b_grad, b_query, b_key, b_value, b_out, b_lse, 0.0, causal, scale=scale)
        batch.q.put(grad_query, _flash_rows(batch, grads[0]))
        _add_flash_keys(batch, grad_key, grads[1])
        _add_flash_keys(batch, grad_value, grads[2])
    if plan.tiles:
        delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse.unsqueeze(-1)
    for batch in plan.tiles:
        b_query, b_key = batch.queries(query, heads).to(matmul), batch.keys(key).to(matmul)
        b_grad = batch.queries(grad_out, heads).to(matmul)
        _, weights = _weights(batch, b_query, b_key, scale)
        batch.add_keys(grad_value, torch.bmm(weights.to(matmul).transpose(1, 2), b_grad))
        grad_scores = torch.bmm(b_grad, batch.keys(value).to(matmul).transpose(1, 2)).to(dtype)
        grad_scores.sub_(batch.queries(delta, heads)).mul_(weights).mul_(scale)
        grad_scores = grad_scores.to(matmul)
        batch.put_queries(grad_query, torch.bmm(grad_scores, b_key))
        batch.add_keys(grad_key, torch.bmm(grad_scores.transpose(1, 2), b_query))
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


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


_LAYOUT_SCHEMA = "Tensor q_start, Tensor q_len, Tensor kv_start, Tensor kv_len, Tensor contexts, float scale"
_backward_op = _library.define(
    "compressed_context_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
    f"Tensor value, Tensor out, Tensor lse, {_LAYOUT_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
_op = _library.define(
    f"compressed_context_attention(Tensor query, Tensor key, Tensor value, {_LAYOUT_SCHEMA}) "
    "-> (Tensor out, Tensor lse)",
    _forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions [rows, heads, size], got {list(tensor.shape)}")
        if tensor.dtype != query.dtype or tensor.dtype not in _library.FLOAT_DTYPES:
            raise ValueError(f"{name} must be floating point like query ({query.dtype}), got {tensor.dtype}")
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(f"value rows and heads {list(value.shape[:2])} must be those of key {list(key.shape[:2])}")
    if query.shape[2] == 0:
        raise ValueError(f"query head size ({query.shape[2]}) must be at least 1")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"query head size ({query.shape[2]}) must be that of key ({key.shape[2]})")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"query heads ({query.shape[1]}) must be a multiple of key heads ({key.shape[1]})")


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
    device = query.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check(query, key, value)
    if scale is None:
        scale = query.shape[2] ** -0.5
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale ({scale}) must be finite")
    _library.refuse_transforms("compressed_context_attention", query, key, value)
    run = _forward if _library.is_plain_inference(query) else _op
    return run(query, key, value, *layout.tensors(), scale)[0]
