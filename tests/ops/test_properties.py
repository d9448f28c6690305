"""What no input may break: ties, duplicates, zeros, NaN and Inf, empty batches, k = N, views of every kind.

A few examples each by default; ``pytest --hypothesis-profile more`` draws a thousand.
"""

from itertools import pairwise

import pytest
import torch
from citizenship import strided
from hypothesis import given
from hypothesis import strategies as st
from ops_checks import DTYPES, values_and_grads, vast_zeros

from clara_fast import ops
from clara_fast.ops import ContextLayout, reference
from clara_fast.ops.reference import attention_mask

pytestmark = pytest.mark.usefixtures("backend")

SEEDS = st.integers(0, 2**16)
ROW_KINDS = st.sampled_from(["random", "random", "copy", "copy", "opposite", "zero", "nan", "inf", "large", "small"])
VIEWS = st.sampled_from(["contiguous", "strided", "sliced", "transposed"])


def as_view(tensor, kind):
    """The same values in memory of another shape."""
    if kind == "strided":
        return strided(tensor)
    if kind == "sliced":
        padded = torch.nn.functional.pad(tensor, (3, 2) * tensor.dim())
        return padded[tuple(slice(3, 3 + size) for size in tensor.shape)]
    if kind == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor


def hard_rows(kinds, size):
    """Random rows, and rows that are copies, opposites and multiples of earlier ones, or hold what is no number."""
    rows = torch.randn(len(kinds), size)
    for place, kind in enumerate(kinds):
        earlier = int(torch.randint(place, ())) if place else 0
        if kind in ("copy", "opposite"):
            rows[place] = rows[earlier] * (1 if kind == "copy" else -1)
        elif kind == "zero":
            rows[place] = 0
        elif kind in ("nan", "inf"):
            rows[place, int(torch.randint(size, ()))] = float(kind)
        elif kind in ("large", "small"):
            rows[place] *= 1e4 if kind == "large" else 1e-4
    return rows


def assert_untouched_and_again(function, inputs):
    """Runs twice with the same bits, and leaves the inputs as they were."""
    copies = [tensor.clone() for tensor in inputs]
    first, second = function(*inputs), function(*inputs)
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(bits(ours), bits(theirs))
    for tensor, copy in zip(inputs, copies, strict=True):
        assert torch.equal(bits(tensor), bits(copy))
    return first


def bits(tensor):
    """Comparable where NaN is not."""
    return tensor.nan_to_num(nan=12345.0) if tensor.is_floating_point() and tensor.element_size() > 1 else tensor


@given(
    st.lists(ROW_KINDS, max_size=70),
    st.integers(0, 9),
    st.sampled_from([1, 2, 5, 16, 33, 130]),
    st.sampled_from([*DTYPES, torch.float64, torch.int8]),
    st.sampled_from([None, 1, 10]),
    VIEWS,
    SEEDS,
)
def test_search(kinds, batch, size, dtype, k, view, seed):
    torch.manual_seed(seed)
    keys, queries, scales = hard_rows(kinds, size), torch.randn(batch, size), None
    if dtype == torch.int8:
        scales = keys.nan_to_num(1, 1, -1).abs().amax(1) / 127 if kinds else keys.new_zeros(0)
        keys = (keys.nan_to_num(1, 1, -1) / scales[:, None].clamp(min=1e-9)).round()
    keys = keys.to(dtype)
    queries = queries.to(dtype if dtype.is_floating_point else torch.float32)
    count = len(kinds)
    k = count if k is None else min(k, count)
    given_keys, given_queries = as_view(keys, view), as_view(queries, view)
    scores, indices = assert_untouched_and_again(
        lambda q, keys: ops.cosine_topk(q, keys, k, key_scales=scales), [given_queries, given_keys]
    )
    assert scores.shape == indices.shape == (batch, k)
    wide = keys.double() if scales is None else keys.double() * scales.double()[:, None]
    exact = reference.cosine(queries.double(), wide.expand(batch, -1, -1))
    # Integer products may round the queries to integers too.
    allowed = 0.03 if dtype == torch.int8 else (1e-12 if dtype == torch.float64 else 2e-6)
    for row in range(batch):
        order, numbers = indices[row].tolist(), scores[row][: int((~exact[row].isnan()).sum())]
        assert len(set(order)) == k
        # What is no number comes last, by index.
        nowhere = exact[row].isnan().nonzero().flatten().tolist()
        assert order[len(numbers) :] == nowhere[: max(k - len(numbers), 0)]
        assert scores[row][len(numbers) :].isnan().all()
        assert (numbers[:-1] >= numbers[1:]).all()
        assert torch.allclose(numbers.double(), exact[row][order[: len(numbers)]], rtol=0, atol=allowed)
        best = exact[row].nan_to_num(-3).sort(descending=True).values[: len(numbers)]
        assert torch.allclose(numbers.double(), best, rtol=0, atol=allowed)
        # Of equal keys the first comes first, and none is left out before a later one is taken.
        first_of = {}
        for index in range(count):
            first_of.setdefault(tuple(wide[index].tolist()), []).append(index)
        for copies in first_of.values():
            taken = [index for index in order if index in copies]
            assert taken == copies[: len(taken)]


