"""Packing alone: batches by tokens, shared prefixes, labels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clara_fast.modeling.packing import (
    PromptGroup,
    _batches_by_tokens,
    batches_by_tokens,
    group_prompts,
    pack_documents,
    pack_prompts,
)

MEMORY = frozenset({90, 91})


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_batches_hold_every_index_once_within_the_limit(lengths, limit):
    batches = batches_by_tokens(lengths, limit)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= limit for batch in batches)
    assert batches == _batches_by_tokens(lengths, limit), "the native code and its stand-in agree"


def test_batches_need_room():
    with pytest.raises(ValueError, match=r"max_tokens \(0\) must be at least 1"):
        batches_by_tokens([3], 0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(1, 3), max_size=5), st.lists(st.integers(4, 6), min_size=1)), min_size=1)
)
def test_groups_put_together_are_the_sequences(parts):
    sequences = [([7, 90, 91, *prompt, 8, *answer], 4 + len(prompt)) for prompt, answer in parts]
    group = group_prompts(sequences)
    assert [(group.context + prompt + answer, len(group.context + prompt)) for prompt, answer in group.branches] == (
        sequences
    )
    assert all(prompt for prompt, _ in group.branches)


def test_every_row_of_a_pack():
    groups = [
        PromptGroup([7, 90, 91, 5], [([1], [2, 3]), ([4, 4], [6])]),
        PromptGroup([7, 90, 91, 8], [([1], [9])]),
    ]
    packed = pack_prompts(groups, MEMORY)
    # instructions once; then each context from its first memory token, and its branches
    assert packed.input_ids.tolist() == [7, 90, 91, 5, 1, 2, 3, 4, 4, 6, 90, 91, 8, 1, 9]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 1, 2, 3, 4, 5]
    assert packed.labels.tolist() == [-100] * 4 + [2, 3, -100, -100, 6, -100] + [-100] * 3 + [9, -100]
    assert packed.memory_slots.tolist() == [1, 2, 10, 11]
    assert packed.layout.contexts.tolist() == [[-1, -1], [0, -1], [0, 1], [0, 1], [0, -1], [0, 4]]
    assert packed.longest == 7


def test_documents():
    packed = pack_documents([[5, 6, 7], [8]], [90, 91])
    assert packed.input_ids.tolist() == [5, 6, 7, 90, 91, 8, 90, 91]
    assert packed.offsets.tolist() == [0, 5, 8]
    assert packed.offsets.dtype == torch.int32
    assert packed.longest == 5
    assert len(pack_documents([], [90])) == 0
