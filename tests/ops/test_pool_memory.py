import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_checks import DTYPES, assert_same, assert_within_budget, values_and_grads, vast_pool_memory_arguments

from clara_fast import ops
from clara_fast.ops import reference

pytestmark = pytest.mark.usefixtures("backend")


def make_inputs(rows, size=6, norm=False, dtype=torch.float64):
    inputs = [torch.randn(rows, size, dtype=dtype)]
    return [*inputs, torch.randn(size, dtype=dtype)] if norm else inputs


def pair(offsets, num_memory, **options):
    offsets = torch.tensor(offsets, dtype=torch.int32)
    return tuple(
        lambda hidden, weight=None, f=f: f(hidden, offsets, num_memory, norm_weight=weight, **options)
        for f in (ops.pool_memory, reference.pool_memory)
    )


OFFSETS = {
    "ragged": ([0, 5, 8, 15], 15, 3),
    "one": ([0, 4], 4, 1),
    "memory only": ([0, 2, 7, 9], 9, 2),
    "rows outside": ([2, 6, 9], 11, 2),
    "no segments": ([0], 0, 2),
    "no segments, some rows": ([1], 3, 2),
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", OFFSETS)
def test_matches_the_reference(name, norm):
    offsets, rows, num_memory = OFFSETS[name]
    assert_same(*pair(offsets, num_memory), make_inputs(rows, norm=norm))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OFFSETS)
def test_error_budget(name, dtype, norm):
    offsets, rows, num_memory = OFFSETS[name]
    inputs = make_inputs(rows, 33, norm=norm, dtype=dtype)
    assert_within_budget(*pair(offsets, num_memory), inputs, rounded_within=dtype if norm else torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 9), max_size=5),
    st.integers(1, 4),
    st.sampled_from([1, 7, 16, 65]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 999),
)
def test_any_shape(documents, num_memory, size, norm, dtype, seed):
    torch.manual_seed(seed)
    # The norm of one number is its sign: the gradient is what rounding leaves of 0.
    norm = norm and size > 1
    offsets = [0]
    for length in documents:
        offsets.append(offsets[-1] + length + num_memory)
    functions = pair(offsets, num_memory)
    assert_same(*functions, make_inputs(offsets[-1], size, norm))
    inputs = make_inputs(offsets[-1], size, norm, dtype)
    assert_within_budget(*functions, inputs, rounded_within=dtype if norm else torch.float64)


def test_values():
    hidden = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    memory, mse = ops.pool_memory(hidden, torch.tensor([0, 3, 3], dtype=torch.int32)[:2], 1)
    assert memory.tolist() == [[[0.0, 1.0]]]
    assert mse.tolist() == [2.5]


def test_norm_equals_llama_rms_norm():
    modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    norm = modeling_llama.LlamaRMSNorm(8, eps=1e-5).bfloat16()
    torch.nn.init.normal_(norm.weight)
    hidden = torch.randn(9, 8, dtype=torch.bfloat16) * 5
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    memory, _ = ops.pool_memory(hidden, offsets, 2, norm_weight=norm.weight, norm_eps=1e-5)
    expected = norm(hidden)[[2, 3, 7, 8]].view(2, 2, 8)
    # One unit in the last place: sums of squares may be taken in another order.
    torch.testing.assert_close(memory, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck(norm):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(12, 3, norm)]
    assert torch.autograd.gradcheck(pair([1, 4, 6, 11], 2)[0], inputs)


def test_weight_of_another_dtype():
    hidden, weight = torch.randn(5, 4, dtype=torch.bfloat16), torch.randn(4, requires_grad=True)
    memory, mse = ops.pool_memory(hidden, torch.tensor([0, 5], dtype=torch.int32), 2, norm_weight=weight)
    assert (memory.dtype, mse.dtype) == (torch.bfloat16, torch.float32)
    (grad,) = torch.autograd.grad(mse.sum(), weight)
    assert grad.dtype == torch.float32


def test_partial_requires_grad():
    inputs = make_inputs(9, norm=True)
    function = pair([0, 4, 9], 2)[0]
    full = values_and_grads(function, inputs)
    for wanted in (0, 1):
        leaves = [tensor.clone() for tensor in inputs]
        leaves[wanted].requires_grad_()
        memory, mse = function(*leaves)
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randint(-8, 9, out.shape, generator=generator).to(out.dtype) / 8 for out in (memory, mse)]
        (grad,) = torch.autograd.grad([memory, mse], leaves[wanted], upstream)
        torch.testing.assert_close(grad, full[2 + wanted])


def test_one_output_used():
    hidden = torch.randn(9, 4, requires_grad=True)
    memory, mse = ops.pool_memory(hidden, torch.tensor([0, 4, 9], dtype=torch.int32), 2)
    (grad,) = torch.autograd.grad(memory.sum(), hidden, retain_graph=True)
    assert grad.tolist() == [[float(row in (2, 3, 7, 8))] * 4 for row in range(9)]
    (grad,) = torch.autograd.grad(mse[0], hidden)
    assert (grad[:4] != 0).all()
    assert (grad[4:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_non_contiguous_inputs(dtype):
    function = pair([0, 4, 9], 2)[0]
    hidden, weight = torch.randn(6, 18, dtype=dtype), torch.randn(12, dtype=dtype)
    assert_same(
        lambda h, w: function(h.t()[::2], w[::2]),
        lambda h, w: function(h.t()[::2].contiguous(), w[::2].contiguous()),
        [hidden, weight],
    )


def test_nan_stays_in_its_segment():
    for dtype in (torch.float64, torch.float32):
        hidden = torch.randn(9, 4, dtype=dtype)
        hidden[0, 0] = torch.nan
        for norm_weight in (None, torch.ones(4, dtype=dtype)):
            offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
            memory, mse = ops.pool_memory(hidden, offsets, 2, norm_weight=norm_weight)
            assert memory.isfinite().all()
            assert mse.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden": torch.zeros(6, 4, 1)},
            r"hidden must be floating point \[T, D\], got torch.float32 \[6, 4, 1\]",
        ),
        ({"hidden": torch.zeros(6, 4, dtype=torch.int32)}, "hidden must be floating point"),
        ({"offsets": torch.tensor([0, 6])}, r"offsets must be int32 \[S \+ 1\], got torch.int64 \[2\]"),
        ({"num_memory": 0}, r"num_memory \(0\) must be at least 1"),
        ({"num_memory": 4}, r"offsets give segment 0 3 rows, which must be at least num_memory \(4\)"),
        (
            {"offsets": torch.tensor([0, 7], dtype=torch.int32)},
            r"offsets \(0 .. 7\) must lie within the rows of hidden \(6\)",
        ),
        ({"norm_weight": torch.zeros(5)}, r"norm_weight must be floating point \[D\] = \[4\], got torch.float32 \[5\]"),
    ],
)
def test_errors(change, message):
    arguments = {
        "hidden": torch.zeros(6, 4),
        "offsets": torch.tensor([0, 3, 6], dtype=torch.int32),
        "num_memory": 2,
    }
    with pytest.raises(ValueError, match=message):
        ops.pool_memory(**(arguments | change))


def test_offsets_past_int32():
    hidden, offsets, rows = vast_pool_memory_arguments()
    memory, mse = ops.pool_memory(hidden, offsets, 2)
    assert torch.equal(memory[0], rows[5:])
    expected = reference.pool_memory(rows.double(), torch.tensor([0, 7], dtype=torch.int32), 2)[1]
    torch.testing.assert_close(mse.double(), expected, rtol=1e-5, atol=0)
