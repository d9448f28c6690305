import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_checks import DTYPES, assert_same, assert_within_budget, values_and_grads

from clara_fast import ops
from clara_fast.ops import reference

pytestmark = pytest.mark.usefixtures("backend")

LEAK = math.log(1e-8)


def make_inputs(batch=3, count=7, size=6, memory=(2, 4), dtype=torch.float64):
    return [
        torch.randn(batch, size, dtype=dtype),
        torch.randn(batch, count, size, dtype=dtype),
        torch.randn(batch, count, *memory, dtype=dtype),
    ]


def pair(k, **options):
    return tuple(lambda *inputs, f=f: f(*inputs, k, **options) for f in (ops.select_memory, reference.select_memory))


VALID = {
    "all": None,
    "ragged": [[1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0, 0]],
    "none in a row": [[0] * 7, [1] * 7, [0, 1, 1, 0, 0, 0, 0]],
}


@pytest.mark.parametrize("temperature", [0.02, 1.0])
@pytest.mark.parametrize("taken_logit", [-math.inf, LEAK])
@pytest.mark.parametrize("valid", VALID)
@pytest.mark.parametrize("k", [0, 1, 3, 7, 9])
def test_matches_the_reference(k, valid, taken_logit, temperature):
    mask = None if VALID[valid] is None else torch.tensor(VALID[valid], dtype=torch.bool)
    functions = pair(k, valid=mask, taken_logit=taken_logit, temperature=temperature)
    inputs = make_inputs()
    assert_same(*functions, inputs)
    ours, theirs = (function(*inputs)[1] for function in functions)
    assert torch.equal(ours, theirs)


def separated(batch, count, dtype):
    """Queries and keys whose cosines are far enough apart for every dtype to rank them alike."""
    angles = torch.stack([torch.randperm(count) for _ in range(batch)]) * (2.8 / count) + 0.1
    keys = torch.stack((angles.cos(), angles.sin()), -1)
    rotation = torch.linalg.qr(torch.randn(8, 2)).Q.t()
    lengths = torch.rand(batch, count, 1) + 0.5
    return (torch.eye(2)[0].expand(batch, 2) @ rotation).to(dtype), (keys @ rotation * lengths).to(dtype)


@pytest.mark.parametrize("taken_logit", [-math.inf, LEAK])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_budget(dtype, taken_logit):
    """The reference stands in float32 for the cosines of low precision, as the operator's are float32."""
    query, keys = separated(3, 9, dtype)
    memory = torch.randn(3, 9, 2, 4).to(dtype)
    operator, reference_ = pair(4, temperature=0.3, taken_logit=taken_logit)

    def eager(*inputs):
        wide = [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in inputs]
        selected, indices, scores = reference_(*wide)
        return selected.to(inputs[0].dtype), indices, scores

    assert_within_budget(operator, eager, [query, keys, memory])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(0, 9),
    st.sampled_from([2, 5, 33]),  # in one dimension every cosine is 1 or -1 but for rounding, which would rank them
    st.integers(0, 6),
    st.sampled_from([(1, 1), (3, 5)]),
    st.booleans(),
    st.integers(0, 999),
)
def test_any_shape(batch, count, size, k, memory, ragged, seed):
    torch.manual_seed(seed)
    valid = torch.rand(batch, count) > 0.4 if ragged else None
    functions = pair(k, temperature=0.5, valid=valid)
    assert_same(*functions, make_inputs(batch, count, size, memory), tolerance=1e-8)
    single = [tensor.float() for tensor in make_inputs(batch, count, size, memory)]
    selected, indices, scores = functions[0](*single)
    assert selected.shape == (batch, k, *memory)
    for row in range(batch):
        live = count if valid is None else int(valid[row].sum())
        assert (indices[row] >= 0).sum() == min(k, live)
        assert len(set(indices[row, :live].tolist())) == min(k, live)
        for slot in range(k):
            index = indices[row, slot].item()
            expected = torch.zeros(memory) if slot >= live else single[2][row, index]
            assert torch.equal(selected[row, slot], expected)
    assert scores.shape == (batch, count)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("valid", VALID)
def test_gradcheck_of_scores(valid):
    mask = None if VALID[valid] is None else torch.tensor(VALID[valid], dtype=torch.bool)
    inputs = [tensor.requires_grad_() for tensor in make_inputs()[:2]]
    memory = make_inputs()[2]
    assert torch.autograd.gradcheck(lambda q, keys: ops.select_memory(q, keys, memory, 2, valid=mask)[2], inputs)


def test_gradcheck_of_memory():
    query, keys, memory = make_inputs()
    memory.requires_grad_()
    assert torch.autograd.gradcheck(lambda m: ops.select_memory(query, keys, m, 3)[0], [memory])


def test_leak_of_the_reference_implementation():
    """Past a cosine gap of 0.368 the second slot of the leaking softmax goes back to the first document."""
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    keys = torch.tensor([[[1.0, 0.0], [0.55, 0.835], [0.5, 0.866]]], dtype=torch.float64)
    memory = torch.eye(3, dtype=torch.float64).view(1, 3, 1, 3)
    soft = {}
    for taken_logit in (LEAK, -math.inf):
        captured = []
        for document in range(3):
            selected, indices, _ = ops.select_memory(query, keys.requires_grad_(), memory, 2, taken_logit=taken_logit)
            (grad,) = torch.autograd.grad(selected[0, 1, 0, document], keys)
            captured.append(grad.abs().sum().item())
        assert indices.tolist() == [[0, 1]]
        soft[taken_logit] = captured
    # Under exact masking the taken document gets no gradient from slot 2; under the leak it does.
    assert soft[-math.inf][0] == 0
    assert soft[LEAK][0] > 0


