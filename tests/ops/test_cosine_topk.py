import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_checks import DTYPES, assert_same, assert_within_budget, error

from clara_fast import ops
from clara_fast.ops import _library, reference
from clara_fast.ops.cosine_topk import _forward_plain

pytestmark = pytest.mark.usefixtures("backend")


def pair(k):
    return lambda q, keys: ops.cosine_topk(q, keys, k), lambda q, keys: reference.cosine_topk(q, keys, k)


def assert_valid_topk(queries, keys, scores, indices, k, key_scales=None):
    """Scores belong to their indices, no index twice, and nothing left out that is better beyond rounding."""
    wide = keys.double()
    if key_scales is not None:
        groups = key_scales.double().reshape(len(keys), -1, 1)
        wide = (wide.reshape(*groups.shape[:2], -1) * groups).reshape(keys.shape)
    exact = reference.cosine(queries.double(), wide.expand(len(queries), *keys.shape))
    rounding = 1e-6 if scores.dtype == torch.float32 else 1e-12
    assert scores.shape == indices.shape == (len(queries), k)
    assert indices.dtype == torch.int64
    assert all(len(set(row)) == k for row in indices.tolist())
    assert error(scores, exact.gather(1, indices)) <= rounding
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    best = exact.sort(1, descending=True).values[:, :k]
    assert error(scores, best) <= rounding


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 5),
    st.integers(0, 40),
    st.sampled_from([1, 3, 16, 67, 130]),
    st.integers(0, 12),
    st.sampled_from([*DTYPES, torch.float64]),
    st.integers(0, 999),
)
def test_any_shape(batch, count, size, k, dtype, seed):
    torch.manual_seed(seed)
    k = min(k, count)
    queries, keys = torch.randn(batch, size).to(dtype), torch.randn(count, size).to(dtype)
    scores, indices = ops.cosine_topk(queries, keys, k)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_valid_topk(queries, keys, scores, indices, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_budget(dtype):
    """The eager reference works on float32 copies, since the operator's scores are float32."""
    queries, keys = torch.randn(3, 20).to(dtype), torch.randn(30, 20).to(dtype)
    operator, reference_ = pair(7)

    def eager(*inputs):
        return reference_(*(x if x.dtype == torch.float64 else x.float() for x in inputs))

    assert_within_budget(operator, eager, [queries, keys])


@pytest.mark.parametrize("key_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("query_dtype", [*DTYPES, torch.float64])
def test_queries_and_keys_of_different_dtypes(query_dtype, key_dtype, monkeypatch):
    queries, keys = torch.randn(3, 67).to(query_dtype), torch.randn(40, 67).to(key_dtype)
    if torch.float64 not in (query_dtype, key_dtype) and "cosine_topk" in _library.native:
        # A float32 model over a bfloat16 store is the usual case: it must not fall back.
        monkeypatch.setitem(ops.cosine_topk.__globals__, "_forward_plain", None)
    assert_valid_topk(queries, keys, *ops.cosine_topk(queries, keys, 5), 5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_quantised_keys(dtype, query_dtype):
    values = torch.randn(50, 33)
    scales = values.abs().amax(1) / (127 if dtype == torch.int8 else 448)
    keys = (values / scales[:, None]).round().to(dtype) if dtype == torch.int8 else (values / scales[:, None]).to(dtype)
    queries = torch.randn(4, 33, dtype=query_dtype, requires_grad=True)
    scores, indices = ops.cosine_topk(queries, keys, 6, key_scales=scales)
    assert_valid_topk(queries.detach(), keys, scores.detach(), indices, 6, scales)
    wide = (keys.double() * scales[:, None].double())[indices]
    exact_queries = queries.detach().double().requires_grad_()
    exact = torch.nn.functional.cosine_similarity(exact_queries[:, None], wide, dim=2)
    (ours,) = torch.autograd.grad(scores.square().sum(), queries)
    (theirs,) = torch.autograd.grad(exact.square().sum(), exact_queries)
    assert error(ours, theirs) <= 4 * torch.finfo(query_dtype).eps * max(theirs.abs().max(), 1e-3) + 1e-6


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("query_dtype", DTYPES)
@pytest.mark.parametrize(("groups", "width"), [(3, 64), (2, 3136), (5, 7), (1, 130)])
def test_a_scale_for_each_group_of_columns(dtype, query_dtype, groups, width, monkeypatch):
    """As a store has one for each memory token; in sizes from next to nothing to far beyond float32 squares."""
    values = torch.randint(-120, 120, (70, groups * width)).float().to(dtype)
    values[3] = 0
    scales = torch.exp(torch.randn(70, groups) * 3) * torch.randn(70, groups).sign()
    scales[5:8] *= torch.tensor([[1e-30], [1e30], [0]])
    scales[9, 0] = 0
    values[10, :width], scales[10, 0] = 0, 1e25  # the largest scale is of columns that are all zero
    queries = torch.randn(11, groups * width).to(query_dtype)
    if "cosine_topk" in _library.native and width != 7:
        monkeypatch.setitem(ops.cosine_topk.__globals__, "_forward_plain", None)
    for part in (queries[:1], queries):
        found = ops.cosine_topk(part, values, 70, key_scales=scales)
        assert_valid_topk(part, values, *found, 70, scales)
    scales[20, -1] = torch.nan
    assert (ops.cosine_topk(queries, values, 70, key_scales=scales)[1][:, -1] == 20).all()


def test_gradient_with_a_scale_for_each_group():
    queries = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    keys, scales = torch.randint(-9, 9, (6, 12), dtype=torch.int8), torch.rand(6, 4) + 0.5
    assert torch.autograd.gradcheck(lambda q: ops.cosine_topk(q, keys, 4, key_scales=scales)[0], [queries])


def test_gradcheck():
    queries = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: ops.cosine_topk(q, k, 4)[0], [queries, keys])
    assert torch.autograd.gradcheck(lambda k: ops.cosine_topk(queries.detach(), k, 6)[0], [keys])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ties_go_to_the_lower_index(dtype):
    row = torch.randn(1, 8)
    keys = torch.cat([-row, row, row, row.neg(), row, torch.zeros(2, 8)]).to(dtype)
    scores, indices = ops.cosine_topk(torch.cat([row, -row]).to(dtype), keys, 7)
    assert indices.tolist() == [[1, 2, 4, 5, 6, 0, 3], [0, 3, 5, 6, 1, 2, 4]]
    torch.testing.assert_close(scores[0], torch.tensor([1, 1, 1, 0, 0, -1, -1]).to(scores.dtype), atol=1e-6, rtol=0)
    torch.testing.assert_close(scores[0, :3], scores[0, :1].expand(3), atol=0, rtol=0)


def test_many_duplicates():
    keys = torch.randn(1, 16).repeat(3000, 1)
    _, indices = ops.cosine_topk(torch.randn(5, 16), keys, 9)
    assert indices.tolist() == [list(range(9))] * 5


def test_zero_vectors_score_zero():
    keys = torch.cat([torch.zeros(1, 4), torch.randn(2, 4)])
    queries = torch.zeros(2, 4, requires_grad=True)
    scores, indices = ops.cosine_topk(queries, keys, 3)
    assert scores.tolist() == [[0, 0, 0]] * 2
    assert indices.tolist() == [[0, 1, 2]] * 2
    assert torch.autograd.grad(scores.sum(), queries)[0].tolist() == [[0] * 4] * 2
    keys.requires_grad_()
    scores, _ = ops.cosine_topk(torch.ones(1, 4), keys, 3)
    assert torch.autograd.grad(scores.sum(), keys)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_rows_never_beat_a_finite_one(dtype, bad):
    keys = torch.randn(40, 8).to(dtype)
    keys[[0, 3, 39], 2] = bad
    queries = torch.randn(3, 8).to(dtype)
    scores, indices = ops.cosine_topk(queries, keys, 37)
    assert scores.isfinite().all()
    assert not {0, 3, 39} & set(indices.flatten().tolist())
    scores, indices = ops.cosine_topk(queries, keys, 40)
    assert indices[:, 37:].tolist() == [[0, 3, 39]] * 3
    assert scores[:, 37:].isnan().all()


def test_blocks_of_keys_agree_with_one(monkeypatch):
    queries, keys = torch.randn(4, 8), torch.randn(101, 8)
    keys[50:] = keys[:51].clone()
    whole = _forward_plain(queries, keys, 7, None)
    monkeypatch.setitem(_forward_plain.__globals__, "_BLOCK_NUMBERS", 80)
    blocks = _forward_plain(queries, keys, 7, None)
    assert torch.equal(whole[1], blocks[1])
    torch.testing.assert_close(whole[0], blocks[0])


def test_non_contiguous_inputs():
    queries, keys = torch.randn(6, 3), torch.randn(9, 12)
    assert_same(
        lambda q, k: ops.cosine_topk(q.t(), k[:, ::2].contiguous()[::1][:, :6], 4),
        lambda q, k: ops.cosine_topk(q.t().contiguous(), k[:, ::2].contiguous(), 4),
        [queries, keys],
        tolerance=1e-6,
    )
    expanded = ops.cosine_topk(queries.t()[:1].expand(3, -1), keys[:, ::2], 4)
    torch.testing.assert_close(expanded[0][0], expanded[0][2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 7}, r"k \(7\) must be at most the number of keys \(5\)"),
        ({"k": -1}, r"k \(-1\) must not be negative"),
        ({"queries": torch.zeros(2, 4, dtype=torch.int8)}, r"queries must be floating point \[B, R\]"),
        ({"keys": torch.zeros(5, 3)}, r"keys must have shape \[N, R\] with R = 4, got \[5, 3\]"),
        (
            {"keys": torch.zeros(5, 4, dtype=torch.int8)},
            r"key_scales must be floating point \[N\] = \[5\] for torch.int8 keys",
        ),
        (
            {"keys": torch.zeros(5, 4, dtype=torch.int16)},
            "keys must be floating point, int8 or float8_e4m3fn",
        ),
        ({"key_scales": torch.ones(5)}, "key_scales must be None for torch.float32 keys"),
    ],
)
def test_errors(change, message):
    arguments = {"queries": torch.zeros(2, 4), "keys": torch.zeros(5, 4), "k": 3} | change
    with pytest.raises(ValueError, match=message):
        ops.cosine_topk(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("batch", [1, 3, 8, 70])
def test_wide_keys(dtype, batch):
    values = torch.randn(1000, 576)
    values[500:] = values[:500]
    keys = values.to(dtype) if dtype.is_floating_point else (values * 30).round().clamp(-127, 127).to(dtype)
    scales = None if dtype.is_floating_point else (torch.rand(500) + 0.5).repeat(2)
    queries = torch.randn(batch, 576).to(dtype if dtype.is_floating_point else torch.float32)
    scores, indices = ops.cosine_topk(queries, keys, 12, key_scales=scales)
    assert_valid_topk(queries, keys, scores, indices, 12, scales)
    # Each key below 500 has a copy at index + 500: the pair stays together, the original first.
    assert (indices[:, 0::2] < 500).all()
    assert torch.equal(indices[:, 0::2] + 500, indices[:, 1::2])
