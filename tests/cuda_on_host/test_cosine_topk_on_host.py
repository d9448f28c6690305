"""The CUDA kernels of cosine_topk, run on this CPU, against float64."""

import math

import on_host
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
KEY_TYPES = [*FLOATS, torch.int8, torch.float8_e4m3fn]
ROUNDING = 2.0**-22

pytestmark = pytest.mark.skipif(on_host.compiler() is None, reason="no g++ to build the kernels for this CPU")


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return on_host.build(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture(scope="module")
def run(program):
    def call(*arguments, **options):
        found = on_host.cosine_topk(program, *arguments, **options)
        assert found.bank_conflicts == 0
        return found

    return call


def make_keys(count, columns, dtype):
    keys = torch.randn(count, columns)
    if dtype == torch.int8:
        return (keys * 40).round().clamp(-127, 127).to(dtype), torch.rand(count) + 0.1
    if dtype == torch.float8_e4m3fn:
        return (keys * 8).to(dtype), torch.rand(count) + 0.1
    return keys.to(dtype), None


def cosines(queries, keys, scales=None, dtype=torch.float64):
    """Zero vectors score 0."""
    wide = keys.to(dtype) if scales is None else keys.to(dtype) * scales.to(dtype)[:, None]
    return torch.nn.functional.normalize(queries.to(dtype), eps=0).nan_to_num() @ (
        torch.nn.functional.normalize(wide, eps=0).nan_to_num().T
    )


def assert_right(found, queries, keys, k, scales=None, eager=True):
    """Scores within twice the error of float32 PyTorch, sorted, of distinct indices, nothing better left out."""
    exact = cosines(queries, keys, scales)
    error = (cosines(queries, keys, scales, torch.float32) - exact).abs().max().item() if eager else 0
    allowed = 2 * error + ROUNDING
    assert (found.scores.double() - exact.gather(1, found.indices)).abs().max() <= allowed
    assert (found.scores.double() - exact.topk(k).values).abs().max() <= allowed
    assert (found.scores[:, :-1] >= found.scores[:, 1:]).all()
    assert all(len(set(row)) == k for row in found.indices.tolist())


def assert_same(one, other):
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.scores.view(torch.int32), other.scores.view(torch.int32))


@pytest.mark.parametrize("key_dtype", KEY_TYPES)
@pytest.mark.parametrize("query_dtype", FLOATS)
@pytest.mark.parametrize(
    ("batch", "count", "columns", "k"),
    [(1, 1, 1, 1), (1, 300, 576, 10), (8, 129, 64, 3), (9, 130, 67, 20), (33, 200, 130, 7), (70, 128, 16, 128)],
)
def test_matches_float64(run, batch, count, columns, k, query_dtype, key_dtype):
    queries = torch.randn(batch, columns).to(query_dtype)
    keys, scales = make_keys(count, columns, key_dtype)
    found = run(queries, keys, k, scales)
    assert found.queries_per_tile == (8 if batch <= 8 else 32 if batch <= 32 else 64)
    assert_right(found, queries, keys, k, scales)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 200),
    st.integers(1, 50),
    st.sampled_from(FLOATS),
    st.sampled_from(KEY_TYPES),
    st.integers(1, 5),
    st.integers(0, 999),
)
def test_any_shape(program, batch, count, columns, k, query_dtype, key_dtype, multiprocessors, seed):
    torch.manual_seed(seed)
    k = min(k, count)
    queries = torch.randn(batch, columns).to(query_dtype)
    keys, scales = make_keys(count, columns, key_dtype)
    found = on_host.cosine_topk(
        program, queries, keys, k, scales, seed=seed, multiprocessors=multiprocessors, shared=on_host.A100_SHARED
    )
    assert_right(found, queries, keys, k, scales)


@pytest.mark.parametrize(
    ("dtype", "columns", "copy_bytes"),
    [
        (torch.bfloat16, 72, 16),
        (torch.bfloat16, 70, 4),
        (torch.bfloat16, 71, 1),
        (torch.float32, 36, 16),
        (torch.float32, 35, 4),
        (torch.int8, 80, 16),
        (torch.int8, 84, 4),
        (torch.int8, 83, 1),
    ],
)
def test_rows_of_any_alignment(run, dtype, columns, copy_bytes):
    queries = torch.randn(2, columns)
    keys, scales = make_keys(140, columns, dtype)
    found = run(queries, keys, 5, scales)
    assert found.copy_bytes == copy_bytes
    assert_right(found, queries, keys, 5, scales)