def test_keys_and_memory_share_storage():
    base = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    query = torch.randn(2, 12, dtype=torch.float64)
    assert_same(
        lambda q, m: ops.select_memory(q, m.flatten(2), m, 2, temperature=0.5),
        lambda q, m: reference.select_memory(q, m.flatten(2), m, 2, temperature=0.5),
        [query, base],
    )


def test_ties_and_duplicates():
    row = torch.randn(1, 1, 4)
    keys = torch.cat([-row, row, row, torch.zeros(1, 1, 4), row], 1)
    for dtype in (torch.float32, torch.float64):
        _, indices, scores = ops.select_memory(
            row[:, 0].to(dtype), keys.to(dtype), torch.randn(1, 5, 1, 2).to(dtype), 5
        )
        assert indices.tolist() == [[1, 2, 4, 3, 0]]
        assert scores[0, 3] == 0


def test_zero_query_has_finite_gradients():
    inputs = make_inputs()
    inputs[0].zero_()
    inputs[1][0, 0] = 0
    assert all(tensor.isfinite().all() for tensor in values_and_grads(pair(3)[0], inputs))
    assert_same(*pair(3), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_candidates_come_last_and_before_invalid_ones(dtype):
    query, keys, memory = make_inputs(1, 5, dtype=dtype)
    keys[0, 0, 0] = torch.nan
    _, indices, scores = ops.select_memory(query, keys, memory, 5)
    assert indices[0, 4] == 0
    assert scores.isnan().tolist() == [[True, False, False, False, False]]
    valid = torch.tensor([[True, True, False, True, True]])
    _, indices, _ = ops.select_memory(query, keys, memory, 5, valid=valid)
    assert indices[0, 3:].tolist() == [0, -1]
    valid[0, 0] = False
    selected, indices, scores = ops.select_memory(query, keys, memory, 4, valid=valid)
    assert selected.isfinite().all()
    assert scores.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_invalid_does_not_matter(dtype):
    valid = torch.tensor(VALID["ragged"], dtype=torch.bool)
    clean = make_inputs(dtype=dtype)
    dirty = [tensor.clone() for tensor in clean]
    dirty[1][~valid] = torch.nan
    dirty[2][~valid] = torch.inf
    function = pair(3, valid=valid)[0]
    for ours, theirs in zip(values_and_grads(function, dirty), values_and_grads(function, clean), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wanted", range(3))
def test_partial_requires_grad(wanted):
    inputs = make_inputs()
    function = pair(3, temperature=0.4)[0]
    full = values_and_grads(function, inputs)[2 + wanted]
    inputs[wanted].requires_grad_()
    outputs = [out for out in function(*inputs) if out.is_floating_point() and out.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randint(-8, 9, out.shape, generator=generator).to(out.dtype) / 8 for out in outputs]
    torch.testing.assert_close(torch.autograd.grad(outputs, inputs[wanted], upstream)[0], full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_non_contiguous_inputs(dtype):
    query, keys, memory = make_inputs(dtype=dtype)
    function = pair(3)[0]
    assert_same(
        lambda q, keys, m: function(
            q.t().contiguous().t(), keys.transpose(0, 1).contiguous().transpose(0, 1), m.mT.contiguous().mT
        ),
        function,
        [query, keys, memory],
        tolerance=1e-5 if dtype == torch.float32 else 1e-9,
    )
    shared = ops.select_memory(query, keys[:1].expand(3, -1, -1), memory[:1].expand(3, -1, -1, -1), 3)
    alone = ops.select_memory(query[2:], keys[:1], memory[:1], 3)
    torch.testing.assert_close(shared[0][2:], alone[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 4, 1)}, r"query must be floating point \[B, R\]"),
        (
            {"keys": torch.zeros(2, 5, 3)},
            r"keys must have shape \[B, N, R\] with B = 2 and R = 4, got \[2, 5, 3\]",
        ),
        (
            {"memory": torch.zeros(2, 4, 1, 4)},
            r"memory must have shape \[B, N, m, D\] with \[B, N\] = \[2, 5\]",
        ),
        (
            {"memory": torch.zeros(2, 5, 1, 4).half()},
            r"keys and memory must have the dtype of query \(torch.float32\), got torch.float32, torch.float16",
        ),
        ({"valid": torch.ones(2, 5)}, r"valid must be bool \[B, N\] = \[2, 5\], got torch.float32 \[2, 5\]"),
        ({"k": -1}, r"k \(-1\) must not be negative"),
        ({"temperature": 0.0}, r"temperature \(0.0\) must be positive"),
        ({"taken_logit": 1.0}, r"taken_logit \(1.0\) must not be positive"),
    ],
)
def test_errors(change, message):
    arguments = {
        "query": torch.zeros(2, 4),
        "keys": torch.zeros(2, 5, 4),
        "memory": torch.zeros(2, 5, 1, 4),
        "k": 2,
    } | change
    with pytest.raises(ValueError, match=message):
        ops.select_memory(**arguments)
