"""The compiled parts: the host module, and each CPU kernel against float64."""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clara_fast.ops import _library, reference

_native = pytest.importorskip("clara_fast._native", reason="the host module is not built")
kernels = torch.ops.clara_fast_native
needs_kernels = pytest.mark.skipif(not _library.native, reason="the CPU kernels are not built")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
KEY_TYPES = [*FLOATS, torch.int8, torch.float8_e4m3fn]
ROUNDING = 2.0**-22


def assert_error_within(actual, eager, exact, factor=2.0, rounding=ROUNDING):
    """error(actual) <= factor * error(eager) + rounding of the largest value, against the float64 answer."""
    exact = exact.double()
    assert torch.isfinite(actual).all()
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    budget = factor * (eager.double() - exact).abs().max().item()
    allowed = budget + rounding * max(1e-3, exact.abs().max().item())
    assert error <= allowed, f"error {error:.3e} exceeds {allowed:.3e}"


# The host module


def test_build_info_names_the_build():
    info = _native.build_info()
    assert info["version"].startswith("0.")
    assert info["compiler"]
    assert info["torch_target"] == "2.10"
    assert info["cpu"] == bool(_library.native)
    assert info["cuda"] in (True, False)
    assert isinstance(info["cuda_architectures"], list)


def test_cpu_features_are_bools():
    features = _native.cpu_features()
    names = {"avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "avx512vbmi", "amx_bf16", "amx_int8"}
    assert features.keys() == names
    assert all(isinstance(value, bool) for value in features.values())
    if sys.platform == "linux" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            flags = set(file.read().split())
        for name in names:
            assert features[name] == (name in flags)


@given(st.lists(st.integers(0, 400), max_size=200), st.integers(1, 300))
@settings(deadline=None)
def test_pack_sequences_fills_batches_longest_first(lengths, max_tokens):
    array = np.array(lengths, dtype=np.int64)
    batches = _native.pack_sequences(array, max_tokens)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    for batch in batches:
        assert batch
        total = sum(lengths[index] for index in batch)
        assert total <= max_tokens or len(batch) == 1
    for batch, following in itertools.pairwise(batches):
        assert sum(lengths[index] for index in batch) + lengths[following[0]] > max_tokens
    assert _native.pack_sequences(array, max_tokens) == batches


def test_pack_sequences_keeps_the_order_of_equal_lengths():
    assert _native.pack_sequences(np.full(5, 3, dtype=np.int64), 6) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "message"),
    [
        (np.zeros((2, 2), dtype=np.int64), 3, "lengths must have 1 dimension, not 2"),
        (np.array([1]), 0, "max_tokens (0) must be at least 1"),
        (np.array([4, -1]), 4, "lengths[1] (-1) must be at least 0"),
    ],
)
def test_pack_sequences_names_the_bad_argument(lengths, max_tokens, message):
    with pytest.raises(ValueError) as error:
        _native.pack_sequences(lengths, max_tokens)
    assert str(error.value) == message


# The CPU kernels


@needs_kernels
def test_every_schema_has_a_cpu_kernel():
    for_gpus = {"cosine_topk_out", "cosine_topk_workspace", "cuda_has_image"}
    assert _library.native.keys() == _library.NATIVE_SCHEMAS.keys() - for_gpus