@pytest.mark.parametrize("dtype", KEY_TYPES)
@pytest.mark.parametrize("batch", [2, 35])
def test_long_rows_keep_float32_accuracy(run, batch, dtype):
    """Truncated sums of the tensor cores must not add up."""
    columns = 5000
    queries = torch.rand(batch, columns)
    keys, scales = make_keys(20, columns, dtype)
    keys = keys.float().abs().to(dtype)
    assert_right(run(queries, keys, 20, scales, multiprocessors=1), queries, keys, 20, scales)


@pytest.mark.parametrize("dtype", KEY_TYPES)
@pytest.mark.parametrize("batch", [1, 40])
def test_ties_go_to_the_lower_index_in_any_layout(run, batch, dtype):
    unique, scales = make_keys(11, 45, dtype)
    copies = 60
    keys = unique.repeat(copies, 1)
    repeated = None if scales is None else scales.repeat(copies)
    queries = torch.randn(batch, 45)
    layouts = [
        {"multiprocessors": 1},
        {"multiprocessors": 3, "seed": 1},
        {"multiprocessors": 1, "seed": 2, "shared": on_host.SMALLEST_SHARED},
    ]
    results = [run(queries, keys, 3 * copies, repeated, **layout) for layout in layouts]
    assert results[0].parts < results[1].parts
    for result in results[1:]:
        assert_same(result, results[0])
    order = cosines(queries, unique, scales).argsort(1, descending=True)[:, :3]
    for row in range(batch):
        runs = results[0].indices[row].view(3, copies)
        assert torch.equal(runs[:, 0], order[row])
        assert (runs.diff(dim=1) == 11).all()
        assert (results[0].scores[row].view(3, copies).diff(dim=1) == 0).all()


@pytest.mark.parametrize("shared", [on_host.H100_SHARED, on_host.SMALLEST_SHARED])
@pytest.mark.parametrize(
    ("batch", "count", "k", "fits"),
    [(1, 3000, 1024, True), (3, 1100, 1024, False), (34, 700, 600, False), (1, 2500, 33, True)],
)
def test_many_of_the_best(run, batch, count, k, fits, shared):
    """Rising scores: every key is better than all before it, so that the buffers fill up again and again."""
    direction = torch.randn(16)
    keys = torch.linspace(-1, 1, count)[:, None] * direction + torch.tensor([0.5, -0.5] * 8)
    queries = direction + 0.01 * torch.randn(batch, 16)
    found = run(queries, keys, k, multiprocessors=1, shared=shared)
    assert found.in_shared == fits
    assert_right(found, queries, keys, k)


def test_equal_scores_fill_the_buffer(run):
    found = run(torch.ones(2, 8), torch.ones(700, 8, dtype=torch.bfloat16), 40, multiprocessors=1)
    assert found.indices.tolist() == [list(range(40))] * 2


def test_results_do_not_depend_on_the_batch(run):
    queries, (keys, _) = torch.randn(40, 130), make_keys(200, 130, torch.bfloat16)
    whole = run(queries, keys, 6)
    for batch in (1, 20):
        part = run(queries[:batch], keys, 6)
        assert torch.equal(part.scores, whole.scores[:batch])
        assert torch.equal(part.indices, whole.indices[:batch])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("batch", [1, 33])
