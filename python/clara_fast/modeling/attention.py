"""``attn_implementation="clara_fast"`` for transformers models: attention, and the mask that goes with it.

Registered by ``import clara_fast``. :func:`clara_fast.ops.compressed_context_attention` computes the passes whose batch
is a :class:`ContextLayout`:

- those given one as the keyword ``clara_layout``, as :class:`clara_fast.Clara` does;
- packed sequences, told by ``position_ids`` that start again (``DataCollatorWithFlattening``) or by ``cu_seq_lens_q``
  and ``cu_seq_lens_k``: where sdpa fills a mask of rows times rows, and computes what it hides, this computes neither;
- on a CPU, every other batch, padded or not, in prefill, in training, and in decode over a
  cache (of any kind, also within a sliding window): each new token reads one run of its sample's keys.

Every other pass (a mask with holes, many tokens over a cache, a prompt longer than a window, a GPU's plain batches)
goes to the library's scaled-dot-product kernel. Padding rows come out as zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from clara_fast.ops import ContextLayout, compressed_context_attention

IMPLEMENTATION = "clara_fast"


def clara_fast_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    clara_layout: ContextLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: ``query [B, Hq, T, E]``, ``key`` and ``value [B, Hkv, T, E]``, out ``[B, T, Hq, E]``.

    Raises:
        ValueError: for what neither way computes: soft-capped scores, sinks, attention weights as an output; and with
            a layout dropout and position biases.
    """
    _refuse({"softcap": kwargs.get("softcap"), "s_aux": kwargs.get("s_aux")}, "attention")
    if kwargs.get("output_attentions"):
        raise ValueError(
            f'{IMPLEMENTATION} attention has no weights to give: load the model with attn_implementation="eager" '
            "for output_attentions"
        )
    reads: _CacheReads | None = getattr(attention_mask, "clara_cache", None)
    if reads is not None:
        _refuse({"dropout": dropout, "position_bias": kwargs.get("position_bias")}, "decoding")
        return reads.attention(query, key, value, scaling), None
    bounds = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    layout = clara_layout if clara_layout is not None else getattr(attention_mask, "clara_layout", None)
    unpadded: ContextLayout | None = getattr(attention_mask, "clara_unpadded", None)
    attention_mask = attention_mask if unpadded is None else None
    if layout is None and attention_mask is None:
        layout = _layout_of_bounds(*bounds)
        if layout is None and query.shape[2] == key.shape[2]:
            layout = _layout_of_positions(kwargs.get("position_ids"))
    elif layout is None and bounds[0] is not None and attention_mask is not None and query.shape[2] == key.shape[2]:
        attention_mask = _mask_within(attention_mask, bounds[0])
    # Only now: whoever made the mask may not have known that the batch is packed.
    layout = unpadded if layout is None else layout
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    _refuse({"dropout": dropout, "position_bias": kwargs.get("position_bias")}, "packed attention")
    batch, heads, rows, _ = query.shape
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    out = compressed_context_attention(query, key, value, layout, scale=scaling)
    return out.view(batch, rows, heads, -1), None


def _refuse(features: dict[str, Any], what: str) -> None:
    for name, value in features.items():
        if value is not None and not (isinstance(value, float) and value == 0.0):
            shown = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else value
            raise ValueError(f"{IMPLEMENTATION} {what} does not know {name} ({shown}), which the model asks for")


def _layout_of_bounds(q_bounds: Tensor | None, kv_bounds: Tensor | None) -> ContextLayout | None:
    """The layout that FlashAttention's cumulative lengths describe. Nothing is read from the device."""
    if q_bounds is None or kv_bounds is None:
        return None
    q_bounds, kv_bounds = q_bounds.to(torch.int32), kv_bounds.to(torch.int32)
    return _packed_layout(q_bounds[:-1], q_bounds.diff(), kv_bounds[:-1], kv_bounds.diff())


def _mask_within(mask: Tensor, bounds: Tensor) -> Tensor:
    """``mask [..., T, T]``, where it holds truth values, within the sequences alone: a window may be wider."""
    if mask.dtype != torch.bool:
        return mask
    rows = torch.arange(mask.shape[-1], device=mask.device, dtype=bounds.dtype)
    sequence = torch.bucketize(rows, bounds[1:], right=True)
    return mask & (sequence == sequence.unsqueeze(1))