def packed(lengths, columns, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    hidden = torch.randn(int(offsets[-1]), columns, generator=generator).to(dtype)
    weight = (1 + 0.3 * torch.randn(columns, generator=generator)).to(dtype)
    return hidden, offsets, weight


POOL_SHAPES = [
    ([5], 4, 3),
    ([17, 3, 40, 3], 33, 3),
    ([260, 100], 576, 16),
    ([9] * 70, 8, 1),
    ([300], 1029, 2),
]


@needs_kernels
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("lengths", "columns", "num_memory"), POOL_SHAPES)
def test_pool_memory_matches_float64(lengths, columns, num_memory, dtype, normed):
    hidden, offsets, weight = packed(lengths, columns, dtype)
    weight = weight if normed else None
    grad_memory = torch.randn(len(lengths), num_memory, columns).to(dtype)
    grad_mse = torch.randn(len(lengths))

    def run(wide):
        x = hidden.to(wide, copy=True).requires_grad_()
        w = weight.to(wide, copy=True).requires_grad_() if normed else None
        memory, mse = reference.pool_memory(x, offsets, num_memory, norm_weight=w, norm_eps=1e-5)
        upstream = [grad_memory.to(wide), grad_mse.to(mse.dtype)]
        grads = torch.autograd.grad([memory, mse], [x, w] if normed else [x], upstream)
        return [memory.detach(), mse.detach(), *grads]

    exact, eager = run(torch.float64), run(dtype)
    memory, mse, difference = kernels.pool_memory_forward(hidden, offsets, num_memory, weight, 1e-5)
    grad_hidden, grad_weight = kernels.pool_memory_backward(
        grad_memory, grad_mse, difference, hidden, offsets, num_memory, weight, 1e-5
    )
    assert (memory.dtype, mse.dtype, grad_hidden.dtype, grad_weight.dtype) == (
        dtype,
        torch.float32,
        dtype,
        torch.float32,
    )
    for actual, low, right in zip([memory, mse, grad_hidden, grad_weight], eager, exact):
        # Normed rows are rounded to the dtype before they are averaged.
        assert_error_within(actual, low, right, rounding=max(ROUNDING, torch.finfo(dtype).eps))
    if not normed:
        assert grad_weight.shape == (0,)
        assert torch.equal(memory.flatten(0, 1)[-num_memory:], hidden[-num_memory:])


@needs_kernels
def test_pool_memory_covers_rows_outside_the_segments():
    hidden = torch.randn(10, 6)
    offsets = torch.tensor([2, 7], dtype=torch.int32)
    memory, _, difference = kernels.pool_memory_forward(hidden, offsets, 2, None, 1e-6)
    assert torch.equal(memory[0], hidden[5:7])
    grad, _ = kernels.pool_memory_backward(memory, torch.ones(1), difference, hidden, offsets, 2, None, 1e-6)
    assert (grad[:2] == 0).all()
    assert (grad[7:] == 0).all()


@needs_kernels
def test_pool_memory_names_a_short_segment():
    offsets = torch.tensor([0, 5, 7], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"segment 1 has 2 rows, and must have at least num_memory \(3\)"):
        kernels.pool_memory_forward(torch.randn(7, 4), offsets, 3, None, 1e-6)


def exact_cosine(queries, keys, scales=None):
    q, k = queries.double(), keys.double()
    if scales is not None:
        k = k * scales.double().unsqueeze(1)
    return reference.cosine(q, k.expand(q.shape[0], *k.shape))


def random_keys(count, columns, dtype, seed=1):
    keys = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))
    if dtype == torch.int8:
        return (keys * 40).round().clamp(-127, 127).to(dtype), torch.rand(count) + 0.1
    if dtype == torch.float8_e4m3fn:
        return (keys * 8).to(dtype), torch.rand(count) + 0.1
    return keys.to(dtype), None


@needs_kernels
@pytest.mark.parametrize("dtype", KEY_TYPES)
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 300])
@pytest.mark.parametrize(("count", "columns", "k"), [(1, 1, 1), (37, 19, 5), (130, 576, 10), (70, 2101, 70)])
def test_cosine_topk_matches_float64(batch, count, columns, k, dtype):
    queries = torch.randn(batch, columns, generator=torch.Generator().manual_seed(2))
    keys, scales = random_keys(count, columns, dtype)
    scores, indices = kernels.cosine_topk(queries, keys, k, scales)
    exact = exact_cosine(queries, keys, scales)
    eager = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(keys.float()).T
    assert (scores.dtype, indices.dtype) == (torch.float32, torch.int64)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert all(len(set(row)) == k for row in indices.tolist())
    assert_error_within(scores, eager.gather(1, indices), exact.gather(1, indices))
    assert_error_within(scores, eager.topk(k).values, exact.topk(k).values)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
