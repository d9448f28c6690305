"""``attn_implementation="clara_fast"`` for transformers models.

A forward pass that is given a ``clara_layout`` runs :func:`clara_fast.ops.compressed_context_attention` over packed
rows. Every other pass (prefill and decode of ``generate``) is a plain padded batch, for which the library's
scaled-dot-product kernel is the faster way to the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from clara_fast import ops

IMPLEMENTATION = "clara_fast"


def clara_fast_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    clara_layout: ops.ContextLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: ``query [1, Hq, T, E]``, ``key`` and ``value [1, Hkv, T, E]``, out ``[1, T, Hq, E]``.

    Raises:
        ValueError: for what a packed layout cannot express: attention dropout, soft-capped scores, sinks.
    """
    if clara_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    for name, off in (("dropout", dropout), ("softcap", kwargs.get("softcap")), ("s_aux", kwargs.get("s_aux"))):
        if off is not None and not (isinstance(off, float) and off == 0.0):
            raise ValueError(f"packed attention does not know {name} ({off}); the base model asks for it")
    out = ops.compressed_context_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        clara_layout,
        scale=scaling,
    )
    return out.unsqueeze(0), None


def packed_mask(like: Tensor) -> Tensor:
    """A mask that says nothing: transformers passes four-dimensional masks through as they are, so none is built."""
    return torch.empty(1, 1, 0, 0, device=like.device, dtype=like.dtype)


AttentionInterface.register(IMPLEMENTATION, clara_fast_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
