"""Attention over packed segments, some of which read others in full."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from clara_fast.ops import _library
from clara_fast.ops.layout import ContextLayout, check_layout_shapes

# Query rows per tile: scores stay in cache, and keys past the tile's last row are not touched.
_TILE_ROWS = 128
# Tiles of one shape are computed as one batch up to so many score elements per head.
_BATCH_SCORES = 1 << 16


@dataclass(frozen=True)
class _Tile:
    """Consecutive query rows of one segment and all key rows they may see."""

    q_start: int
    q_len: int
    kv_start: int
    kv_len: int
    contexts: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, int, tuple[int, ...]]:
        return self.q_len, self.kv_len, tuple(length for _, length in self.contexts)

    @property
    def context_len(self) -> int:
        return sum(length for _, length in self.contexts)

    @property
    def key_ranges(self) -> list[tuple[int, int]]:
        """(start, length) of the visible key rows, contexts first, adjoining ranges merged."""
        merged: list[tuple[int, int]] = []
        for start, length in (*self.contexts, (self.kv_start, self.kv_len)):
            if not length:
                continue
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        return merged


class _Rows:
    """Equally many rows of a packed tensor for each of ``count`` tiles; a view where evenly spaced."""

    def __init__(self, ranges_of: list[list[tuple[int, int]]], device: torch.device) -> None:
        starts = [ranges[0][0] for ranges in ranges_of]
        self.count = len(ranges_of)
        self.length = sum(length for _, length in ranges_of[0])
        self.start = starts[0]
        self.step = starts[1] - starts[0] if self.count > 1 else 0
        even = all(later - earlier == self.step for earlier, later in pairwise(starts))
        self.index = None
        if not even or self.step < 0 or any(len(ranges) > 1 for ranges in ranges_of):
            rows = [torch.arange(start, start + length) for ranges in ranges_of for start, length in ranges]
            self.index = torch.cat(rows).to(device)
        self.disjoint = self.count == 1 or self.step >= self.length

    def _view(self, source: Tensor) -> Tensor:
        stride = source.stride()
        offset = source.storage_offset() + self.start * stride[0]
        size = (self.count, self.length, *source.shape[1:])
        return source.as_strided(size, (self.step * stride[0], *stride), offset)

    def take(self, source: Tensor) -> Tensor:
        """``[rows, ...] -> [count, length, ...]``."""
        if self.index is None:
            return self._view(source)
        return source.index_select(0, self.index).view(self.count, self.length, *source.shape[1:])

    def put(self, target: Tensor, values: Tensor) -> None:
        if self.index is None:
            self._view(target).copy_(values)
        else:
            target.index_copy_(0, self.index, values.flatten(0, 1).to(target.dtype))

    def add(self, target: Tensor, values: Tensor) -> None:
        if self.index is None and self.disjoint:
            self._view(target).add_(values)
        elif self.index is None:
            for tile, own in enumerate(values):
                start = self.start + tile * self.step
                target[start : start + self.length].add_(own)
        else:
            target.index_add_(0, self.index, values.flatten(0, 1))


class _Batch:
    """Tiles of one shape, computed together: their rows as matrices, and the gradients back to the rows."""

    def __init__(self, tiles: list[_Tile], device: torch.device) -> None:
        self.rows = tiles[0].q_len
        self.has_own = tiles[0].kv_len > 0
        self.q = _Rows([[(tile.q_start, tile.q_len)] for tile in tiles], device)
        self.kv = _Rows([tile.key_ranges for tile in tiles], device)

    def queries(self, source: Tensor, heads: int) -> Tensor:
        """``[rows, Hq, E] -> [count * Hkv, groups * L, E]``, query heads of one key head side by side."""
        rows = self.q.take(source).unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)
        return rows.reshape(rows.shape[0] * heads, -1, rows.shape[4])

    def keys(self, source: Tensor) -> Tensor:
        """``[rows, Hkv, E] -> [count * Hkv, L, E]``."""
        return self.kv.take(source).transpose(1, 2).flatten(0, 1)

    def put_queries(self, target: Tensor, values: Tensor) -> None:
        heads = values.shape[0] // self.q.count
        values = values.view(self.q.count, heads, -1, self.rows, values.shape[2]).permute(0, 3, 1, 2, 4)
        self.q.put(target, values.flatten(2, 3))

    def add_keys(self, target: Tensor, values: Tensor) -> None:
        self.kv.add(target, values.unflatten(0, (self.kv.count, -1)).transpose(1, 2))

    def hide_future_(self, scores: Tensor) -> Tensor:
        """-inf in ``[count * Hkv, groups * L, keys]`` for row i past the i-th of the last L keys."""
        if self.has_own and self.rows > 1:
            square = scores.unflatten(1, (-1, self.rows))[..., -self.rows :]
            square += _future(scores.device, scores.dtype)[: self.rows, : self.rows]
        return scores


@lru_cache(maxsize=8)
def _future(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.full((_TILE_ROWS, _TILE_ROWS), -math.inf, device=device, dtype=dtype).triu_(1)


@dataclass(frozen=True, eq=False)
class _Plan:
    """A layout as batches of tiles, and whether they cover query rows 0..``num_rows`` without a hole."""

    batches: list[_Batch]
    num_rows: int
    gapless: bool

    def covers(self, rows: int) -> bool:
        return self.gapless and self.num_rows == rows


def _tiles_of_segment(q_start: int, q_len: int, kv_start: int, kv_len: int, contexts: tuple) -> list[_Tile]:
    tiles = []
    # Rows before the first visible key of their own see the contexts only: with no context, nothing at all.
    first = 0 if contexts else max(q_len - kv_len, 0)
    while first < q_len:
        own_first = kv_len - q_len + first + 1
        # Rows that see contexts alone form a tile without own keys, so that the mask below is a triangle.
        last = min(first + _TILE_ROWS, q_len if own_first > 0 else min(q_len, q_len - kv_len))
        own = max(kv_len - (q_len - last), 0)
        tiles.append(_Tile(q_start + first, last - first, kv_start, own, contexts))
        first = last
    return tiles


@lru_cache(maxsize=64)
def _make_plan(
    q_start: tuple, q_len: tuple, kv_start: tuple, kv_len: tuple, contexts: tuple, device: torch.device
) -> _Plan:
    groups: dict[tuple, list[_Tile]] = {}
    for segment, row in enumerate(contexts):
        ranges = tuple((kv_start[other], kv_len[other]) for other in row if other >= 0 and kv_len[other])
        segment_range = (q_start[segment], q_len[segment], kv_start[segment], kv_len[segment])
        for tile in _tiles_of_segment(*segment_range, ranges):
            groups.setdefault(tile.shape, []).append(tile)
    batches = []
    for (rows, own, context_lens), tiles in groups.items():
        size = max(_BATCH_SCORES // (rows * (own + sum(context_lens))), 1)
        batches += [_Batch(tiles[first : first + size], device) for first in range(0, len(tiles), size)]
    end = 0
    gapless = True
    for start, length in sorted((tile.q_start, tile.q_len) for tiles in groups.values() for tile in tiles):
        gapless = gapless and start == end
        end = start + length
    return _Plan(batches, end, gapless)


def _plan(q_start: Tensor, q_len: Tensor, kv_start: Tensor, kv_len: Tensor, contexts: Tensor) -> _Plan:
    return _make_plan(
        tuple(q_start.tolist()),
        tuple(q_len.tolist()),
        tuple(kv_start.tolist()),
        tuple(kv_len.tolist()),
        tuple(map(tuple, contexts.tolist())),
        q_start.device,
    )


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=1)
def _cpu_multiplies_low_precision() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _matmul_dtype(query: Tensor) -> torch.dtype:
    """The dtype of the products: a CPU without instructions for bfloat16 multiplies it 20 times slower."""
    low = query.dtype in (torch.bfloat16, torch.float16)
    if (
        low
        and query.device.type == "cpu"
        and not (query.dtype == torch.bfloat16 and _cpu_multiplies_low_precision())
    ):
        return torch.float32
    return query.dtype


def _weights(batch: _Batch, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scores and their softmax ``[count * Hkv, groups * L, keys]`` in the accumulation dtype."""
    scores = torch.bmm(query, key.transpose(1, 2)).to(_accumulate_dtype(query.dtype)).mul_(scale)
    batch.hide_future_(scores)
    # softmax, not exp(scores - lse): twice as fast, and not slowed down where exp underflows.
    return scores, scores.softmax(-1)


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
    plan = _plan(q_start, q_len, kv_start, kv_len, contexts)
    out_shape = (query.shape[0], query.shape[1], value.shape[2])
    dtype = _accumulate_dtype(query.dtype)
    if plan.covers(query.shape[0]):
        out, lse = query.new_empty(out_shape), query.new_empty(query.shape[:2], dtype=dtype)
    else:
        out = query.new_zeros(out_shape)
        lse = query.new_full(query.shape[:2], -math.inf, dtype=dtype)
    matmul, heads = _matmul_dtype(query), key.shape[1]
    for batch in plan.batches:
        scores, weights = _weights(
            batch, batch.queries(query, heads).to(matmul), batch.keys(key).to(matmul), scale
        )
        batch.put_queries(out, torch.bmm(weights.to(matmul), batch.keys(value).to(matmul)))
        # The largest weight is exp(largest score - lse).
        batch.put_queries(
            lse.unsqueeze(-1), scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log_()
        )
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
    plan = _plan(q_start, q_len, kv_start, kv_len, contexts)
    dtype = _accumulate_dtype(query.dtype)
    grad_query = query.new_empty(query.shape) if plan.covers(query.shape[0]) else query.new_zeros(query.shape)
    # Contexts are read by many segments: their gradients add up in the accumulation dtype.
    grad_key = key.new_zeros(key.shape, dtype=dtype)
    grad_value = value.new_zeros(value.shape, dtype=dtype)
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.unsqueeze(-1)
    matmul, heads = _matmul_dtype(query), key.shape[1]
    for batch in plan.batches:
        b_query, b_key = batch.queries(query, heads).to(matmul), batch.keys(key).to(matmul)
        b_grad = batch.queries(grad_out, heads).to(matmul)
        _, weights = _weights(batch, b_query, b_key, scale)
        batch.add_keys(grad_value, torch.bmm(weights.to(matmul).transpose(1, 2), b_grad))
        grad_scores = torch.bmm(b_grad, batch.keys(value).to(matmul).transpose(1, 2)).to(dtype)
        grad_scores = grad_scores.sub_(batch.queries(delta, heads)).mul_(weights).mul_(scale).to(matmul)
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


def _check(query: Tensor, key: Tensor, value: Tensor, layout: ContextLayout) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions [rows, heads, size], got {list(tensor.shape)}")
        if tensor.dtype != query.dtype or not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point like query ({query.dtype}), got {tensor.dtype}")
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(
            f"value rows and heads {list(value.shape[:2])} must be those of key {list(key.shape[:2])}"
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"query head size ({query.shape[2]}) must be that of key ({key.shape[2]})")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"query heads ({query.shape[1]}) must be a multiple of key heads ({key.shape[1]})")
    check_layout_shapes(*layout.tensors())
    if layout.device != query.device:
        raise ValueError(f"layout must be on the device of query ({query.device}), is on {layout.device}")


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
        ValueError: on shapes or dtypes that do not fit.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check(query, key, value, layout)
    if scale is None:
        scale = query.shape[2] ** -0.5
    return _op(query, key, value, *layout.tensors(), scale)[0]