def _layout_of_positions(position_ids: Tensor | None) -> ContextLayout | None:
    """The layout of one row of packed sequences, each counting from the same number.

    The mask tells as much, but not to a model that fills a cache, as models do in training unless told not to.
    """
    if position_ids is None or position_ids.shape[0] != 1 or torch.compiler.is_compiling():
        return None
    # Asked once for all layers, since it waits for the device, and again where the caller has written into it.
    state = position_ids.clone() if position_ids.is_inference() else position_ids._version
    known, layout = getattr(position_ids, "clara_layout", (None, None))
    if known is None or not _is_same(known, state):
        positions = position_ids[0]
        starts = positions == positions[:1]
        layout = None
        if bool((starts.sum() > 1) & (starts[1:] | (positions.diff() == 1)).all()):
            bounds = torch.nn.functional.pad(starts, (0, 1), value=True).nonzero().squeeze(1).to(torch.int32)
            layout = _packed_layout(bounds[:-1], bounds.diff(), bounds[:-1], bounds.diff())
        position_ids.clara_layout = state, layout  # type: ignore[attr-defined]
    return layout


def _is_same(known: Tensor | int, state: Tensor | int) -> bool:
    """Whether a version, or the contents of a tensor that keeps none, are the ones seen before."""
    if isinstance(known, Tensor) and isinstance(state, Tensor):
        return known.equal(state)
    return isinstance(known, int) and isinstance(state, int) and known == state


def _packed_layout(q_start: Tensor, q_len: Tensor, kv_start: Tensor, kv_len: Tensor) -> ContextLayout:
    return ContextLayout(q_start, q_len, kv_start, kv_len, q_start.new_empty((q_start.shape[0], 0)))


def clara_fast_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """The mask of one kind of layer, as ``sdpa_mask`` makes it, or :func:`packed_mask` with a layout in its place."""
    traced = use_vmap or torch.compiler.is_compiling() or torch.jit.is_tracing()
    on_cpu = torch.device(device).type == "cpu"
    # Dropout is sdpa's.
    ours = not traced and not getattr(options.get("config"), "attention_dropout", None)
    square = isinstance(q_offset, int) and q_offset == kv_offset == 0 and q_length == kv_length > 1
    if ours and square:
        if attention_mask is None:
            rows = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
            # Only the mask's maker knows that a batch is packed, and then allows no skipping and has no padding.
            packed = not allow_is_causal_skip
            layout = _layout_of_mask(mask_function, rows) if packed or on_cpu else None
        else:
            packed = False
            one_run = on_cpu and _is_one_run(attention_mask, batch_size, q_length)
            layout = _layout_of_mask(mask_function, attention_mask) if one_run else None
        if layout is not None:
            unpadded = not packed and layout.num_segments == batch_size and _is_whole(attention_mask, q_length)
            return packed_mask(layout.q_start, layout, unpadded=unpadded)
    decodes = ours and on_cpu and q_length == 1
    if decodes and mask_function is causal_mask_function and _is_whole(attention_mask, end := int(q_offset) + 1):
        return _CacheReads([0] * batch_size, [end - kv_offset] * batch_size).mask()
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and not decodes,
        use_vmap=use_vmap,
        device=device,
        **options,
    )
    reads = _CacheReads.of_mask(mask[:, 0, 0]) if decodes and mask is not None else None
    return mask if reads is None else reads.mask()