@given(
    st.integers(0, 3),
    st.lists(ROW_KINDS, max_size=12),
    st.sampled_from([2, 5, 33]),
    st.integers(0, 14),
    st.sampled_from([*DTYPES, torch.float64]),
    st.booleans(),
    VIEWS,
    SEEDS,
)
def test_selection(batch, kinds, size, k, dtype, ragged, view, seed):
    torch.manual_seed(seed)
    count = len(kinds)
    query = torch.randn(batch, size).to(dtype)
    keys = torch.stack([hard_rows(kinds, size) for _ in range(batch)]) if batch else torch.zeros(0, count, size)
    keys, memory = keys.to(dtype), torch.randn(batch, count, 2, 3).to(dtype)
    valid = torch.rand(batch, count) > 0.3 if ragged else torch.ones(batch, count, dtype=torch.bool)
    inputs = [as_view(tensor, view) for tensor in (query, keys, memory)]
    selected, indices, scores = assert_untouched_and_again(
        lambda *x: ops.select_memory(*x, k, valid=valid if ragged else None), inputs
    )
    exact = reference.cosine(query.double(), keys.double()).masked_fill(~valid, 0)
    assert torch.allclose(scores.double(), exact, rtol=0, atol=2e-6, equal_nan=True)
    for row in range(batch):
        ours = scores[row].tolist()
        live = [place for place in range(count) if valid[row, place]]
        numbers = [place for place in live if ours[place] == ours[place]]
        expected = sorted(numbers, key=lambda place: -ours[place])
        expected += [place for place in live if ours[place] != ours[place]]
        expected = (expected + [-1] * k)[:k]
        assert indices[row].tolist() == expected
        for slot, place in enumerate(expected):
            assert torch.equal(selected[row, slot], torch.zeros(2, 3, dtype=dtype) if place < 0 else memory[row, place])
    if not {"nan", "inf"} & set(kinds):
        function = lambda *x: ops.select_memory(*x, k, temperature=0.5, valid=valid)  # noqa: E731
        assert all(tensor.isfinite().all() for tensor in values_and_grads(function, [query, keys, memory]))


@given(
    st.lists(st.integers(0, 9), max_size=5),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from([2, 7, 16, 65]),
    st.booleans(),
    st.sampled_from([*DTYPES, torch.float64]),
    VIEWS,
    SEEDS,
)
def test_pooling(documents, num_memory, around, size, norm, dtype, view, seed):
    """Rows outside do not matter, NaN and Inf stay in their segment, and each segment is as if alone."""
    torch.manual_seed(seed)
    offsets = [around]
    for length in documents:
        offsets.append(offsets[-1] + length + num_memory)
    rows = offsets[-1] + around
    hidden = torch.randn(rows, size).to(dtype)
    weight = torch.randn(size).to(dtype) if norm else None
    hidden[:around], hidden[offsets[-1] :] = torch.nan, torch.inf
    bad = int(torch.randint(len(documents), ())) if documents else None
    if bad is not None:
        hidden[offsets[bad], 0] = torch.nan
    bounds = torch.tensor(offsets, dtype=torch.int32)
    memory, mse = assert_untouched_and_again(
        lambda h: ops.pool_memory(h, bounds, num_memory, norm_weight=weight), [as_view(hidden, view)]
    )
    for segment, (start, end) in enumerate(pairwise(offsets)):
        alone = torch.tensor([0, end - start], dtype=torch.int32)
        one, one_mse = ops.pool_memory(hidden[start:end], alone, num_memory, norm_weight=weight)
        # The norm's sum of squares depends on where PyTorch's lanes begin.
        last_place = 4 * torch.finfo(dtype).eps if norm else 0
        torch.testing.assert_close(one[0], memory[segment], rtol=last_place, atol=0, equal_nan=True)
        torch.testing.assert_close(one_mse[0], mse[segment], equal_nan=True)
        assert segment == bad or mse[segment].isfinite()
    leaf = hidden.clone().requires_grad_()
    memory, mse = ops.pool_memory(leaf, bounds, num_memory, norm_weight=weight)
    (grad,) = torch.autograd.grad(memory.sum() + mse.sum(), leaf)
    for segment, (start, end) in enumerate(pairwise(offsets)):
        assert segment == bad or grad[start:end].isfinite().all()
    if not norm:
        assert not grad[:around].any()
        assert not grad[offsets[-1] :].any()


