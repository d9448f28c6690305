"""Attention over packed segments, some of which read others in full."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from clara_fast.ops import _library
from clara_fast.ops.layout import ContextLayout, check_layout_shapes

# Query rows per tile: bounds the scores that exist at once, and skips what the causal mask hides past it.
_TILE_ROWS = 512
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


@dataclass(frozen=True)
class _Plan:
    """The tiles of a layout, grouped by shape, and whether they cover query rows 0..``num_rows`` without a hole."""

    batches: tuple[tuple[_Tile, ...], ...]
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
        # Rows that see contexts alone form a tile without own keys, so that the mask below stays a plain triangle.
        last = min(first + _TILE_ROWS, q_len if own_first > 0 else min(q_len, q_len - kv_len))
        own = max(kv_len - (q_len - last), 0)
        tiles.append(_Tile(q_start + first, last - first, kv_start, own, contexts))
        first = last
    return tiles


@lru_cache(maxsize=64)
def _make_plan(q_start: tuple, q_len: tuple, kv_start: tuple, kv_len: tuple, contexts: tuple) -> _Plan:
    groups: dict[tuple, list[_Tile]] = {}
    for segment, row in enumerate(contexts):
        ranges = tuple((kv_start[other], kv_len[other]) for other in row if other >= 0 and kv_len[other])
        segment_range = (q_start[segment], q_len[segment], kv_start[segment], kv_len[segment])
        for tile in _tiles_of_segment(*segment_range, ranges):
            groups.setdefault(tile.shape, []).append(tile)
    batches = []
    for (rows, own, context_lens), tiles in groups.items():
        size = max(_BATCH_SCORES // (rows * (own + sum(context_lens))), 1)
        batches += [tuple(tiles[first : first + size]) for first in range(0, len(tiles), size)]
    end = 0
    gapless = True
    for start, length in sorted((tile.q_start, tile.q_len) for batch in batches for tile in batch):
        gapless = gapless and start == end
        end = start + length
    return _Plan(tuple(batches), end, gapless)


def _plan(q_start: Tensor, q_len: Tensor, kv_start: Tensor, kv_len: Tensor, contexts: Tensor) -> _Plan:
    return _make_plan(
        tuple(q_start.tolist()),
        tuple(q_len.tolist()),
        tuple(kv_start.tolist()),
        tuple(kv_len.tolist()),
        tuple(map(tuple, contexts.tolist())),
    )


def _rows(ranges: list[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(start, start + length, device=device) for start, length in ranges])


class _Batch:
    """The tensors of tiles of one shape: gathers their rows, and scatters gradients back to them."""

    def __init__(self, tiles: tuple[_Tile, ...], query: Tensor, key: Tensor) -> None:
        self.count = len(tiles)
        self.tile = tiles[0]
        self.heads = key.shape[1]
        self.groups = query.shape[1] // key.shape[1]
        self.q_ranges = [(tile.q_start, tile.q_len) for tile in tiles]
        self.key_ranges = [key_range for tile in tiles for key_range in tile.key_ranges]
        self.q_rows = None if self.count == 1 else _rows(self.q_ranges, query.device)
        self.key_rows = None if len(self.key_ranges) == 1 else _rows(self.key_ranges, query.device)

    @staticmethod
    def _take(source: Tensor, ranges: list[tuple[int, int]], rows: Tensor | None) -> Tensor:
        return source.narrow(0, *ranges[0]) if rows is None else source.index_select(0, rows)

    def queries(self, source: Tensor) -> Tensor:
        """``[rows, Hq, E] -> [count * Hkv, groups * L, E]``, query heads of one key head side by side."""
        rows = self._take(source, self.q_ranges, self.q_rows)
        rows = rows.view(self.count, self.tile.q_len, self.heads, self.groups, -1).permute(0, 2, 3, 1, 4)
        return rows.reshape(self.count * self.heads, self.groups * self.tile.q_len, -1)

    def keys(self, source: Tensor) -> Tensor:
        """``[rows, Hkv, E] -> [count * Hkv, L, E]``."""
        rows = self._take(source, self.key_ranges, self.key_rows)
        if self.count == 1:
            return rows.transpose(0, 1)
        return rows.view(self.count, -1, *rows.shape[1:]).transpose(1, 2).flatten(0, 1)

    def put_queries(self, target: Tensor, values: Tensor) -> None:
        values = values.view(self.count, self.heads, self.groups, self.tile.q_len, -1).permute(0, 3, 1, 2, 4)
        if self.q_rows is None:
            out = target.narrow(0, *self.q_ranges[0])
            out.view(self.tile.q_len, self.heads, self.groups, -1).copy_(values[0])
        else:
            target.index_copy_(0, self.q_rows, values.reshape(-1, *target.shape[1:]).to(target.dtype))

    def add_keys(self, target: Tensor, values: Tensor) -> None:
        values = values.view(self.count, self.heads, -1, values.shape[-1]).transpose(1, 2)
        if self.key_rows is None:
            target.narrow(0, *self.key_ranges[0]).add_(values[0])
        else:
            target.index_add_(0, self.key_rows, values.reshape(-1, *target.shape[1:]))

    def mask_(self, scores: Tensor, fill: float) -> Tensor:
        """Fills what row i may not see in the tile's own keys ``[..., groups * L, keys]``."""
        rows, own = self.tile.q_len, self.tile.kv_len
        if own == 0 or rows == 1:
            return scores
        hidden = torch.ones(rows, own, dtype=torch.bool, device=scores.device).triu_(own - rows + 1)
        square = scores.view(-1, self.groups, rows, scores.shape[-1])[..., self.tile.context_len :]
        square.masked_fill_(hidden, fill)
        return scores


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scores(batch: _Batch, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled scores in the accumulation dtype ``[count * Hkv, groups * L, keys]``, -inf where hidden."""
    dtype = _accumulate_dtype(query.dtype)
    scores = torch.bmm(query.to(dtype).mul(scale), key.to(dtype).transpose(1, 2))
    return batch.mask_(scores, -math.inf)


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
    for tiles in plan.batches:
        batch = _Batch(tiles, query, key)
        scores = _scores(batch, batch.queries(query), batch.keys(key), scale)
        tile_lse = scores.logsumexp(-1, keepdim=True)
        weights = scores.sub_(tile_lse).exp_().to(value.dtype)
        batch.put_queries(out, torch.bmm(weights, batch.keys(value)))
        batch.put_queries(lse.unsqueeze(-1), tile_lse)
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
    """The gradient with the probabilities recomputed from ``lse``: dS = P * (dO V^T - rowsum(dO * O) + dlse)."""
    plan = _plan(q_start, q_len, kv_start, kv_len, contexts)
    dtype = _accumulate_dtype(query.dtype)
    grad_query = query.new_empty(query.shape) if plan.covers(query.shape[0]) else query.new_zeros(query.shape)
    # Contexts are read by many segments: their gradients add up in the accumulation dtype.
    grad_key = key.new_zeros(key.shape, dtype=dtype)
    grad_value = value.new_zeros(value.shape, dtype=dtype)
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.unsqueeze(-1)
    lse = lse.unsqueeze(-1)
    for tiles in plan.batches:
        batch = _Batch(tiles, query, key)
        b_query, b_key = batch.queries(query), batch.keys(key)
        b_grad = batch.queries(grad_out)
        weights = _scores(batch, b_query, b_key, scale).sub_(batch.queries(lse)).exp_()
        batch.add_keys(grad_value, torch.bmm(weights.to(value.dtype).transpose(1, 2), b_grad))
        grad_scores = torch.bmm(b_grad, batch.keys(value).transpose(1, 2)).to(dtype)
        grad_scores = grad_scores.sub_(batch.queries(delta)).mul_(weights).mul_(scale).to(query.dtype)
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
    "compressed_context_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    f"Tensor out, Tensor lse, {_LAYOUT_SCHEMA}) -> (Tensor, Tensor, Tensor)",
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
        raise ValueError(f"value rows and heads {list(value.shape[:2])} must be those of key {list(key.shape[:2])}")
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

    Equivalent to ``softmax(scale * query @ key.T + mask) @ value`` with the mask that ``layout`` describes; a query row
    of no segment, or with nothing to attend to, gives zeros. A context does not look at its readers, so computing it
    once for many questions is exact.

    Args:
        query: ``[Tq, Hq, E]``.
        key: ``[Tk, Hkv, E]``; ``Hq`` is a multiple of ``Hkv``, query head h reads key head ``h // (Hq / Hkv)``.
        value: ``[Tk, Hkv, Ev]``.
        layout: the segments, on the device of ``query``. Its ranges must lie inside the rows (``layout.validate``).
        scale: multiplies the scores; ``E ** -0.5`` by default.

    Returns:
        ``[Tq, Hq, Ev]`` in the dtype of ``query``; scores and sums are in float32 (float64 for float64).

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    _check(query, key, value, layout)
    if scale is None:
        scale = query.shape[2] ** -0.5
    return _op(query, key, value, *layout.tensors(), scale)[0]
