"""Attention over packed segments, some of which read others in full: launchers of the forward and backward kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from clara_fast.triton_kernels._attention_backward import attention_bwd_key_kernel, attention_bwd_query_kernel
from clara_fast.triton_kernels._attention_blocks import bwd_key_blocks, bwd_query_blocks, fwd_blocks, head_block
from clara_fast.triton_kernels._attention_forward import (
    attention_clear_kernel,
    attention_fwd_kernel,
    attention_fwd_merge_kernel,
)
from clara_fast.triton_kernels._launch import (
    INTERPRETING,
    Blocks,
    aligned,
    architecture,
    device_guard,
    launch,
    num_processors,
    num_splits,
    padded,
)

_FEW_ROWS = 16  # query rows of a key head and segment up to which it counts as decoding
_MOST_SPLITS = 32
_MERGE = {"BLOCK_SPLITS": _MOST_SPLITS, "num_warps": 4}
_CLEAR = {"BLOCK_T": 64, "BLOCK_S": 64, "BLOCK_W": 1024, "num_warps": 4}


def _addressable(tensor: Tensor) -> Tensor:
    """Whole vectors of 16 elements, side by side, and rows so close that a block's offsets fit 32 bits."""
    tensor = padded(tensor)
    fits = tensor.stride(2) == 1 and tensor.stride(0) < 2**24 and not (tensor.stride(0) | tensor.stride(1)) % 16
    return aligned(tensor if fits else tensor.contiguous())