class _CacheReads:
    """Which rows of its cache the new token of each sample reads: ``starts[b]`` and ``lengths[b]`` more."""

    def __init__(self, starts: list[int], lengths: list[int]) -> None:
        self.starts, self.lengths = starts, lengths
        self._layouts: dict[tuple[int, int], ContextLayout] = {}

    @classmethod
    def of_mask(cls, visible: Tensor) -> _CacheReads | None:
        """Of ``visible [B, rows]``, bool; None where what a sample reads has holes."""
        lengths = visible.sum(1)
        starts = visible.int().argmax(1)
        ends = visible.shape[1] - visible.flip(1).int().argmax(1)
        if bool(((ends - starts != lengths) & (lengths > 0)).any()):
            return None
        return cls(starts.tolist(), lengths.tolist())

    def mask(self) -> Tensor:
        mask = packed_mask(torch.empty(0))
        mask.clara_cache = self  # type: ignore[attr-defined]
        return mask

    def attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """``query [B, Hq, 1, E]`` over the cache ``[B, Hkv, rows, E]``, read where it lies: out ``[B, 1, Hq, Ev]``."""
        batch, heads, rows, size = key.shape
        layout = self._layouts.get((heads, rows))
        if layout is None:  # in the first layer
            layout = self._layouts[heads, rows] = self._by_heads(heads, rows)
        query = query.reshape(batch * heads, -1, size)
        key, value = (states.reshape(batch * heads * rows, 1, -1) for states in (key, value))
        return compressed_context_attention(query, key, value, layout, scale=scale).view(batch, 1, -1, value.shape[2])

    def _by_heads(self, heads: int, rows: int) -> ContextLayout:
        """Every key head of a sample is a segment of its own, its query heads the heads of one row."""
        samples = [b for b in range(len(self.starts)) for _ in range(heads)]
        starts = [segment * rows + self.starts[b] for segment, b in enumerate(samples)]
        lengths = [self.lengths[b] for b in samples]
        tensors = (torch.tensor(v, dtype=torch.int32) for v in ([*range(len(samples))], [1] * len(samples)))
        return _packed_layout(*tensors, *(torch.tensor(v, dtype=torch.int32) for v in (starts, lengths)))


def _is_whole(mask: Tensor | None, rows: int) -> bool:
    """Whether nothing of the first ``rows`` keys is padding."""
    return mask is None or (mask.dim() == 2 and mask.shape[1] >= rows and bool(mask[:, :rows].all()))


def _is_one_run(mask: Tensor, batch_size: int, rows: int) -> bool:
    """Whether the tokens of each sample are one run, with padding only around it."""
    if mask.shape != (batch_size, rows):
        return False
    return int(mask.diff(dim=1).sum(1).add(mask[:, 0]).add(mask[:, -1]).max()) <= 2


def _layout_of_mask(mask_function: Callable, valid: Tensor) -> ContextLayout | None:
    """The segments of ``valid [B, T]`` rows that ``mask_function`` describes, None if it is not causal within them.

    A row starts a segment if it does not see the one before. What transformers' functions can add to that (windows,
    chunks, blocks that see ahead) shows in whether each row sees its segment's first row, and not the next.
    """
    batch, rows = valid.shape
    sample = torch.arange(batch, device=valid.device).unsqueeze(1)
    row = torch.arange(rows, device=valid.device).expand(batch, rows)

    def sees(from_row: Tensor, to_row: Tensor) -> Tensor:
        return mask_function(sample, sample.new_zeros(()), from_row, to_row).expand(from_row.shape)

    joined = torch.nn.functional.pad(sees(row[:, 1:], row[:, :-1]) & valid[:, 1:] & valid[:, :-1], (1, 0))
    starts = valid & ~joined
    first = torch.where(starts, row, 0).cummax(1).values
    causal = (sees(row, first) | ~valid).all() & ~(sees(row[:, :-1], row[:, 1:]) & valid[:, 1:]).any()
    if not causal:
        return None
    ends = valid & ~torch.nn.functional.pad(joined[:, 1:], (0, 1))
    start, end = (edge.flatten().nonzero().squeeze(1) for edge in (starts, ends))
    start, length = start.to(torch.int32), (end + 1 - start).to(torch.int32)
    return _packed_layout(start, length, start, length)


def packed_mask(like: Tensor, layout: ContextLayout | None = None, *, unpadded: bool = False) -> Tensor:
    """A mask that says nothing itself: transformers passes four-dimensional masks through as they are.

    The layout of an ``unpadded`` batch gives way to what the attention's other arguments say.
    """
    mask = torch.empty(1, 1, 0, 0, device=like.device, dtype=torch.bool)
    if layout is not None:
        setattr(mask, "clara_unpadded" if unpadded else "clara_layout", layout)
    return mask


AttentionInterface.register(IMPLEMENTATION, clara_fast_attention)
AttentionMaskInterface.register(IMPLEMENTATION, clara_fast_mask)
