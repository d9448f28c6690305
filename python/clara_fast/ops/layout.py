"""Who attends to whom in a packed batch: :class:`ContextLayout`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node

Lengths = Sequence[int] | Tensor
_MOST_ROWS = 2**31 - 1


def _int_list(name: str, lengths: Lengths) -> list[int]:
    if isinstance(lengths, int):
        raise TypeError(f"{name} must be a list of integers or such a tensor, got {lengths}")
    values = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    for value in values if isinstance(values, list) else [values]:
        if not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be a list of integers or such a tensor, got {value!r}")
    return values


def _check_lists(name: str, lists: Sequence, other: str, others: Sequence) -> None:
    if len(lists) != len(others):
        raise ValueError(f"{name} ({len(lists)}) must hold one list for each of {other} ({len(others)})")


def _check_range(name: str, segment: int, start: int, length: int, rows: int) -> None:
    if start < 0 or length < 0:
        raise ValueError(f"{name}_start ({start}) and {name}_len ({length}) of segment {segment} must not be negative")
    if start + length > rows:
        raise ValueError(
            f"{name}_start + {name}_len ({start + length}) of segment {segment} must be at most the number of rows "
            f"({rows})"
        )


@dataclass(frozen=True, eq=False)
class ContextLayout:
    """S segments of packed query and key rows, and the segments that each one reads in full.

    Row i of segment s attends to every key row of its contexts, and to its own key rows up to
    ``kv_len[s] - q_len[s] + i`` (causal, aligned at the end).

    Args:
        q_start, q_len: int32 ``[S]``, the query rows of each segment; segments do not overlap.
        kv_start, kv_len: int32 ``[S]``, the key rows of each segment.
        contexts: int32 ``[S, C]``, indices of segments, -1 where there is none. A context is read through its
            key rows only: it may come later in the batch, and its own contexts are not inherited. The key
            rows that one segment reads, its own and its contexts', must not overlap.

    Raises:
        TypeError, ValueError: on a type, shape, dtype or device that does not fit. Values are left to
            :meth:`validate`, but for what is made from lists.
    """

    q_start: Tensor
    q_len: Tensor
    kv_start: Tensor
    kv_len: Tensor
    contexts: Tensor

    def __post_init__(self) -> None:
        for name, tensor in zip(self.__dataclass_fields__, self.tensors(), strict=True):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{name} must be an int32 tensor, got {type(tensor).__name__} (for lists: ContextLayout.from_lists)"
                )
            if tensor.device != self.device:
                raise ValueError(f"{name} must be on the device of q_len ({self.device}), is on {tensor.device}")
        segments = self.q_start.shape[0] if self.q_start.dim() == 1 else -1
        for name, tensor in zip(self.__dataclass_fields__, self.tensors(), strict=True):
            if tensor.dtype != torch.int32:
                raise ValueError(f"{name} must be int32, got {tensor.dtype}")
            if name != "contexts" and (tensor.dim() != 1 or tensor.shape[0] != segments):
                raise ValueError(f"{name} must have shape [S] like q_start, got {list(tensor.shape)}")
        if self.contexts.dim() != 2 or self.contexts.shape[0] != segments:
            raise ValueError(f"contexts must have shape [S, C] with S = {segments}, got {list(self.contexts.shape)}")

    @property
    def num_segments(self) -> int:
        return self.q_len.shape[0]

    @property
    def device(self) -> torch.device:
        return self.q_len.device

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q_start, self.q_len, self.kv_start, self.kv_len, self.contexts

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ContextLayout:
        return ContextLayout(*(tensor.to(device, non_blocking=non_blocking) for tensor in self.tensors()))

    @classmethod
    def from_lists(
        cls,
        q_start: Sequence[int],
        q_len: Sequence[int],
        kv_start: Sequence[int],
        kv_len: Sequence[int],
        contexts: Sequence[Sequence[int]],
        *,
        device: torch.device | str | None = None,
    ) -> ContextLayout:
        """From Python lists; ``contexts`` may be ragged."""
        if len(contexts) != len(q_start):
            raise ValueError(f"contexts ({len(contexts)}) must hold one list for each of q_start ({len(q_start)})")
        for name, firsts, sizes in (("q", q_start, q_len), ("kv", kv_start, kv_len)):
            for segment, (first, size) in enumerate(zip(firsts, sizes)):
                _check_range(name, segment, first, size, _MOST_ROWS)
        width = max((len(row) for row in contexts), default=0)
        padded = [list(row) + [-1] * (width - len(row)) for row in contexts]
        lists = (list(values) for values in (q_start, q_len, kv_start, kv_len))
        starts, lengths, kv_starts, kv_lengths = (torch.tensor(values, dtype=torch.int32) for values in lists)
        rows = torch.tensor(padded, dtype=torch.int32).reshape(len(padded), width)
        layout = cls(starts, lengths, kv_starts, kv_lengths, rows)
        return layout if device is None else layout.to(device)

    @classmethod
    def _self_attention(cls, lengths: list[int], contexts: list[list[int]], device) -> ContextLayout:
        starts = [0, *accumulate(lengths)][:-1]
        return cls.from_lists(starts, lengths, starts, lengths, contexts, device=device)

    @classmethod
    def packed(
        cls,
        lengths: Lengths | None = None,
        *,
        offsets: Lengths | None = None,
        device: torch.device | str | None = None,
    ) -> ContextLayout:
        """Independent causal segments, one after the other, given by ``lengths [S]`` or ``offsets [S+1]``."""
        if lengths is not None and offsets is None:
            sizes = _int_list("lengths", lengths)
            return cls._self_attention(sizes, [[] for _ in sizes], device)
        if offsets is None or lengths is not None:
            raise ValueError("give exactly one of lengths and offsets")
        bounds = _int_list("offsets", offsets)
        if not bounds:
            raise ValueError("offsets must hold at least 1 number, got none")
        sizes = [end - start for start, end in pairwise(bounds)]
        return cls.from_lists(bounds[:-1], sizes, bounds[:-1], sizes, [[] for _ in sizes], device=device)

    @classmethod
    def branches(
        cls,
        context_lengths: Lengths,
        branch_lengths: Sequence[Sequence[int]],
        *,
        device: torch.device | str | None = None,
    ) -> ContextLayout:
        """Each context followed by its branches: context_0, its branches, context_1, its branches, ...

        A context is causal in itself; a branch reads its context in full and itself causally, and no other
        branch.
        """
        contexts_of: list[list[int]] = []
        lengths: list[int] = []
        context_sizes = _int_list("context_lengths", context_lengths)
        _check_lists("branch_lengths", branch_lengths, "context_lengths", context_sizes)
        for context_length, branches in zip(context_sizes, branch_lengths, strict=True):
            context = len(lengths)
            lengths += [context_length, *_int_list("branch_lengths", branches)]
            contexts_of += [[], *([context] for _ in branches)]
        return cls._self_attention(lengths, contexts_of, device)

    @classmethod
    def blocks(
        cls,
        block_lengths: Sequence[Sequence[int]],
        final_lengths: Lengths,
        *,
        device: torch.device | str | None = None,
    ) -> ContextLayout:
        """Per sample, independent causal blocks, then a final segment that reads all of them and itself."""
        contexts_of: list[list[int]] = []
        lengths: list[int] = []
        final_sizes = _int_list("final_lengths", final_lengths)
        _check_lists("block_lengths", block_lengths, "final_lengths", final_sizes)
        for blocks, final_length in zip(block_lengths, final_sizes, strict=True):
            first = len(lengths)
            lengths += [*_int_list("block_lengths", blocks), final_length]
            contexts_of += [[] for _ in blocks]
            contexts_of.append(list(range(first, first + len(blocks))))
        return cls._self_attention(lengths, contexts_of, device)

    @classmethod
    def padded(
        cls,
        kv_lengths: Lengths,
        kv_stride: int,
        *,
        kv_padding: Lengths | int = 0,
        q_lengths: Lengths | int | None = None,
        q_stride: int | None = None,
        q_padding: Lengths | int = 0,
        device: torch.device | str | None = None,
    ) -> ContextLayout:
        """Prefill or decode over a padded cache ``[B, kv_stride, ...]``, flattened to rows.

        Args:
            kv_lengths: ``[B]``, how many key rows of each sample are valid.
            kv_stride: rows of the cache per sample.
            kv_padding: unused rows before the valid ones (left padding), one number or ``[B]``.
            q_lengths: valid query rows per sample, the last ones of its keys; all of ``kv_lengths`` by
                default (prefill), 1 for decode.
            q_stride: query rows per sample; the largest of ``q_padding + q_lengths`` by default.
            q_padding: unused query rows before the valid ones.
        """
        sizes = _int_list("kv_lengths", kv_lengths)

        def spread(name: str, value: Lengths | int) -> list[int]:
            values = [value] * len(sizes) if isinstance(value, int) else _int_list(name, value)
            if len(values) != len(sizes):
                raise ValueError(f"{name} ({len(values)}) must hold one number for each of kv_lengths ({len(sizes)})")
            return values

        q_sizes = spread("q_lengths", sizes if q_lengths is None else q_lengths)
        q_pads, kv_pads = spread("q_padding", q_padding), spread("kv_padding", kv_padding)
        if q_stride is None:
            q_stride = max((pad + size for pad, size in zip(q_pads, q_sizes, strict=True)), default=0)
        for name, pads, lengths, stride in (("q", q_pads, q_sizes, q_stride), ("kv", kv_pads, sizes, kv_stride)):
            for sample, (pad, length) in enumerate(zip(pads, lengths)):
                if pad + length > stride:
                    raise ValueError(
                        f"{name}_padding + {name}_lengths ({pad + length}) of sample {sample} must be at most "
                        f"{name}_stride ({stride})"
                    )
        return cls.from_lists(
            [row * q_stride + pad for row, pad in enumerate(q_pads)],
            q_sizes,
            [row * kv_stride + pad for row, pad in enumerate(kv_pads)],
            sizes,
            [[] for _ in sizes],
            device=device,
        )

    def validate(self, num_query_rows: int | None = None, num_key_rows: int | None = None) -> ContextLayout:
        """Checks the values (copies them to the host if they are not there) and returns the layout itself.

        Raises:
            ValueError: a negative length, a range outside the rows, overlapping query ranges or a context
                that is no segment.
        """
        q_start, q_len, kv_start, kv_len = (tensor.tolist() for tensor in self.tensors()[:4])
        segments = self.num_segments
        for name, starts, lengths, rows in (
            ("q", q_start, q_len, num_query_rows),
            ("kv", kv_start, kv_len, num_key_rows),
        ):
            for segment, (start, length) in enumerate(zip(starts, lengths)):
                _check_range(name, segment, start, length, _MOST_ROWS if rows is None else rows)
        ranges = sorted((start, start + length) for start, length in zip(q_start, q_len) if length)
        for (_, end), (start, _) in pairwise(ranges):
            if start < end:
                raise ValueError(f"query ranges must not overlap: one starts at {start} before another ends at {end}")
        for segment, row in enumerate(self.contexts.tolist()):
            for context in row:
                if not -1 <= context < segments:
                    raise ValueError(
                        f"contexts ({context}) of segment {segment} must be -1 or a segment below {segments}"
                    )
        return self


def _from_leaves(leaves: Iterable[Any], _: None) -> ContextLayout:
    # Not through __init__: torch puts other things than tensors into a tree while it traces.
    layout = object.__new__(ContextLayout)
    for name, leaf in zip(ContextLayout.__dataclass_fields__, leaves, strict=True):
        object.__setattr__(layout, name, leaf)
    return layout


# So that torch.export and torch.utils.checkpoint see the tensors in it.
register_pytree_node(
    ContextLayout,
    lambda layout: (list(layout.tensors()), None),
    _from_leaves,
    serialized_type_name="clara_fast.ops.ContextLayout",
    to_dumpable_context=lambda _: None,
    from_dumpable_context=lambda _: None,
    flatten_with_keys_fn=lambda layout: (
        [(GetAttrKey(name), getattr(layout, name)) for name in layout.__dataclass_fields__],
        None,
    ),
)