def _constants(query: Tensor, value: Tensor) -> dict[str, int | bool]:
    return {"BLOCK_E": head_block(max(query.shape[2], value.shape[2])), "WIDEN": INTERPRETING}


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int]:
    """Query heads to a key head, and sizes of the heads."""
    return query.shape[1] // key.shape[1], query.shape[2], value.shape[2]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _decode_splits(keys: int, segments: int, contexts: int, blocks: int, block_keys: int, device: torch.device) -> int:
    """Programs that share the keys of one block of query rows, where too few blocks would fill the device.

    How many keys a segment sees is on the device; from shapes alone, its share of them, or all with contexts.
    """
    most = keys if contexts else keys // max(segments, 1)
    return num_splits(blocks, min(most // (2 * block_keys), _MOST_SPLITS), device, per_processor=2)


def _clear(layout: list[Tensor], rows: Tensor, lse: Tensor, clear_lse: bool) -> None:
    """0 (and -inf in ``lse``) in query rows of no segment."""
    count, width = rows.shape[0], rows.shape[1] * rows.shape[2]
    attention_clear_kernel[(triton.cdiv(count, _CLEAR["BLOCK_T"]),)](
        rows, lse, *layout[:2], layout[0].shape[0], count, width, rows.shape[1], int(clear_lse), **_CLEAR
    )


def compressed_context_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, layout: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """out ``[Tq, Hq, Ev]`` and lse ``[Tq, Hq]`` of ``query [Tq, Hq, E]``, ``key`` and ``value [Tk, Hkv, E or Ev]``.

    ``layout`` is ``q_start, q_len, kv_start, kv_len [S]`` and ``contexts [S, C]``, int32 and contiguous.

    Floor: query, key and value read and out written once; ``2 * (E + Ev)`` floating-point operations for each query
    head, row and key that it sees, on tensor cores (float32: outside of them). In decoding each key head's keys are
    read once for all of its query heads, and the operations do not matter.
    """
    value_size = value.shape[2]
    query, key, value = _addressable(query), _addressable(key), _addressable(value)
    rows, heads, key_heads = query.shape[0], query.shape[1], key.shape[1]
    segments, contexts = layout[4].shape
    constants, sizes, device = _constants(query, value), _sizes(query, key, value), query.device
    group_rows = rows * sizes[0]
    few = group_rows <= _FEW_ROWS * segments
    crowded = triton.cdiv(group_rows, 128) * key_heads >= num_processors(device)
    candidates = fwd_blocks(architecture(device), query.element_size(), constants["BLOCK_E"], few, crowded)

    out = torch.empty((rows, heads, value.shape[2]), dtype=query.dtype, device=device)
    lse = torch.empty((rows, heads), dtype=torch.float32, device=device)
    splits, part_out, part_lse = 1, out, lse
    if few:
        blocks = key_heads * segments
        splits = _decode_splits(key.shape[0], segments, contexts, blocks, candidates[0]["BLOCK_KEYS"], device)
        part_out = torch.empty((splits, *out.shape), dtype=torch.float32, device=device)
        # Rows of no segment stay so, and come out as 0.
        part_lse = torch.full((splits, rows, heads), float("-inf"), dtype=torch.float32, device=device)

    def grid(blocks: Blocks) -> tuple[int, int, int]:
        return triton.cdiv(group_rows, blocks["BLOCK_ROWS"]) + segments, key_heads, splits

    with device_guard(query):
        launch(
            attention_fwd_kernel,
            grid,
            query,
            key,
            value,
            part_out,
            part_lse,
            *layout,
            scale,
            segments,
            contexts,
            rows,
            *_strides(query, key, value),
            heads,
            *sizes,
            DECODE=few,
            **constants,
            candidates=candidates,
        )
        if few:
            attention_fwd_merge_kernel[(rows * heads,)](
                part_out,
                part_lse,
                out,
                lse,
                rows * heads,
                splits,
                value.shape[2],
                BLOCK_E=constants["BLOCK_E"],
                **_MERGE,
            )
        else:
            _clear(layout, out, lse, True)
    return out[..., :value_size].contiguous(), lse


def _readers(contexts: Tensor) -> tuple[Tensor, Tensor]:
    """The segments that read each context, in order, and where each context's begin, without leaving the device."""
    segments, width = contexts.shape
    read, order = contexts.flatten().sort(stable=True)
    bounds = torch.arange(segments + 1, dtype=torch.int32, device=contexts.device)
    return (order // max(width, 1)).to(torch.int32), torch.searchsorted(read, bounds, out_int32=True)


def compressed_context_attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; ``out`` and ``lse`` as the forward pass returned them.

    Floor: all seven tensors of the forward pass's sizes read or written once; ``4 * E + 2 * Ev`` (grad_query) and
    ``4 * (E + Ev)`` (grad_key, grad_value) floating-point operations for each query head, row and key that it sees: the
    scores are computed twice, so that each gradient is summed by one program in one order.
    """
    query_size, value_size = query.shape[2], value.shape[2]
    query, key, value = _addressable(query), _addressable(key), _addressable(value)
    grad_out, out = _addressable(grad_out.contiguous()), _addressable(out.contiguous())
    rows, heads, key_heads = query.shape[0], query.shape[1], key.shape[1]
    segments, contexts = layout[4].shape
    constants, sizes, device = _constants(query, value), _sizes(query, key, value), query.device
    group_rows = rows * sizes[0]
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=device)
    grad_key = torch.empty(key.shape, dtype=key.dtype, device=device)
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=device)
    delta = torch.empty((rows, heads), dtype=torch.float32, device=device)
    chosen = architecture(device), query.element_size(), constants["BLOCK_E"]
    strides = _strides(query, key, value)
    with device_guard(query):
        launch(
            attention_bwd_query_kernel,
            lambda blocks: (triton.cdiv(group_rows, blocks["BLOCK_ROWS"]) + segments, key_heads),
            query,
            key,
            value,
            grad_out,
            out,
            lse if grad_lse is None else grad_lse.contiguous(),
            lse,
            delta,
            grad_query,
            *layout,
            scale,
            segments,
            contexts,
            *strides,
            heads,
            *sizes,
            int(grad_lse is not None),
            **constants,
            candidates=bwd_query_blocks(*chosen),
        )
        _clear(layout, grad_query, lse, False)
        readers, reader_ends = _readers(layout[4]) if contexts else (layout[0], layout[0])
        launch(
            attention_bwd_key_kernel,
            lambda blocks: (triton.cdiv(key.shape[0], blocks["BLOCK_KEYS"]), key_heads),
            query,
            key,
            value,
            grad_out,
            lse,
            delta,
            grad_key,
            grad_value,
            *layout[:4],
            readers,
            reader_ends,
            scale,
            segments,
            contexts,
            key.shape[0],
            *strides,
            heads,
            key_heads,
            *sizes,
            **constants,
            candidates=bwd_key_blocks(*chosen),
        )
    cut = query_size, query_size, value_size
    return tuple(grad[..., :n].contiguous() for grad, n in zip((grad_query, grad_key, grad_value), cut))