@given(
    st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(0, 4), max_size=3)), max_size=3),
    st.sampled_from([(1, 1), (4, 2)]),
    st.sampled_from([1, 8, 24]),
    st.sampled_from([*DTYPES, torch.float64]),
    VIEWS,
    SEEDS,
)
def test_attention(groups, heads, size, dtype, view, seed):
    """Keys that nobody reads may hold anything, and a group's rows depend on no other group."""
    torch.manual_seed(seed)
    layout = ContextLayout.branches([context for context, _ in groups], [branches for _, branches in groups])
    rows = int(layout.q_len.sum())
    unread = 3
    inputs = [torch.randn(rows, heads[0], size), *torch.randn(2, rows + unread, heads[1], size)]
    inputs = [tensor.to(dtype) for tensor in inputs]
    for tensor in inputs[1:]:
        tensor[rows:] = torch.nan
    (out,) = assert_untouched_and_again(
        lambda *x: (ops.compressed_context_attention(*x, layout),), [as_view(tensor, view) for tensor in inputs]
    )
    exact = reference.compressed_context_attention(*(tensor[:rows].double() for tensor in inputs), layout)
    assert attention_mask(layout, rows, rows + unread)[:, rows:].sum() == 0
    tolerance = 8 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
    assert torch.allclose(out.double(), exact, rtol=tolerance, atol=tolerance)
    if groups:
        # A NaN in the last group shows in no other.
        start = rows - sum((groups[-1][0], *groups[-1][1]))
        for tensor in inputs[1:]:
            tensor[start:] = torch.nan
        again = ops.compressed_context_attention(*inputs, layout)
        assert torch.equal(
            again[:start], ops.compressed_context_attention(*(t.clone() for t in inputs), layout)[:start]
        )
        assert again[:start].isfinite().all()
        assert torch.allclose(again[:start].double(), exact[:start], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch", [0, 3])
def test_empty_batches_have_gradients(batch):
    """B = 0 and N = 0 give empty outputs and gradients of the right shapes."""
    queries, keys = torch.randn(batch, 8, requires_grad=True), torch.randn(0, 8, requires_grad=True)
    scores, indices = ops.cosine_topk(queries, keys, 0)
    assert scores.shape == indices.shape == (batch, 0)
    grads = torch.autograd.grad(scores.sum(), (queries, keys))
    assert [grad.shape for grad in grads] == [queries.shape, keys.shape]
    candidates = torch.randn(batch, 0, 8, requires_grad=True)
    memory = torch.randn(batch, 0, 2, 4, requires_grad=True)
    selected, indices, scores = ops.select_memory(queries, candidates, memory, 2)
    assert selected.shape == (batch, 2, 2, 4)
    assert not selected.any()
    assert (indices == -1).all()
    grads = torch.autograd.grad(selected.sum() + scores.sum(), (queries, candidates, memory))
    assert [grad.shape for grad in grads] == [queries.shape, candidates.shape, memory.shape]


def test_expanded_inputs_and_gradients():
    """One row in the memory of many: read as many, and never written."""
    row = torch.randn(1, 1, 6, dtype=torch.float64)
    query, keys, memory = row[0].expand(3, 6), row.expand(3, 5, 6), row.view(1, 1, 2, 3).expand(3, 5, 2, 3)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, keys, memory)]
    expected = torch.autograd.grad(ops.select_memory(*leaves, 2)[0].sum(), leaves)
    given_leaves = [tensor.requires_grad_() for tensor in (query.detach(), keys.detach(), memory.detach())]
    actual = torch.autograd.grad(ops.select_memory(*given_leaves, 2)[0].sum(), given_leaves)
    torch.testing.assert_close(actual, expected)
    scores, indices = ops.cosine_topk(query, keys[0], 3)
    assert indices.tolist() == [[0, 1, 2]] * 3
    torch.testing.assert_close(scores, torch.ones_like(scores))


def test_search_past_int32(backend):
    if backend == "plain":
        pytest.skip("plain PyTorch widens every block: minutes")
    rows = 2**31 // 64 + 100
    keys = vast_zeros(rows, 64, dtype=torch.int8)
    keys[-1] = 1
    scores, indices = ops.cosine_topk(torch.ones(1, 64), keys, 2, key_scales=torch.ones(rows))
    assert indices.tolist() == [[rows - 1, 0]]
    assert scores[0].tolist() == pytest.approx([1, 0], abs=1e-2)


def test_selection_past_int32():
    count, size = 2**15 + 3, 65536
    memory = vast_zeros(1, count, 1, size, dtype=torch.float16)
    memory[0, -1] = torch.randn(size)
    keys = torch.zeros(1, count, 4, dtype=torch.float16)
    keys[0, -1] = 1
    selected, indices, _ = ops.select_memory(torch.ones(1, 4, dtype=torch.float16), keys, memory, 1)
    assert indices.tolist() == [[count - 1]]
    assert torch.equal(selected[0, 0], memory[0, -1])
