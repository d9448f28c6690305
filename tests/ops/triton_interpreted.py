"""The Triton kernels under the operators, in Triton's interpreter: values and gradients against float64.

The interpreter is chosen before Triton is imported, so ``test_triton_kernels.py`` runs this file in a process of its
own. The operators take Triton's way with CPU tensors here.
"""

import math
import os

import pytest
import torch
from ops_checks import assert_within_budget, values_and_grads, vast_attention_arguments, vast_pool_memory_arguments

from clara_fast import ops
from clara_fast.ops import ContextLayout, _library, reference

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/ops/test_triton_kernels.py"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def cpu_tensors_count_as_cuda(monkeypatch):
    called = []

    def triton_kernels(name, *tensors):
        if tensors[0].dtype not in _library.KERNEL_DTYPES or not _library._alike(tensors[0].dtype, tensors):
            return None
        called.append(name)
        return _library._import_triton_kernels(name)

    monkeypatch.setattr(_library, "native", {})
    monkeypatch.setattr(_library, "triton_kernels", triton_kernels)
    yield
    assert called, "no Triton kernel ran"


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


OFFSETS = {"ragged": ([0, 5, 8, 15], 15), "rows outside": ([2, 6, 9], 11), "memory only": ([0, 2, 4], 4)}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OFFSETS)
def test_pool_memory(name, dtype, norm):
    offsets, rows = OFFSETS[name]
    offsets = torch.tensor(offsets, dtype=torch.int32)
    inputs = [rand(rows, 37, dtype=dtype)] + ([rand(37, dtype=dtype)] if norm else [])
    functions = [
        lambda hidden, weight=None, f=f: f(hidden, offsets, 2, norm_weight=weight)
        for f in (ops.pool_memory, reference.pool_memory)
    ]
    assert_within_budget(*functions, inputs, rounded_within=dtype if norm else torch.float64)


