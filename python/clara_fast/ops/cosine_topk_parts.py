"""Exact cosine search over keys that lie in several tensors, such as the shards of a store."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clara_fast.ops import _library
from clara_fast.ops.cosine_topk import cosine_topk, descending_topk, kernel_for

_ALL = torch.empty(0, dtype=torch.bool)  # what the kernel takes for a mask that allows every key


def cosine_topk_parts(
    queries: Tensor,
    keys: Sequence[Tensor],
    k: int,
    *,
    key_scales: Sequence[Tensor] | None = None,
    allowed: Sequence[Tensor | None] | None = None,
    release: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`cosine_topk` over the keys of several tensors as if they were one, without gradients.

    The CPU kernel takes them in one call, in which no thread waits for another where one tensor ends.

    Args:
        queries: ``[B, R]``.
        keys: at least one tensor ``[N_i, R]``, all of one dtype that :func:`cosine_topk` takes.
        k: at most the number of keys that may be found.
        key_scales: for each tensor its scales, ``[N_i]`` or ``[N_i, G]``; required for int8 and float8 keys.
        allowed: for each tensor which of its keys may be found, bool ``[N_i]``, or None for all.
        release: let the pages of a tensor and its scales go from this process once they are compared. Only for what
            is mapped from a file, whose pages come back when they are touched: other memory would lose what it holds.
            A hint, which the CPU kernel follows.

    Returns:
        scores ``[B, k]``, descending, and indices ``[B, k]`` int64 among the keys of all tensors, one after the other.

    Raises:
        TypeError, ValueError, RuntimeError: on shapes, dtypes or a k that do not fit.
    """
    scales = [None] * len(keys) if key_scales is None else key_scales
    masks = [None] * len(keys) if allowed is None else allowed
    if queries.is_cpu and kernel_for(queries, keys[0], k, scales[0]) is not None:
        found = [_ALL if mask is None else mask for mask in masks] if allowed is not None else []
        return _library.native["cosine_topk_parts"](
            queries.contiguous(), list(keys), k, list(key_scales or ()), found, release
        )
    best, first = [], 0
    for part in zip(keys, scales, masks, strict=True):
        scores, indices = _best_of_one(queries, k, *part)
        best.append((scores, indices + first))
        first += len(part[0])
    all_scores, all_indices = (torch.cat(columns, dim=1) for columns in zip(*best, strict=True))
    return descending_topk(all_scores, all_indices, k)


def _best_of_one(
    queries: Tensor, k: int, keys: Tensor, scales: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    count = len(keys) if mask is None else int(mask.sum())
    k = min(k, count)
    if mask is None:
        return cosine_topk(queries, keys, k, key_scales=scales)
    # No copy: find some more than k among all keys, until every query has k that count.
    more = k * len(keys) // max(count, 1) + 8
    while True:
        scores, indices = cosine_topk(queries, keys, min(more, len(keys)), key_scales=scales)
        counted = mask[indices]
        if more >= len(keys) or bool((counted.sum(1) >= k).all()):
            break
        more *= 4
    first = (~counted).to(torch.int8).argsort(dim=1, stable=True)[:, :k]
    return scores.gather(1, first), indices.gather(1, first)
