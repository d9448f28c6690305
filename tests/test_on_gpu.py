"""Every operator on a GPU, against float64: small shapes with ragged ends, for ``make sanitize-gpu`` as well."""

from __future__ import annotations

import pytest
import torch

from clara_fast import ops
from clara_fast.ops import reference
from tests.ops.ops_checks import DTYPES, assert_within_budget

DEVICE = "cuda"

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
def test_pool_memory(dtype, normed):
    offsets = torch.tensor([0, 5, 12, 140], dtype=torch.int32, device=DEVICE)
    inputs = [torch.randn(140, 77, device=DEVICE, dtype=dtype)]
    if normed:
        inputs.append(1 + 0.1 * torch.randn(77, device=DEVICE, dtype=dtype))

    def pair(function):
        return lambda hidden, weight=None: function(hidden, offsets, 3, norm_weight=weight)

    assert_within_budget(pair(ops.pool_memory), pair(reference.pool_memory), inputs, rounded_within=dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("batch", "count", "columns", "k"), [(1, 1, 8, 1), (3, 301, 77, 10), (70, 1030, 576, 100)])
def test_cosine_topk(dtype, batch, count, columns, k):
    queries, keys = torch.randn(batch, columns, device=DEVICE), torch.randn(count, columns, device=DEVICE)
    scales = None
    if dtype == torch.int8:
        keys, scales = (keys * 30).round().clamp(-127, 127), torch.rand(count, device=DEVICE) + 0.1
    elif dtype == torch.float8_e4m3fn:
        scales = torch.rand(count, device=DEVICE) + 0.1
    else:
        queries = queries.to(dtype)
    keys = keys.to(dtype)
    scores, rows = ops.cosine_topk(queries, keys, k, key_scales=scales)
    exact = reference.cosine(queries.double(), keys.double().expand(batch, -1, -1))
    # Float32 sums of exact products: their error grows with the number of columns at most.
    allowed = columns * torch.finfo(torch.float32).eps
    assert (scores - exact.topk(k).values).abs().max() <= allowed
    assert (scores - exact.gather(1, rows)).abs().max() <= allowed
    assert (rows.sort().values.diff() > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_select_memory(dtype):
    # One coordinate of the query's direction ranks the candidates alike in every dtype.
    cosines = torch.linspace(-0.9, 0.9, 7, device=DEVICE)[torch.stack([torch.randperm(7) for _ in range(3)])]
    query = torch.zeros(3, 2, device=DEVICE)
    query[:, 0] = 1.5
    keys = torch.stack((cosines, (1 - cosines**2).sqrt()), -1)
    inputs = [query.to(dtype), keys.to(dtype), torch.randn(3, 7, 2, 33, device=DEVICE, dtype=dtype)]
    valid = torch.tensor([[1] * 7, [1, 0, 1, 0, 0, 1, 1], [0] * 6 + [1]], dtype=torch.bool, device=DEVICE)

    def pair(function):
        return lambda *tensors: function(*tensors, 3, temperature=0.1, valid=valid)

    assert_within_budget(pair(ops.select_memory), pair(reference.select_memory), inputs, rounded_within=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_compressed_context_attention(dtype, heads):
    layout = ops.ContextLayout.branches([37, 5], [[9, 1], [20]]).to(DEVICE)
    rows = 37 + 5 + 9 + 1 + 20
    inputs = [torch.randn(rows, count, 64, device=DEVICE, dtype=dtype) for count in (heads[0], heads[1], heads[1])]

    def pair(function):
        return lambda *tensors: function(*tensors, layout)

    assert_within_budget(pair(ops.compressed_context_attention), pair(reference.compressed_context_attention), inputs)