def test_pool_memory_of_many_rows():
    """Several programs to a segment, and an Inf that stays in its document."""
    hidden = rand(1200, 16)
    hidden[3, 2] = torch.inf
    offsets = torch.tensor([0, 700, 1200], dtype=torch.int32)
    memory, mse = ops.pool_memory(hidden, offsets, 5)
    expected, expected_mse = reference.pool_memory(hidden.double(), offsets, 5)
    assert torch.equal(memory, expected.float())
    assert mse[0] == torch.inf
    torch.testing.assert_close(mse[1].double(), expected_mse[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pool_memory_in_two_blocks_and_several_parts(dtype):
    """530 = 512 + 18 columns, segments that two programs share, and rows of none."""
    offsets = torch.tensor([1, 65, 131], dtype=torch.int32)
    inputs = [rand(134, 530, dtype=dtype), rand(530, dtype=dtype)]
    functions = [
        lambda hidden, weight, f=f: f(hidden, offsets, 20, norm_weight=weight)
        for f in (ops.pool_memory, reference.pool_memory)
    ]
    assert_within_budget(*functions, inputs, rounded_within=dtype)


VALID = {
    "all": None,
    "ragged": [[1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0, 0]],
    "none in a row": [[0] * 7, [1] * 7, [0, 1, 1, 0, 0, 0, 0]],
}


@pytest.mark.parametrize("taken_logit", [-math.inf, math.log(1e-8)])
@pytest.mark.parametrize("valid", VALID)
@pytest.mark.parametrize("dtype", DTYPES)
def test_select_memory(dtype, valid, taken_logit):
    mask = None if VALID[valid] is None else torch.tensor(VALID[valid], dtype=torch.bool)
    inputs = [rand(3, 20, dtype=dtype), rand(3, 7, 20, dtype=dtype), rand(3, 7, 3, 50, dtype=dtype)]
    options = {"temperature": 0.4, "valid": mask, "taken_logit": taken_logit}

    def eager(*tensors):
        wide = [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors]
        selected, indices, scores = reference.select_memory(*wide, 4, **options)
        return selected.to(tensors[0].dtype), indices, scores

    # Two units: products are taken in another order than in the reference.
    assert_within_budget(lambda *tensors: ops.select_memory(*tensors, 4, **options), eager, inputs, factor=3)
    ours, theirs = ops.select_memory(*inputs, 4, **options)[1], eager(*inputs)[1]
    assert torch.equal(ours, theirs)


def test_select_memory_ties_padding_and_nan():
    row = rand(1, 1, 40)
    keys = torch.cat([-row, row, row, torch.zeros(1, 1, 40), row], 1)
    memory = rand(1, 5, 1, 2)
    assert ops.select_memory(row[:, 0], keys, memory, 5)[1].tolist() == [[1, 2, 4, 3, 0]]
    keys[0, 0, 0] = torch.nan
    valid = torch.tensor([[True, True, False, True, True]])
    assert ops.select_memory(row[:, 0], keys, memory, 5, valid=valid)[1].tolist() == [[1, 4, 3, 0, -1]]
    valid[0, 0] = False
    memory[~valid] = torch.inf
    function = lambda *tensors: ops.select_memory(*tensors, 4, valid=valid)  # noqa: E731
    assert all(tensor.isfinite().all() for tensor in values_and_grads(function, [row[:, 0], keys, memory]))


def test_select_memory_of_more_than_a_block():
    """More slots than a product's side, more candidates than a block, more elements than one split."""
    inputs = [rand(1, 8), rand(1, 40, 8), rand(1, 40, 2, 700)]
    functions = [lambda *x, f=f: f(*x, 18, temperature=1.0) for f in (ops.select_memory, reference.select_memory)]
    assert_within_budget(*functions, inputs, factor=3)


def test_select_memory_whose_keys_are_the_memory():
    """Their norms come from the pass over the memory."""
    valid = torch.tensor([[1] * 6, [1, 0, 1, 1, 0, 1]], dtype=torch.bool)
    inputs = [rand(2, 600), rand(2, 6, 2, 300)]
    functions = [
        lambda query, memory, f=f: f(query, memory.flatten(2), memory, 3, temperature=0.4, valid=valid)
        for f in (ops.select_memory, reference.select_memory)
    ]
    assert_within_budget(*functions, inputs, factor=3)


LAYOUTS = {
    "packed": (ContextLayout.packed([4, 0, 40, 3]), 47, 47),
    "branches": (ContextLayout.branches([35, 7, 0], [[3, 14], [3], [2, 0]]), 64, 64),
    "blocks": (ContextLayout.blocks([[3, 33, 2], []], [4, 2]), 44, 44),
    "prefill": (ContextLayout.padded([2, 4], 6, kv_padding=[1, 2], q_padding=[2, 0]), 8, 12),
    "decode": (ContextLayout.padded([2, 40, 3], 41, kv_padding=[1, 0, 0], q_lengths=1), 3, 123),
    "more queries than keys": (ContextLayout.from_lists([0, 4], [4, 3], [0, 2], [2, 1], [[], [0]]), 7, 3),
    "shared keys": (ContextLayout.from_lists([0, 2], [2, 2], [0, 1], [3, 3], [[], []]), 4, 4),
    "later context": (ContextLayout.from_lists([0, 2], [2, 2], [0, 2], [2, 2], [[1], []]), 4, 4),
    "gaps": (ContextLayout.from_lists([5, 1], [2, 3], [4, 0], [2, 4], [[], []]), 9, 8),
    "split decode": (
        ContextLayout.from_lists([0, 0, 2], [0, 0, 1], [0, 70, 160], [70, 90, 40], [[], [], [0, 1]]),
        3,
        200,
    ),
    "many segments": (ContextLayout.packed([0] * 127 + [3, 2, 4]), 9, 9),
}


@pytest.mark.parametrize(
    ("name", "heads"),
    [*((name, (6, 2)) for name in LAYOUTS if name != "many segments"), ("packed", (2, 2)), ("many segments", (3, 1))],
)
def test_attention(name, heads):
    layout, rows, keys = LAYOUTS[name]
    inputs = [rand(rows, heads[0], 40), rand(keys, heads[1], 40), rand(keys, heads[1], 5)]
    functions = [
        lambda *tensors, f=f: f(*tensors, layout)
        for f in (ops.compressed_context_attention, reference.compressed_context_attention)
    ]
    # exp(score - lse) rounds the score once more than a softmax does.
    assert_within_budget(*functions, inputs, factor=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["branches", "decode", "gaps"])
def test_attention_in_low_precision(name, dtype):
    layout, rows, keys = LAYOUTS[name]
    inputs = [rand(rows, 4, 24, dtype=dtype), rand(keys, 2, 24, dtype=dtype), rand(keys, 2, 24, dtype=dtype)]
    functions = [
        lambda *tensors, f=f: f(*tensors, layout, scale=0.3)
        for f in (ops.compressed_context_attention, reference.compressed_context_attention)
    ]
    assert_within_budget(*functions, inputs)


def test_attention_gradient_of_lse_and_strided_inputs():
    layout, rows, keys = LAYOUTS["blocks"]
    inputs = [rand(4, rows, 8), rand(2, keys, 16), rand(keys, 2, 8)]

    def through(query, key, value):
        views = (query.transpose(0, 1), key.transpose(0, 1)[..., ::2], value)
        return torch.ops.clara_fast.compressed_context_attention(*views, *layout.tensors(), 0.3)

    ours = values_and_grads(through, inputs)
    # In float64 the operator runs in plain PyTorch.
    exact = values_and_grads(through, [tensor.double() for tensor in inputs])
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-5)


def test_pool_memory_past_int32():
    hidden, offsets, rows = vast_pool_memory_arguments()
    memory, mse = ops.pool_memory(hidden, offsets, 2)
    assert torch.equal(memory[0], rows[5:])
    expected = reference.pool_memory(rows.double(), torch.tensor([0, 7], dtype=torch.int32), 2)[1]
    torch.testing.assert_close(mse.double(), expected, rtol=1e-5, atol=0)


def test_attention_past_int32():
    vast, vast_layout, short, short_layout = vast_attention_arguments()
    out = ops.compressed_context_attention(*vast, vast_layout)
    torch.testing.assert_close(out, ops.compressed_context_attention(*short, short_layout))


def test_warmup():
    seconds = ops.warmup(hidden_size=16, num_memory=2, num_heads=2, num_key_heads=1, device="cpu")
    assert len(seconds) == 4
