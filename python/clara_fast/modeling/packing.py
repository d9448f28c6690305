"""Token sequences laid end to end: what the compressor and the generator read instead of padded rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from clara_fast.ops import ContextLayout


class _Movable:
    """Moves every tensor of a dataclass; the name ``to`` is what accelerate looks for in a batch."""

    def to(self, device: torch.device | str, **kwargs: bool) -> Self:
        moved = {}
        for f in fields(self):  # type: ignore[arg-type]  # only dataclasses inherit this
            value = getattr(self, f.name)
            moved[f.name] = value if isinstance(value, int) else value.to(device, **kwargs)
        return type(self)(**moved)


@dataclass
class PackedDocuments(_Movable):
    """``S`` documents (or questions), each followed by its ``m`` memory tokens.

    Attributes:
        input_ids: ``[T]`` int64, every document's tokens with its memory tokens last.
        position_ids: ``[T]`` int64, restarting with every document.
        offsets: ``[S + 1]`` int32, where each document starts.
        layout: causal attention within each document.
        longest: tokens of the longest document, memory tokens included.
    """

    input_ids: Tensor
    position_ids: Tensor
    offsets: Tensor
    layout: ContextLayout
    longest: int

    def __len__(self) -> int:
        return self.offsets.numel() - 1


@dataclass
class PackedPrompts(_Movable):
    """Generator sequences with their answers; questions on the same memories share them as one context.

    Attributes:
        input_ids: ``[T]`` int64.
        position_ids: ``[T]`` int64; a branch goes on where its context ends.
        labels: ``[T]`` int64, the *next* token wherever an answer's token follows, -100 elsewhere.
        memory_slots: ``[n * m]`` int64, the rows that memories take, context by context.
        layout: who reads whom.
        longest: tokens of the longest sequence, its context included.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    memory_slots: Tensor
    layout: ContextLayout
    longest: int


def pack_documents(
    texts: Sequence[Sequence[int]], memory_ids: Sequence[int], *, spread: bool = False
) -> PackedDocuments:
    """Pack token sequences, appending ``memory_ids`` to each.

    ``spread`` gives the memory tokens positions spread evenly over the text instead of behind it.
    """
    m = len(memory_ids)
    input_ids: list[int] = []
    positions: list[Tensor] = []
    offsets = [0]
    for text in texts:
        n = len(text)
        input_ids += [*text, *memory_ids]
        positions.append(torch.arange(n + m))
        if spread:
            # Slot j stands in the middle of the j-th of m equal parts.
            positions[-1][n:] = (torch.arange(m) * 2 + 1) * n // (2 * m)
        offsets.append(len(input_ids))
    bounds = torch.tensor(offsets, dtype=torch.int32)
    return PackedDocuments(
        input_ids=torch.tensor(input_ids, dtype=torch.int64),
        position_ids=torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64),
        offsets=bounds,
        layout=ContextLayout.packed(offsets=offsets),
        longest=max((len(text) + m for text in texts), default=0),
    )


@dataclass
class PromptGroup:
    """Sequences that begin alike: ``context`` (with the memory slots) and the ``branches`` that go on from it.

    ``branches`` are pairs of token ids: the rest of the prompt, and the answer that the loss is taken on.
    """

    context: list[int]
    branches: list[tuple[list[int], list[int]]]


def group_prompts(sequences: Sequence[tuple[list[int], int]]) -> PromptGroup:
    """Share what ``(token ids, prompt length)`` sequences begin with: their longest common prefix is the context.

    Every branch keeps at least its prompt's last token, which predicts the first token of the answer.
    """
    first = sequences[0][0]
    cut = min(length for _, length in sequences) - 1
    for ids, _ in sequences[1:]:
        cut = next((i for i in range(cut) if ids[i] != first[i]), cut)
    return PromptGroup(first[:cut], [(ids[cut:length], ids[length:]) for ids, length in sequences])


def pack_prompts(groups: Sequence[PromptGroup], memory_ids: frozenset[int]) -> PackedPrompts:
    """Pack groups so that nothing is computed twice: instructions, then each context's memories, then its branches.

    What stands before the first memory token is the same for all groups with one kind of prompt; it is laid down once
    as a segment that their contexts and branches read.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    positions: list[Tensor] = []
    lengths: list[int] = []
    contexts: list[list[int]] = []

    def lay(tokens: list[int], targets: list[int], start: int, reads: list[int]) -> int:
        input_ids.extend(tokens)
        labels.extend(targets)
        positions.append(torch.arange(start, start + len(tokens)))
        lengths.append(len(tokens))
        contexts.append(reads)
        return len(lengths) - 1

    instructions: dict[tuple[int, ...], int] = {}
    for group in groups:
        cut = next((i for i, token in enumerate(group.context) if token in memory_ids), len(group.context))
        head, rest = tuple(group.context[:cut]), group.context[cut:]
        if head not in instructions:
            instructions[head] = lay(list(head), [-100] * cut, 0, [])
        reads = [instructions[head]]
        if rest:
            reads = [*reads, lay(rest, [-100] * len(rest), cut, reads)]
        for prompt, answer in group.branches:
            # Row i predicts token i + 1, so the answer's labels start one row early.
            lay(prompt + answer, [-100] * (len(prompt) - 1) + answer + [-100], len(group.context), reads)
    ids = torch.tensor(input_ids, dtype=torch.int64)
    starts = [0, *accumulate(lengths)][:-1]
    position_ids = torch.cat(positions)
    return PackedPrompts(
        input_ids=ids,
        position_ids=position_ids,
        labels=torch.tensor(labels, dtype=torch.int64),
        memory_slots=torch.isin(ids, torch.tensor(sorted(memory_ids))).nonzero().flatten(),
        layout=ContextLayout.from_lists(starts, lengths, starts, lengths, contexts),
        longest=int(position_ids.max()) + 1,
    )


def batches_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group sequence indices into batches of at most ``max_tokens`` tokens, longest first.

    A sequence longer than that gets a batch of its own. Raises ``ValueError`` unless ``max_tokens`` is positive.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens ({max_tokens}) must be at least 1")
    try:
        import numpy as np

        from clara_fast._native import pack_sequences
    except ImportError:
        return _batches_by_tokens(lengths, max_tokens)
    return pack_sequences(np.asarray(lengths, dtype=np.int64), max_tokens)


def _batches_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    total = max_tokens + 1
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if total + lengths[i] > max_tokens:
            batches.append([])
            total = 0
        batches[-1].append(i)
        total += lengths[i]
    return batches
