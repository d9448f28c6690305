"""What every operator means, in plain differentiable PyTorch. Slow on purpose: tests compare against it.

Every function computes in the dtype of its inputs, so that float64 inputs give the exact answer and
low-precision inputs give what an eager implementation would.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from clara_fast.ops.layout import ContextLayout


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As transformers' LlamaRMSNorm: normalised in float32, rounded, times the weight."""
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(hidden.dtype)


def pool_memory(
    hidden: Tensor,
    offsets: Tensor,
    num_memory: int,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    rows = hidden if norm_weight is None else rms_norm(hidden, norm_weight, norm_eps)
    memories, losses = [], []
    bounds = offsets.tolist()
    for start, end in pairwise(bounds):
        document, memory = rows[start : end - num_memory], rows[end - num_memory : end]
        memories.append(memory)
        wide = rows.dtype if rows.dtype == torch.float64 else torch.float32
        if document.shape[0]:
            losses.append((document.mean(0) - memory.mean(0)).to(wide).square().mean())
        else:
            losses.append(rows.new_zeros((), dtype=wide))
    if not memories:
        empty = rows[:0].view(0, num_memory, rows.shape[1])
        return empty, empty.sum((1, 2))
    return torch.stack(memories), torch.stack(losses)


def cosine(query: Tensor, keys: Tensor) -> Tensor:
    """``query [..., R]`` with ``keys [..., N, R]``: ``[..., N]``, 0 where a vector is zero."""
    products = (keys @ query.unsqueeze(-1)).squeeze(-1)
    # The inner where keeps the norm's gradient at a zero vector from becoming NaN.
    q_zero, k_zero = (query == 0).all(-1, keepdim=True), (keys == 0).all(-1, keepdim=True)
    q_norm = torch.where(q_zero, torch.ones_like(query), query).norm(dim=-1, keepdim=True)
    k_norm = torch.where(k_zero, torch.ones_like(keys), keys).norm(dim=-1)
    zero = q_zero | k_zero.squeeze(-1)
    return torch.where(zero, torch.zeros_like(products), products / (q_norm * k_norm))


def _order(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Candidates best first: valid before invalid, numbers before NaN, ties by index."""
    keys = torch.where(scores.isnan(), torch.full_like(scores, -2.0), scores)
    if valid is not None:
        keys = keys.masked_fill(~valid, -3.0)
    return keys.sort(dim=-1, descending=True, stable=True).indices


def cosine_topk(queries: Tensor, keys: Tensor, k: int, *, key_scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    wide = keys.to(queries.dtype)
    if key_scales is not None:
        groups = key_scales.to(queries.dtype).reshape(len(keys), -1, 1)
        wide = (wide.reshape(*groups.shape[:2], -1) * groups).reshape(keys.shape)
    scores = cosine(queries, wide.expand(queries.shape[0], *wide.shape))
    indices = _order(scores.detach())[:, :k]
    return scores.gather(1, indices), indices


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
    """The dense formulation: soft selection weights ``[B, k, N]`` with hard values."""
    batch, count = keys.shape[:2]
    scores = cosine(query, keys)
    if valid is None:
        valid = torch.ones(batch, count, dtype=torch.bool, device=query.device)
    scores = scores.masked_fill(~valid, 0)
    order = _order(scores.detach(), valid)
    logits = (scores / temperature).masked_fill(~valid, -math.inf)
    selected, indices = [], []
    for row in range(batch):
        row_logits = logits[row]
        live = int(valid[row].sum())
        for slot in range(k):
            if slot >= live:
                selected.append(memory.new_zeros(memory.shape[2:]))
                indices.append(-1)
                continue
            chosen = int(order[row, slot])
            soft = row_logits.softmax(0)
            # (hard + soft - soft.detach()) @ memory, written so that the value is exactly the chosen memory.
            surrogate = torch.einsum("n,nmd->md", (soft - soft.detach()).to(memory.dtype), memory[row].detach())
            selected.append(memory[row, chosen] + surrogate)
            indices.append(chosen)
            taken = torch.zeros_like(row_logits)
            taken[chosen] = taken_logit
            row_logits = row_logits + taken
    shape = (batch, k, *memory.shape[2:])
    selected_memory = torch.stack(selected).view(shape) if selected else memory.new_zeros(shape)
    return (
        selected_memory,
        torch.tensor(indices, dtype=torch.int64, device=query.device).view(batch, k),
        scores,
    )


def attention_mask(layout: ContextLayout, num_query_rows: int, num_key_rows: int) -> Tensor:
    """bool ``[Tq, Tk]``: which key rows each query row sees."""
    mask = torch.zeros(num_query_rows, num_key_rows, dtype=torch.bool)
    q_start, q_len, kv_start, kv_len, contexts = (tensor.tolist() for tensor in layout.tensors())
    for segment in range(layout.num_segments):
        for row in range(q_len[segment]):
            query_row = q_start[segment] + row
            own = kv_len[segment] - q_len[segment] + row + 1
            mask[query_row, kv_start[segment] : kv_start[segment] + max(own, 0)] = True
            for context in contexts[segment]:
                if context >= 0:
                    mask[query_row, kv_start[context] : kv_start[context] + kv_len[context]] = True
    return mask.to(layout.device)


def compressed_context_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: ContextLayout, *, scale: float | None = None
) -> Tensor:
    if scale is None:
        scale = query.shape[2] ** -0.5
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    mask = attention_mask(layout, query.shape[0], key.shape[0])
    scores = torch.einsum("qhe,khe->hqk", query, key) * scale
    wide = scores if scores.dtype == torch.float64 else scores.float()
    seen = mask.any(1)
    # A row that sees nothing would give NaN, also in the gradient: let it see everything and drop it after.
    weights = wide.masked_fill(~(mask | ~seen[:, None]), -math.inf).softmax(-1) if key.shape[0] else wide
    out = torch.einsum("hqk,khe->qhe", weights.to(value.dtype), value)
    return torch.where(seen[:, None, None], out, torch.zeros_like(out))
