"""Memory rows of packed sequences, and how far their mean is from the document's."""

from __future__ import annotations

import math
import operator
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from clara_fast.ops import _library

_TRITON_SIZE = 8192


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _inverse_rms(hidden: Tensor, norm_eps: float) -> Tensor:
    """``[T, 1]`` in the accumulation dtype."""
    squares = hidden.to(_accumulate_dtype(hidden.dtype)).square()
    return squares.mean(-1, keepdim=True).add_(norm_eps).rsqrt_()


def _normalise(hidden: Tensor, norm_weight: Tensor | None, inverse_rms: Tensor | None) -> Tensor:
    if norm_weight is None or inverse_rms is None:
        return hidden
    return (hidden.to(inverse_rms.dtype) * inverse_rms).to(hidden.dtype) * norm_weight


def _bounds(offsets: Tensor, num_memory: int) -> Tensor:
    """``[2S + 1]``: the starts of document 0, memory 0, document 1, ..., and the end."""
    starts = torch.stack((offsets[:-1], offsets[1:] - num_memory), 1).flatten()
    return torch.cat((starts, offsets[-1:])).to(torch.int64)


def _means(rows: Tensor, bounds: Tensor, num_memory: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means ``[S, D]`` of document and of memory rows, and the documents' row counts ``[S, 1]``."""
    dtype = _accumulate_dtype(rows.dtype)
    if rows.device.type == "cpu":
        # A slice at a time reads each row once; segment_reduce on CPU needs a float32 copy and runs at half
        # the speed.
        limits = bounds.tolist()
        sums = rows.new_empty((len(limits) - 1, rows.shape[1]), dtype=dtype)
        for index, (start, end) in enumerate(pairwise(limits)):
            torch.sum(rows[start:end], 0, dtype=dtype, out=sums[index])
    else:
        # segment_reduce needs the rows before the first bound to be gone; they become a segment that is
        # dropped.
        edges = torch.cat((bounds.new_zeros(1), bounds, bounds.new_full((1,), rows.shape[0])))
        sums = torch.segment_reduce(rows.to(dtype), "sum", offsets=edges, axis=0)[1:-1]
    counts = (bounds[1::2] - bounds[:-1:2]).unsqueeze(1).to(dtype)
    return sums[0::2] / counts.clamp(min=1), sums[1::2] / num_memory, counts


def _memory_rows(offsets: Tensor, num_memory: int) -> Tensor:
    ends = offsets[1:].to(torch.int64).unsqueeze(1)
    return (ends + torch.arange(-num_memory, 0, device=offsets.device)).flatten()


def _forward(
    hidden: Tensor, offsets: Tensor, num_memory: int, norm_weight: Tensor | None, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if offsets.is_cpu:
        _check_offsets(offsets, num_memory, hidden.shape[0])
    floating = (hidden,) if norm_weight is None else (hidden, norm_weight)
    if offsets.shape[0] > 1:
        weight = None if norm_weight is None else norm_weight.contiguous()
        arguments = (hidden.contiguous(), offsets.contiguous(), num_memory, weight, norm_eps)
        if kernel := _library.native_kernel("pool_memory_forward", *floating):
            return kernel(*arguments)
        if triton := _triton_kernels(*floating):
            return triton.pool_memory_fwd(*arguments)
    return _forward_plain(hidden, offsets, num_memory, norm_weight, norm_eps)


def _triton_kernels(hidden: Tensor, *others: Tensor) -> ModuleType | None:
    """The launchers, for rows that fit a program's registers."""
    return _library.triton_kernels("pool_memory", hidden, *others) if hidden.shape[1] <= _TRITON_SIZE else None


def _forward_plain(
    hidden: Tensor, offsets: Tensor, num_memory: int, norm_weight: Tensor | None, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    segments = offsets.shape[0] - 1
    rows = _normalise(hidden, norm_weight, None if norm_weight is None else _inverse_rms(hidden, norm_eps))
    document, memory_mean, counts = _means(rows, _bounds(offsets, num_memory), num_memory)
    # 0 where there is no document row.
    difference = (document - memory_mean).masked_fill_(counts == 0, 0)
    memory = rows.index_select(0, _memory_rows(offsets, num_memory)).view(segments, num_memory, hidden.shape[1])
    return memory, difference.square().mean(1), difference


def _backward(
    grad_memory: Tensor,
    grad_mse: Tensor,
    difference: Tensor,
    hidden: Tensor,
    offsets: Tensor,
    num_memory: int,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    floating = (hidden, grad_memory) if norm_weight is None else (hidden, grad_memory, norm_weight)
    if offsets.shape[0] > 1:
        weight = None if norm_weight is None else norm_weight.contiguous()
        arguments = (hidden.contiguous(), offsets.contiguous(), num_memory, weight, norm_eps)
        upstream = (grad_memory.contiguous(), grad_mse.contiguous(), difference.contiguous())
        if kernel := _library.native_kernel("pool_memory_backward", *floating):
            grad_hidden, grad_weight = kernel(*upstream, *arguments)
            return grad_hidden, hidden.new_empty(0) if weight is None else grad_weight.to(weight.dtype)
        if triton := _triton_kernels(*floating):
            return triton.pool_memory_bwd(*upstream, *arguments)
    return _backward_plain(grad_memory, grad_mse, difference, hidden, offsets, num_memory, norm_weight, norm_eps)


def _backward_plain(
    grad_memory: Tensor,
    grad_mse: Tensor,
    difference: Tensor,
    hidden: Tensor,
    offsets: Tensor,
    num_memory: int,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    dtype = _accumulate_dtype(hidden.dtype)
    bounds = _bounds(offsets, num_memory)
    counts = (bounds[1::2] - bounds[:-1:2]).unsqueeze(1)
    step = difference * (grad_mse.to(dtype).unsqueeze(1) * (2 / hidden.shape[1]))
    # One gradient row per run of rows: before the first segment, document 0, memory 0, ..., after the last.
    runs = torch.stack((step / counts.clamp(min=1), step / -num_memory), 1).flatten(0, 1)
    runs = torch.cat((runs.new_zeros(1, runs.shape[1]), runs, runs.new_zeros(1, runs.shape[1])))
    row_index = torch.arange(hidden.shape[0], device=hidden.device)
    grad_rows = runs.index_select(0, torch.searchsorted(bounds, row_index, right=True))
    memory_rows = _memory_rows(offsets, num_memory)
    grad_rows.index_add_(0, memory_rows, grad_memory.to(dtype).flatten(0, 1))
    if norm_weight is None:
        return grad_rows.to(hidden.dtype), hidden.new_empty(0)
    inverse_rms = _inverse_rms(hidden, norm_eps)
    normalised = hidden.to(dtype) * inverse_rms
    grad_weight = (grad_rows * normalised.to(hidden.dtype)).sum(0)
    grad_normalised = grad_rows * norm_weight
    correction = (grad_normalised * normalised).mean(-1, keepdim=True)
    grad_hidden = (grad_normalised - normalised * correction) * inverse_rms
    return grad_hidden.to(hidden.dtype), grad_weight.to(norm_weight.dtype)


def _fake(hidden, offsets, num_memory, norm_weight, norm_eps):
    segments = offsets.shape[0] - 1
    memory = hidden.new_empty((segments, num_memory, hidden.shape[1]))
    dtype = _accumulate_dtype(hidden.dtype)
    mse = hidden.new_empty((segments,), dtype=dtype)
    return memory, mse, hidden.new_empty((segments, hidden.shape[1]), dtype=dtype)


def _backward_fake(grad_memory, grad_mse, difference, hidden, offsets, num_memory, norm_weight, norm_eps):
    return hidden.new_empty(hidden.shape), hidden.new_empty(0 if norm_weight is None else norm_weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    hidden, offsets, ctx.num_memory, norm_weight, ctx.norm_eps = inputs
    ctx.save_for_backward(output[2], hidden, offsets, norm_weight)
    ctx.mark_non_differentiable(output[2])


def _autograd_backward(ctx, grad_memory, grad_mse, _):
    *saved, norm_weight = ctx.saved_tensors
    grad_hidden, grad_weight = _backward_op(grad_memory, grad_mse, *saved, ctx.num_memory, norm_weight, ctx.norm_eps)
    return grad_hidden, None, None, None if norm_weight is None else grad_weight, None


_backward_op = _library.define(
    "pool_memory_backward(Tensor grad_memory, Tensor grad_mse, Tensor difference, Tensor hidden, Tensor offsets, "
    "int num_memory, Tensor? norm_weight, float norm_eps) -> (Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
_op = _library.define(
    "pool_memory(Tensor hidden, Tensor offsets, int num_memory, Tensor? norm_weight, float norm_eps) "
    "-> (Tensor memory, Tensor mse, Tensor difference)",
    _forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_autograd_backward,
)


def _check(hidden: Tensor, offsets: Tensor, num_memory: int, norm_weight: Tensor | None, norm_eps: float) -> None:
    _library.check_tensors("hidden offsets", hidden, offsets)
    if hidden.dim() != 2 or hidden.dtype not in _library.FLOAT_DTYPES:
        raise ValueError(f"hidden must be floating point [T, D], got {hidden.dtype} {list(hidden.shape)}")
    if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype != torch.int32:
        raise ValueError(f"offsets must be int32 [S + 1], got {offsets.dtype} {list(offsets.shape)}")
    _library.check_integer("num_memory", num_memory)
    if num_memory < 1:
        raise ValueError(f"num_memory ({num_memory}) must be at least 1")
    if norm_weight is not None:
        _library.check_tensors("hidden norm_weight", hidden, norm_weight)
        if norm_weight.shape != hidden.shape[1:] or norm_weight.dtype not in _library.FLOAT_DTYPES:
            raise ValueError(
                f"norm_weight must be floating point [D] = {list(hidden.shape[1:])}, "
                f"got {norm_weight.dtype} {list(norm_weight.shape)}"
            )
        if not 0 <= norm_eps < math.inf:
            raise ValueError(f"norm_eps ({norm_eps}) must be finite and not negative")


def _check_offsets(offsets: Tensor, num_memory: int, rows: int) -> None:
    values = offsets.tolist()
    if values[0] < 0 or values[-1] > rows:
        raise ValueError(f"offsets ({values[0]} .. {values[-1]}) must lie within the rows of hidden ({rows})")
    for segment, length in enumerate(map(operator.sub, values[1:], values)):
        if length < num_memory:
            raise ValueError(
                f"offsets give segment {segment} {length} rows, which must be at least num_memory ({num_memory})"
            )


def pool_memory(
    hidden: Tensor,
    offsets: Tensor,
    num_memory: int,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Takes the memory rows of packed sequences and measures their distance to the document rows.

    The last ``num_memory`` rows of segment s are its memory, the rows before them its document; per segment
    ``mse = (document.mean(0) - memory.mean(0)).square().mean()``, the paper's second compression loss
    (arXiv 2511.18659, section 3.1), and 0 where there is no document row.

    Args:
        hidden: ``[T, D]``, final-layer states of S packed segments.
        offsets: int32 ``[S + 1]``, where the segments start and the last one ends. Rows outside are ignored.
        num_memory: m, memory rows per segment.
        norm_weight: ``[D]``; if given, ``hidden`` is the residual stream before the model's final RMSNorm,
            which is applied first as transformers' ``LlamaRMSNorm`` does (in float32, rounded, times the
            weight).
        norm_eps: epsilon of that norm.

    Returns:
        memory ``[S, m, D]`` in the dtype of ``hidden``, and mse ``[S]`` float32 (float64 for float64).

    Raises:
        TypeError, ValueError: on shapes or dtypes that do not fit and, for CPU tensors, on offsets that are out of
            range or give a segment fewer than ``num_memory`` rows.
    """
    _check(hidden, offsets, num_memory, norm_weight, norm_eps)
    if norm_weight is not None:
        norm_weight = norm_weight.to(hidden.dtype)
    _library.refuse_transforms("pool_memory", hidden, norm_weight)
    run = _forward if _library.is_plain_inference(hidden) else _op
    # The operator's third output, the difference of the means, is what its backward pass needs of them.
    return run(hidden, offsets, num_memory, norm_weight, norm_eps)[:2]
