import pytest
import torch

from clara_fast.ops import ContextLayout
from clara_fast.ops.reference import attention_mask


def mask_rows(layout: ContextLayout, rows: int, keys: int) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in attention_mask(layout, rows, keys).tolist()]


def as_lists(layout: ContextLayout) -> list[list]:
    return [tensor.tolist() for tensor in layout.tensors()]


def test_packed_segments_are_causal_and_apart():
    layout = ContextLayout.packed([2, 0, 3])
    assert mask_rows(layout, 5, 5) == ["x....", "xx...", "..x..", "..xx.", "..xxx"]
    assert as_lists(ContextLayout.packed(offsets=torch.tensor([0, 2, 2, 5]))) == as_lists(layout)
    assert all(tensor.dtype == torch.int32 for tensor in layout.tensors())
    assert layout.contexts.shape == (3, 0)


def test_offsets_may_leave_out_rows_at_both_ends():
    assert mask_rows(ContextLayout.packed(offsets=[1, 3]), 4, 4) == ["....", ".x..", ".xx.", "...."]


def test_branches_read_their_context_and_not_each_other():
    layout = ContextLayout.branches([2, 1], [[2, 1], []])
    assert mask_rows(layout, 6, 6) == ["x.....", "xx....", "xxx...", "xxxx..", "xx..x.", ".....x"]


def test_blocks_are_read_by_the_final_segment_of_their_sample():
    layout = ContextLayout.blocks([[1, 2], [1]], [1, 2])
    assert mask_rows(layout, 7, 7) == [
        "x......",
        ".x.....",
        ".xx....",
        "xxxx...",
        "....x..",
        "....xx.",
        "....xxx",
    ]


def test_padded_prefill_and_decode():
    prefill = ContextLayout.padded([2, 3], 3, kv_padding=[1, 0], q_padding=[1, 0], q_stride=3)
    assert mask_rows(prefill, 6, 6) == ["......", ".x....", ".xx...", "...x..", "...xx.", "...xxx"]
    decode = ContextLayout.padded([2, 3], 4, kv_padding=[1, 0], q_lengths=1)
    assert mask_rows(decode, 2, 8) == [".xx.....", "....xxx."]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            ([0], [3], [0], [3], [[]]),
            r"q_start \+ q_len \(3\) of segment 0 must be at most the number of rows \(2\)",
        ),
        (
            ([0], [2], [1], [2], [[]]),
            r"kv_start \+ kv_len \(3\) of segment 0 must be at most the number of rows \(2\)",
        ),
        (([-1], [1], [0], [1], [[]]), r"q_start \(-1\) and q_len \(1\) of segment 0 must not be negative"),
        (([0, 1], [2, 1], [0, 0], [1, 1], [[], []]), r"starts at 1 before another ends at 2"),
        (([0], [1], [0], [1], [[1]]), r"contexts \(1\) of segment 0 must be -1 or a segment below 1"),
    ],
)
def test_validate_names_the_fault(fields, message):
    with pytest.raises(ValueError, match=message):
        ContextLayout.from_lists(*fields).validate(2, 2)


def test_validate_returns_the_layout():
    layout = ContextLayout.packed([1, 2])
    assert layout.validate(3, 3) is layout
    assert ContextLayout.packed([]).validate(0, 0).num_segments == 0


def test_constructors_refuse_lists_of_different_length():
    with pytest.raises(ValueError, match=r"branch_lengths \(1\) must hold one list for each of context_lengths \(2\)"):
        ContextLayout.branches([1, 2], [[1]])
    with pytest.raises(ValueError, match="exactly one"):
        ContextLayout.packed()


def test_shapes_and_dtypes_are_checked_when_made():
    layout = ContextLayout.packed([3])
    with pytest.raises(ValueError, match=r"q_start must be int32, got torch.int64"):
        ContextLayout(*(tensor.long() for tensor in layout.tensors()))
    with pytest.raises(ValueError, match=r"kv_len must have shape \[S\] like q_start, got \[0\]"):
        ContextLayout(layout.q_start, layout.q_len, layout.kv_start, layout.kv_len[:0], layout.contexts)
    with pytest.raises(ValueError, match=r"contexts must have shape \[S, C\] with S = 1, got \[1\]"):
        ContextLayout(*layout.tensors()[:4], layout.q_start)