def test_cosine_topk_takes_queries_in_low_precision(dtype):
    queries = torch.randn(5, 40).to(dtype)
    keys, _ = random_keys(50, 40, torch.bfloat16)
    scores, indices = kernels.cosine_topk(queries, keys, 4, None)
    again = kernels.cosine_topk(queries.float(), keys, 4, None)
    assert torch.equal(scores, again[0])
    assert torch.equal(indices, again[1])


READ_TO_THE_END = """
import ctypes, itertools, mmap
import numpy as np
import torch
from clara_fast import ops
from clara_fast.ops.few_rows_linear import few_rows_linear

PAGES = 64
area = mmap.mmap(-1, (PAGES + 1) * mmap.PAGESIZE)
behind = ctypes.addressof(ctypes.c_char.from_buffer(area)) + PAGES * mmap.PAGESIZE
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), mmap.PAGESIZE, 0) == 0
allowed = np.frombuffer(area, np.uint8, PAGES * mmap.PAGESIZE)

def at_the_end(tensor):
    placed = torch.from_numpy(allowed[-tensor.nbytes:]).view(tensor.dtype).view(tensor.shape)
    return placed.copy_(tensor)

torch.set_grad_enabled(False)
torch.set_num_threads(2)
dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
for dtype, count, columns in itertools.product(dtypes, (1, 2, 3, 5, 47, 49, 70, 131), (1, 7, 64, 100, 320)):
    keys = at_the_end((torch.randn(count, columns) * 9).to(dtype))
    scales = torch.ones(count) if dtype.itemsize == 1 else None
    for batch in (1, 3, 8, 9):
        ops.cosine_topk(torch.randn(batch, columns), keys, 1, key_scales=scales)
    if dtype.itemsize > 1:
        few_rows_linear(torch.randn(2, columns).to(dtype), keys, None, None, None, 1.0)
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called by its name on Linux")
def test_nothing_behind_the_keys_is_read():
    """Where a store's file ends at a page's end, what lies behind it ends the process."""
    subprocess.run([sys.executable, "-c", READ_TO_THE_END], check=True, timeout=120)


@pytest.mark.parametrize("batch", [1, 9], ids=["streams", "tiles"])
@pytest.mark.parametrize("k", [7, 1024, 1025, 5003])
@needs_kernels
def test_cosine_topk_finds_the_lowest_of_equal_keys_wherever_threads_and_streams_meet(batch, k):
    # Long enough that threads take several pieces each, which they do up to a k of 1024.
    keys = torch.ones(5003, 1, dtype=torch.bfloat16).expand(-1, 96).contiguous()
    queries = torch.ones(batch, 96, dtype=torch.bfloat16)
    for _ in range(3):
        scores, indices = kernels.cosine_topk(queries, keys, k, None)
        assert torch.equal(indices, torch.arange(k).expand(batch, -1))
        assert torch.equal(scores, scores[:1, :1].expand(batch, k))


@needs_kernels
@pytest.mark.parametrize("dtype", KEY_TYPES)
@pytest.mark.parametrize("batch", [1, 6])
def test_cosine_topk_breaks_ties_by_index_for_any_split(batch, dtype):
    unique, scales = random_keys(11, 45, dtype)
    copies = 40
    keys = unique.repeat(copies, 1)
    scales = None if scales is None else scales.repeat(copies)
    queries = torch.randn(batch, 45)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(kernels.cosine_topk(queries, keys, 3 * copies, scales))
    torch.set_num_threads(threads)
    for scores, indices in results[1:]:
        assert torch.equal(scores, results[0][0])
        assert torch.equal(indices, results[0][1])
    scores, indices = results[0]
    expected = torch.sort(exact_cosine(queries, unique), descending=True).indices[:, :3]
    for row in range(batch):
        runs = indices[row].view(3, copies)
        assert torch.equal(runs[:, 0], expected[row])
        assert (runs.diff(dim=1) == 11).all()
        assert (scores[row].view(3, copies).diff(dim=1) == 0).all()


@needs_kernels
@pytest.mark.parametrize("batch", [1, 5])
def test_cosine_topk_orders_zero_and_nan_rows(batch):
    query = torch.zeros(batch, 8)
    query[:, 0] = 1
    keys = torch.zeros(6, 8)
    keys[1, 0] = -2.0
    keys[2, 3] = math.nan
    keys[4, 0] = 5.0
    keys[5] = math.inf
    scores, indices = kernels.cosine_topk(query, keys, 6, None)
    assert indices.tolist() == [[4, 0, 3, 1, 2, 5]] * batch
    assert scores[:, :4].tolist() == [[1.0, 0.0, 0.0, -1.0]] * batch
    assert scores[:, 4:].isnan().all()
    assert not torch.signbit(scores[:, 1:3]).any()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("batch", [1, 5])
def test_cosine_topk_heeds_zero_and_nan_scales(batch, dtype):
    keys = torch.ones(5, 20).to(dtype)
    scales = torch.tensor([math.nan, 0.0, 2.0, 1e-30, 0.0])
    scores, indices = kernels.cosine_topk(torch.ones(batch, 20), keys, 5, scales)
    assert indices.tolist() == [[2, 3, 1, 4, 0]] * batch
    torch.testing.assert_close(scores[0, :4], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert scores[:, 4].isnan().all()


@needs_kernels
@pytest.mark.parametrize("batch", [1, 5])
def test_cosine_topk_survives_extreme_lengths(batch):
    queries = torch.randn(batch, 33) * 1e-25
    keys = torch.randn(12, 33) * torch.logspace(-30, 36, 12).unsqueeze(1)
    scores, indices = kernels.cosine_topk(queries, keys, 12, None)
    exact = exact_cosine(queries, keys).gather(1, indices)
    assert_error_within(scores, exact, exact, rounding=8 * ROUNDING)


@needs_kernels
def test_cosine_topk_takes_zero_and_nan_queries():
    queries = torch.randn(4, 9)
    queries[1] = 0
    queries[2, 4] = math.nan
    keys = torch.randn(7, 9)
    keys[3, 0] = math.nan
    scores, indices = kernels.cosine_topk(queries, keys, 7, None)
    assert (scores[1] == 0).all()
    assert scores[2].isnan().all()
    assert indices[1].tolist() == indices[2].tolist() == list(range(7))
    assert indices[0, -1] == 3


@needs_kernels
def test_cosine_topk_reads_every_float8_value():
    keys = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat_interleave(2, 0).view(256, 2)
    keys = torch.cat((keys, torch.full((256, 1), 8.0).to(torch.float8_e4m3fn)), 1)
    queries = torch.tensor([[0.3, -1.0, 0.5]] * 3)
    for batch in (1, 3):
        scores, indices = kernels.cosine_topk(queries[:batch], keys, 256, torch.ones(256))
        exact = exact_cosine(queries[:batch], keys).gather(1, indices)
        assert torch.equal(scores.isnan(), exact.isnan())
        torch.testing.assert_close(scores.nan_to_num(), exact.nan_to_num().float(), rtol=0, atol=4e-7)


@st.composite
def banks(draw):
    """Queries and keys with duplicates, zeros, NaN, infinities and lengths that float32 squares cannot hold."""
    batch, count, columns = draw(st.integers(1, 40)), draw(st.integers(1, 120)), draw(st.integers(1, 150))
    dtype, query_dtype = draw(st.sampled_from(KEY_TYPES)), draw(st.sampled_from(FLOATS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    keys, scales = random_keys(count, columns, dtype, draw(st.integers(0, 99)))
    queries = torch.randn(batch, columns, generator=generator).to(query_dtype)
    for _ in range(draw(st.integers(0, 6))):
        row, kind = (
            draw(st.integers(0, count - 1)),
            draw(st.sampled_from(["copy", "zero", "nan", "inf", "tiny", "huge"])),
        )
        if kind == "copy":
            source = draw(st.integers(0, count - 1))
            keys[row] = keys[source]
            if scales is not None:
                scales[row] = scales[source]
        elif kind == "zero":
            keys[row] = 0
        elif kind == "nan" and dtype != torch.int8:
            keys[row, 0] = math.nan
        elif kind == "inf" and dtype.is_floating_point and dtype != torch.float8_e4m3fn:
            keys[row, -1] = math.inf
        elif kind in ("tiny", "huge") and dtype in (torch.float32, torch.bfloat16):
            keys[row] *= 1e-36 if kind == "tiny" else 1e30
    if draw(st.booleans()):
        queries[draw(st.integers(0, batch - 1))] = 0
    return queries, keys, scales, draw(st.integers(1, count))


@needs_kernels
@given(banks())
@settings(deadline=None, max_examples=150)
def test_cosine_topk_orders_any_bank(bank):
    queries, keys, scales, k = bank
    scores, indices = kernels.cosine_topk(queries, keys, k, scales)
    again = kernels.cosine_topk(queries, keys, k, scales)
    assert torch.equal(indices, again[1])
    assert torch.equal(scores.nan_to_num(9), again[0].nan_to_num(9))
    exact = exact_cosine(queries, keys, scales)
    exact = torch.where(exact.isfinite(), exact, math.nan)
    assert torch.equal(scores.isnan(), exact.gather(1, indices).isnan())
    best = exact.nan_to_num(-2).sort(1, descending=True).values[:, :k]
    assert (scores.nan_to_num(-2).double() - best).abs().max() < 1e-6
    assert (exact.gather(1, indices).nan_to_num(-2) - best).abs().max() < 1e-6
    # Descending, and equal scores in the order of their indices.
    ranked = scores.nan_to_num(-2)
    assert (ranked[:, :-1] >= ranked[:, 1:]).all()
    assert ((ranked[:, :-1] > ranked[:, 1:]) | (indices[:, :-1] < indices[:, 1:])).all()


@needs_kernels
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 20])
def test_cosine_topk_needs_no_subnormal_numbers(batch, query_dtype):
    # One large number among many whose squares, or which themselves, are subnormal in float32.
    queries = torch.randn(batch, 3000).to(query_dtype)
    keys = torch.randn(10, 3000) * torch.logspace(-41, -17, 10).unsqueeze(1)
    keys[:, 7] = torch.logspace(-40, -10, 10)
    keys = keys.to(torch.bfloat16)
    scores, indices = kernels.cosine_topk(queries, keys, 10, None)
    exact = exact_cosine(queries, keys).gather(1, indices)
    assert_error_within(scores, exact, exact, rounding=4 * ROUNDING)


@needs_kernels
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", KEY_TYPES)
@pytest.mark.parametrize("batch", [1, 8, 9])
def test_cosine_topk_adds_up_wide_keys(batch, dtype, query_dtype):
    # Sums of the largest int8 products do not fit into 32 bits, and those of like numbers in float32 drift.
    queries = torch.ones(batch, 140_001)
    queries[:, ::3] += torch.rand(batch, 46_667)
    queries = queries.to(query_dtype)
    keys = torch.full((3, 140_001), 127.0)
    keys[1] = -128
    keys[2, ::2] = -128
    keys, scales = keys.to(dtype), torch.ones(3) if dtype.itemsize == 1 else None
    scores, indices = kernels.cosine_topk(queries, keys, 3, scales)
    exact = exact_cosine(queries, keys, scales).gather(1, indices)
    eager = torch.nn.functional.normalize(queries.float()) @ torch.nn.functional.normalize(keys.float()).T
    assert_error_within(scores, eager.gather(1, indices), exact)
    # Eager's own sums drift by hundreds of roundings on some machines.
    assert_error_within(scores, exact, exact, rounding=4 * ROUNDING)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("batch", "k"), [(1, 1024), (300, 700), (2, 5000)])
def test_cosine_topk_keeps_many(batch, k, dtype):
    keys, scales = random_keys(5000, 32, dtype)
    keys[2500:] = keys[:2500]  # every score twice
    if scales is not None:
        scales[2500:] = scales[:2500]
    queries = torch.randn(batch, 32)
    scores, indices = kernels.cosine_topk(queries, keys, k, scales)
    all_scores, all_indices = kernels.cosine_topk(queries, keys, 5000, scales)
    assert torch.equal(scores, all_scores[:, :k])
    assert torch.equal(indices, all_indices[:, :k])
    assert torch.equal(all_scores[:, 0::2], all_scores[:, 1::2])
    assert torch.equal(all_indices.sort(1).values, torch.arange(5000).expand(batch, -1))
    higher, later = all_scores[:, :-1] > all_scores[:, 1:], all_indices[:, :-1] < all_indices[:, 1:]
    assert (higher | later & (all_scores[:, :-1] == all_scores[:, 1:])).all()


@needs_kernels
def test_cosine_topk_names_a_bad_k():
    with pytest.raises(RuntimeError, match=r"k \(4\) must be .* at most the number of keys \(3\)"):
        kernels.cosine_topk(torch.randn(1, 2), torch.randn(3, 2), 4, None)


SELECT_SHAPES = [(1, 1, 3, 1, 1, 1), (3, 6, 19, 2, 5, 4), (2, 21, 1100, 3, 400, 5), (4, 5, 576, 1, 576, 5)]


def candidates(batch, count, columns, num_memory, width, dtype, ragged):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(batch, columns, generator=generator).to(dtype)
    keys = torch.randn(batch, count, columns, generator=generator).to(dtype)
    memory = torch.randn(batch, count, num_memory, width, generator=generator).to(dtype)
    valid = None
    if ragged:
        valid = torch.rand(batch, count, generator=generator) < 0.6
        valid[0] = False
    return query, keys, memory, valid


@needs_kernels
@pytest.mark.parametrize("taken_logit", [-math.inf, math.log(1e-8)])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("batch", "count", "columns", "num_memory", "width", "k"), SELECT_SHAPES)
def test_select_memory_matches_float64(batch, count, columns, num_memory, width, k, dtype, ragged, taken_logit):
    query, keys, memory, valid = candidates(batch, count, columns, num_memory, width, dtype, ragged)
    temperature = 0.1
    selected, indices, scores = kernels.select_memory_forward(query, keys, memory, k, temperature, valid)
    grad_selected = torch.randn_like(selected)
    grad_scores = torch.randn(batch, count)
    grads = kernels.select_memory_backward(
        grad_selected, grad_scores, query, keys, memory, indices, scores, temperature, taken_logit, valid
    )

    def run(wide):
        inputs = [tensor.to(wide, copy=True).requires_grad_() for tensor in (query, keys, memory)]
        selected, indices, scores = reference.select_memory(
            *inputs, k, temperature=temperature, valid=valid, taken_logit=taken_logit
        )
        loss = (selected * grad_selected.to(wide)).sum() + (scores * grad_scores.to(wide)).sum()
        grads = torch.autograd.grad(loss, inputs, materialize_grads=True)
        return indices, scores.detach(), grads

    exact_indices, exact_scores, exact_grads = run(torch.float64)
    eager_scores, eager_grads = run(dtype)[1:]
    assert torch.equal(indices, exact_indices)
    assert_error_within(scores, eager_scores, exact_scores)
    for row in range(batch):
        for slot, index in enumerate(indices[row].tolist()):
            expected = torch.zeros_like(memory[0, 0]) if index < 0 else memory[row, index]
            assert torch.equal(selected[row, slot], expected)
    for actual, eager, exact, source in zip(grads, eager_grads, exact_grads, (query, keys, memory)):
        assert (actual.dtype, actual.shape) == (source.dtype, source.shape)
        assert_error_within(actual, eager, exact, rounding=max(ROUNDING * 16, torch.finfo(dtype).eps / 2))


@needs_kernels
def test_select_memory_never_reads_invalid_candidates():
    query, keys, memory, _ = candidates(2, 9, 30, 2, 15, torch.float32, False)
    valid = torch.rand(2, 9) < 0.5
    valid[:, 4] = True
    poisoned = [torch.where(valid.view(2, 9, *[1] * (x.dim() - 2)), x, math.nan) for x in (keys, memory)]
    clean = [x.nan_to_num(nan=7.0) for x in poisoned]
    outputs = []
    for k, m in (poisoned, clean):
        forward = kernels.select_memory_forward(query, k, m, 3, 0.02, valid)
        grads = kernels.select_memory_backward(
            torch.ones_like(forward[0]), torch.ones(2, 9), query, k, m, *forward[1:], 0.02, -math.inf, valid
        )
        outputs.append([*forward, *grads])
    for actual, expected in zip(*outputs):
        assert torch.equal(actual, expected)


@needs_kernels
def test_select_memory_gives_zero_vectors_no_gradient():
    query, keys, memory, _ = candidates(2, 5, 12, 1, 12, torch.float32, False)
    query[0] = 0
    keys[1, 2] = 0
    keys[1, 3] = keys[1, 1]
    selected, indices, scores = kernels.select_memory_forward(query, keys, memory, 5, 0.5, None)
    assert (scores[0] == 0).all()
    assert indices[0].tolist() == [0, 1, 2, 3, 4]
    assert scores[1, 2] == 0
    order = indices[1].tolist()
    assert order.index(3) == order.index(1) + 1
    grad_query, grad_keys, _ = kernels.select_memory_backward(
        torch.randn_like(selected),
        torch.randn(2, 5),
        query,
        keys,
        memory,
        indices,
        scores,
        0.5,
        -math.inf,
        None,
    )
    assert (grad_query[0] == 0).all()
    assert (grad_keys[0] == 0).all()
    assert (grad_keys[1, 2] == 0).all()
    assert grad_query[1].abs().max() > 0


@needs_kernels
def test_select_memory_backward_names_a_bad_index():
    query, keys, memory, _ = candidates(1, 3, 4, 1, 4, torch.float32, False)
    selected, indices, scores = kernels.select_memory_forward(query, keys, memory, 1, 0.5, None)
    with pytest.raises(RuntimeError, match=r"indices \(3\) must be .* below the number of candidates \(3\)"):
        kernels.select_memory_backward(
            selected, scores, query, keys, memory, torch.full_like(indices, 3), scores, 0.5, -math.inf, None
        )


INSTRUCTION_SETS = {
    "generic": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f",),
    "avx512_bf16": ("avx512_bf16", "avx512_vnni", "avx512vbmi"),
    "amx": ("amx_bf16", "amx_int8"),
    "amx_emulated": ("avx512_bf16", "avx512_vnni", "avx512vbmi"),
}


def run_under(isa, *command):
    environment = os.environ | {"CLARA_FAST_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set_passes_the_same_tests(isa):
    if "CLARA_FAST_CPU_ISA" in os.environ:
        pytest.skip("already under a chosen instruction set")
    if not all(_native.cpu_features()[feature] for feature in INSTRUCTION_SETS[isa]):
        pytest.skip(f"this processor lacks {isa}")
    result = run_under(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__)
    assert result.returncode == 0, result.stdout[-3000:]


@needs_kernels
@pytest.mark.slow
def test_an_unknown_instruction_set_is_named():
    search = "import torch; from clara_fast import ops; ops.cosine_topk(torch.ones(1, 2), torch.ones(3, 2), 1)"
    result = run_under("avx9", "-c", search)
    assert result.returncode != 0
    assert "CLARA_FAST_CPU_ISA (avx9) must be generic, avx2, avx512, avx512_bf16, amx or" in result.stderr