def test_orders_zero_and_bad_rows(run, batch, dtype):
    queries = torch.zeros(batch, 8)
    queries[:, 0] = 1
    keys = torch.zeros(6, 8)
    keys[1, 0] = -2.0
    keys[2, 3] = math.nan
    keys[4, 0] = 5.0
    keys[5] = math.inf
    found = run(queries, keys.to(dtype), 6)
    assert found.indices.tolist() == [[4, 0, 3, 1, 2, 5]] * batch
    assert found.scores[:, :4].tolist() == [[1.0, 0.0, 0.0, -1.0]] * batch
    assert found.scores[:, 4:].isnan().all()
    assert not torch.signbit(found.scores[:, 1:3]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_and_bad_queries(run, dtype):
    queries = torch.randn(5, 9)
    queries[1] = 0
    queries[2, 4] = math.nan
    queries[3, 4] = -math.inf
    keys = torch.randn(8, 9)
    keys[3, 0] = math.nan
    keys[5] = 0
    keys[6] = 1e-25
    found = run(queries.to(dtype), keys.to(dtype), 8)
    assert (found.scores[1] == 0).all()
    assert found.indices[1].tolist() == list(range(8))
    for row in (2, 3):  # a zero key scores 0 with any query
        assert found.indices[row].tolist() == [5, 0, 1, 2, 3, 4, 6, 7]
        assert found.scores[row, 1:].isnan().all()
    assert found.indices[0, -1] == 3


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_heeds_scales(run, dtype):
    keys = torch.ones(7, 20).to(dtype)
    scales = torch.tensor([math.nan, 0.0, 2.0, 1e-30, 0.0, -1.0, math.inf])
    found = run(torch.ones(3, 20), keys, 7, scales)
    assert found.indices.tolist() == [[2, 3, 1, 4, 5, 0, 6]] * 3
    torch.testing.assert_close(found.scores[0, :5], torch.tensor([1.0, 1.0, 0.0, 0.0, -1.0]))
    assert found.scores[0, 5:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 9, 40])
def test_survives_extreme_lengths(run, batch, dtype):
    queries = torch.randn(batch, 33) * torch.logspace(-37, 36, batch)[:, None]
    keys = (torch.randn(160, 33) * torch.logspace(-36, 37, 160)[:, None]).to(dtype)
    assert_right(run(queries, keys, 160), queries, keys, 160, eager=False)  # float32 overflows there


def test_reads_every_float8(run):
    keys = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 2).view(torch.float8_e4m3fn)
    keys = torch.cat((keys, torch.full((256, 1), 8.0).to(torch.float8_e4m3fn)), 1)
    queries = torch.tensor([[0.3, -1.0, 0.5]])
    found = run(queries, keys, 256, torch.ones(256))
    bad = keys.float().isnan().any(1)
    assert bad.sum() == 2
    assert torch.equal(found.scores.isnan()[0], bad[found.indices[0]])
    exact = cosines(queries, keys)[0, found.indices[0]]
    good = ~found.scores[0].isnan()
    torch.testing.assert_close(found.scores[0, good].double(), exact[good], rtol=0, atol=4e-7)


def test_reads_every_int8(run):
    keys = torch.stack((torch.arange(-128, 128), torch.full((256,), 100)), 1).to(torch.int8)
    queries = torch.tensor([[0.3, -1.0]])
    assert_right(run(queries, keys, 256, torch.ones(256)), queries, keys, 256)


def test_reads_every_bit_of_a_query(run):
    """A query's smallest elements decide: keys that see nothing else."""
    queries = torch.tensor([[1.0, 2.0**-12 + 2.0**-23, 0.0]])
    for dtype in KEY_TYPES:
        keys = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).to(dtype)
        scales = torch.ones(2) if dtype in KEY_TYPES[3:] else None
        found = run(queries, keys, 2, scales)
        exact = cosines(queries, keys)
        assert abs(found.scores[0, 0].double() / exact[0, 0] - 1) < 2.0**-21


def test_plans_fit_every_device(program):
    """Blocks fit into shared memory, all keys and queries are covered, and memory stays within reason."""
    devices = [(108, on_host.A100_SHARED), (132, on_host.H100_SHARED), (170, on_host.SMALLEST_SHARED)]
    problems = [
        (query_dtype, key_dtype, batch, count, 576, k, *device)
        for query_dtype in FLOATS
        for key_dtype in KEY_TYPES
        for batch in (1, 8, 9, 32, 33, 64, 200, 4096)
        for count in (1024, 1_000_000, 3_000_000_000)
        for k in (1, 10, 100, 1024)
        for device in devices
    ]
    plans = on_host.plans(program, problems)
    assert len(plans) == len(problems)
    for problem, plan in zip(problems, plans):
        _, _, batch, count, _, k, multiprocessors, shared = problem
        assert plan.shared_bytes + 1024 <= shared, problem
        assert plan.merge_shared_bytes <= 48 << 10
        assert plan.queries_per_tile * plan.query_tiles >= batch
        assert 1 <= plan.parts <= -(-count // 128)
        assert plan.workspace_bytes < (1 << 20) + 64 * batch * (576 + 16 * k) + 512 * multiprocessors * 64 * (k + 512)
        if count >= 1_000_000:  # every multiprocessor has work
            assert plan.parts * plan.query_tiles >= 0.75 * multiprocessors
