import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops_checks import DTYPES, assert_same, assert_within_budget, values_and_grads, vast_attention_arguments

from clara_fast import ops
from clara_fast.ops import ContextLayout, _library, reference

pytestmark = pytest.mark.usefixtures("backend")

LAYOUTS = {
    "packed": (ContextLayout.packed([4, 0, 4, 3]), 11, 11),
    "even": (ContextLayout.packed([5, 5, 5]), 15, 15),
    "long": (ContextLayout.packed([150, 131]), 281, 281),
    "branches": (ContextLayout.branches([5, 7, 0], [[3, 4], [3], [2, 0]]), 24, 24),
    "blocks": (ContextLayout.blocks([[3, 3, 2], []], [4, 2]), 14, 14),
    "prefill": (ContextLayout.padded([2, 4], 6, kv_padding=[1, 2], q_padding=[2, 0]), 8, 12),
    "decode": (ContextLayout.padded([2, 4, 3], 6, kv_padding=[1, 2, 0], q_lengths=1), 3, 18),
    "even decode": (ContextLayout.padded([4, 4, 4], 6, q_lengths=1), 3, 18),
    "more queries than keys": (ContextLayout.from_lists([0, 4], [4, 3], [0, 2], [2, 1], [[], [0]]), 7, 3),
    "shared keys": (ContextLayout.from_lists([0, 2], [2, 2], [0, 1], [3, 3], [[], []]), 4, 4),
    "same keys": (ContextLayout.from_lists([0, 2], [2, 2], [1, 1], [3, 3], [[], []]), 4, 4),
    "later context": (ContextLayout.from_lists([0, 2], [2, 2], [0, 2], [2, 2], [[1], []]), 4, 4),
    "gaps": (ContextLayout.from_lists([5, 1], [2, 3], [4, 0], [2, 4], [[], []]), 9, 8),
    "no segments": (ContextLayout.packed([]), 3, 2),
    "no rows": (ContextLayout.packed([0]), 0, 0),
}


def make_inputs(rows, keys, heads=(4, 2), size=8, value_size=None, dtype=torch.float64):
    return [
        torch.randn(rows, heads[0], size, dtype=dtype),
        torch.randn(keys, heads[1], size, dtype=dtype),
        torch.randn(keys, heads[1], value_size or size, dtype=dtype),
    ]


def pair(layout, **options):
    return (
        lambda *inputs: ops.compressed_context_attention(*inputs, layout, **options),
        lambda *inputs: reference.compressed_context_attention(*inputs, layout, **options),
    )


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (6, 2)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_matches_the_reference(name, heads):
    layout, rows, keys = LAYOUTS[name]
    layout.validate(rows, keys)
    assert_same(*pair(layout), make_inputs(rows, keys, heads))


# Query and key heads, size, value size.
SHAPES = [(4, 2, 8, 8), (9, 3, 64, 64), (6, 2, 20, 33), (12, 1, 128, 96), (3, 3, 7, 5)]
# More rows and keys than a block of the native kernels, keys that are split among tasks, few rows on many keys.
LARGE = {
    "blocks of rows": (ContextLayout.packed([430, 1, 70]), 501, 501),
    "blocks of branches": (ContextLayout.branches([300], [[40, 1, 90]]), 431, 431),
    "split decode": (ContextLayout.padded([1300, 3, 700], 1300, q_lengths=1), 3, 3900),
    "few rows": (ContextLayout.padded([600, 5], 600, q_lengths=[2, 7]), 14, 1200),
    "few rows on a context": (ContextLayout.from_lists([0, 3], [3, 9], [0, 600], [600, 2], [[1], [0]]), 12, 602),
}


def exact_log_sums(query, key, layout, scale):
    groups = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhe,khe->qhk", query.double(), key.double().repeat_interleave(groups, 1)) * scale
    hidden = ~reference.attention_mask(layout, query.shape[0], key.shape[0])
    return scores.masked_fill(hidden[:, None], -torch.inf).logsumexp(-1)


def assert_attention_within_budget(layout, inputs, scale=None, factor=3):
    """Gradients come from weights exp(score - lse), where lse is a float32, and from differences to grad_out . out."""
    query, key, value = (tensor.double() for tensor in inputs)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    lse = exact_log_sums(query, key, layout, scale)
    largest = lse[lse.isfinite()].abs().max().item() if lse.isfinite().any() else 0.0
    terms = 0.0
    if query.numel() and key.numel():
        # The upstream gradients of values_and_grads are at most 1.
        products = value.square().sum(-1).sqrt().max() * value.shape[2] ** 0.5
        terms = (products * max(query.abs().max(), key.abs().max()) * abs(scale)).item()
    rounding = largest * torch.finfo(torch.float32).eps + torch.finfo(inputs[0].dtype).eps
    assert_within_budget(*pair(layout, scale=scale), inputs, factor, gradient_rounding=rounding, gradient_terms=terms)


def budget(layout, rows, keys, shape, dtype, scale=None):
    q_heads, heads, size, value_size = shape
    assert_attention_within_budget(layout, make_inputs(rows, keys, (q_heads, heads), size, value_size, dtype), scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_error_budget(name, shape, dtype):
    torch.manual_seed(0)
    budget(*LAYOUTS[name], shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 3, 64, 64), (5, 1, 9, 17)])
@pytest.mark.parametrize("name", LARGE)
def test_error_budget_of_many_blocks(name, shape, dtype):
    torch.manual_seed(0)
    budget(*LARGE[name], shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1, 256, 256), (200, 1, 16, 16)])
def test_error_budget_of_wide_heads_and_many_heads_to_a_key(shape, dtype):
    torch.manual_seed(0)
    budget(*LAYOUTS["branches"], shape, dtype)


@pytest.mark.parametrize("scale", [-0.4, 0.0, 3.0])
@pytest.mark.parametrize("name", ["branches", "decode"])
def test_error_budget_of_scales(name, scale):
    torch.manual_seed(0)
    budget(*LAYOUTS[name], (4, 2, 8, 8), torch.float32, scale)


@st.composite
def layouts(draw):
    segments = draw(st.integers(0, 5))
    lengths = st.lists(st.integers(0, 6), min_size=segments, max_size=segments)
    q_len, kv_len = draw(lengths), draw(lengths)
    keys = 8
    q_start = [sum(q_len[:segment]) for segment in range(segments)]
    kv_start = [draw(st.integers(0, keys - length)) for length in kv_len]
    row = st.lists(st.integers(0, max(segments - 1, 0)), max_size=3, unique=True)
    contexts = []
    for segment in range(segments):
        taken = set(range(kv_start[segment], kv_start[segment] + kv_len[segment]))
        chosen = []
        # A key that a row sees twice is outside what a mask can say.
        for other in draw(row):
            own = set(range(kv_start[other], kv_start[other] + kv_len[other]))
            if not own & taken:
                taken |= own
                chosen.append(other)
        contexts.append(chosen)
    return (
        ContextLayout.from_lists(q_start, q_len, kv_start, kv_len, contexts),
        sum(q_len) + draw(st.integers(0, 2)),
        keys,
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layouts(), st.sampled_from([(1, 1), (4, 2)]), st.sampled_from([1, 5]), st.integers(0, 999))
def test_any_layout(case, heads, size, seed):
    torch.manual_seed(seed)
    layout, rows, keys = case
    assert_same(*pair(layout), make_inputs(rows, keys, heads, size))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layouts(),
    st.sampled_from([(1, 1), (4, 2), (9, 1)]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.integers(0, 999),
)
def test_error_budget_of_any_layout(case, heads, size, value_size, dtype, seed):
    torch.manual_seed(seed)
    budget(*case, (*heads, size, value_size), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LARGE)
def test_the_same_bits_again_and_on_any_number_of_threads(name, dtype):
    layout, rows, keys = LARGE[name]
    inputs = make_inputs(rows, keys, (9, 3), 64, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = values_and_grads(pair(layout)[0], inputs)
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            if count > 1 and not _library.native:
                continue
            for ours, before in zip(values_and_grads(pair(layout)[0], inputs), alone, strict=True):
                assert torch.equal(ours, before)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gaps", "more queries than keys", "decode"])
def test_log_sum_exp(name, dtype):
    layout, rows, keys = LAYOUTS[name]
    query, key, value = make_inputs(rows, keys, dtype=dtype)
    out, lse = torch.ops.clara_fast.compressed_context_attention(query, key, value, *layout.tensors(), 0.7)
    with torch.no_grad():
        assert torch.equal(out, ops.compressed_context_attention(query, key, value, layout, scale=0.7))
    exact = exact_log_sums(query, key, layout, 0.7)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_log_sum_exp(dtype):
    layout, rows, keys = LAYOUTS["branches"]

    def both(*inputs):
        return torch.ops.clara_fast.compressed_context_attention(*inputs, *layout.tensors(), 0.7)

    inputs = make_inputs(rows, keys, dtype=dtype)
    exact = values_and_grads(both, [tensor.double() for tensor in inputs])
    for ours, true in zip(values_and_grads(both, inputs), exact, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=0, atol=8 * torch.finfo(dtype).eps * true.abs().max())


def test_gradcheck():
    layout, rows, keys = LAYOUTS["branches"]
    inputs = [tensor.requires_grad_() for tensor in make_inputs(rows, keys, (2, 1), 3, 2)]
    assert torch.autograd.gradcheck(lambda *x: ops.compressed_context_attention(*x, layout), inputs, fast_mode=True)


def test_gradcheck_of_the_log_sum_exp():
    layout, rows, keys = LAYOUTS["packed"]
    inputs = [tensor.requires_grad_() for tensor in make_inputs(rows, keys, (2, 1), 3)]
    function = lambda *x: torch.ops.clara_fast.compressed_context_attention(*x, *layout.tensors(), 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    _, lse = function(*inputs)
    grads = torch.autograd.grad(lse.sum(), inputs[:2])
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_different_value_size_and_scale():
    layout, rows, keys = LAYOUTS["blocks"]
    assert_same(*pair(layout, scale=0.3), make_inputs(rows, keys, value_size=5))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_non_contiguous_and_expanded_inputs(dtype, tolerance):
    layout, rows, keys = LAYOUTS["branches"]
    query, key, value = make_inputs(rows, keys, dtype=dtype)
    assert_same(
        lambda q, k, v: ops.compressed_context_attention(
            q.transpose(0, 1).contiguous().transpose(0, 1),
            k[:, :1].expand(-1, 2, -1),
            v.flip(2)[..., ::2],
            layout,
        ),
        lambda q, k, v: reference.compressed_context_attention(
            q, k[:, :1].expand(-1, 2, -1), v.flip(2)[..., ::2], layout
        ),
        [query, key, value],
        tolerance,
    )


def test_expanded_upstream_gradient():
    layout, rows, keys = LAYOUTS["packed"]
    inputs = [tensor.requires_grad_() for tensor in make_inputs(rows, keys)]
    ours = torch.autograd.grad(ops.compressed_context_attention(*inputs, layout).sum(), inputs)
    theirs = torch.autograd.grad(reference.compressed_context_attention(*inputs, layout).sum(), inputs)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("wanted", range(3))
def test_partial_requires_grad(wanted, dtype):
    layout, rows, keys = LAYOUTS["branches"]
    inputs = make_inputs(rows, keys, dtype=dtype)
    full = values_and_grads(pair(layout)[0], inputs)[1:]
    inputs[wanted].requires_grad_()
    out = ops.compressed_context_attention(*inputs, layout)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randint(-8, 9, out.shape, generator=generator).to(out.dtype) / 8
    torch.testing.assert_close(torch.autograd.grad(out, inputs[wanted], upstream)[0], full[wanted])


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_rows_outside_and_rows_that_see_nothing_are_zero(dtype):
    layout, rows, keys = LAYOUTS["more queries than keys"]
    out = ops.compressed_context_attention(*make_inputs(rows, keys, dtype=dtype), layout)
    assert (out[:2] == 0).all()
    assert (out[2:].abs().sum((1, 2)) > 0).all()
    layout, rows, keys = LAYOUTS["gaps"]
    out = ops.compressed_context_attention(*make_inputs(rows, keys, dtype=dtype), layout)
    assert (out[[0, 4, 7, 8]] == 0).all()


def test_a_context_computed_once_equals_the_context_repeated():
    context, branches = 6, [3, 2]
    query, key, value = make_inputs(11, 11)
    out = ops.compressed_context_attention(query, key, value, ContextLayout.branches([context], [branches]))
    start = context
    for length in branches:
        rows = [*range(context), *range(start, start + length)]
        alone = ops.compressed_context_attention(
            query[rows], key[rows], value[rows], ContextLayout.packed([context + length])
        )
        torch.testing.assert_close(alone[context:], out[start : start + length])
        start += length


def test_decode_equals_prefill():
    lengths = [5, 3]
    query, key, value = make_inputs(8, 8)
    prefill = ops.compressed_context_attention(query, key, value, ContextLayout.packed(lengths))
    cache_key, cache_value = key.new_full((2, 7, 2, 8), torch.nan), value.new_full((2, 7, 2, 8), torch.nan)
    for row, (start, length) in enumerate(((0, 5), (5, 3))):
        cache_key[row, :length] = key[start : start + length]
        cache_value[row, :length] = value[start : start + length]
    out = ops.compressed_context_attention(
        query[[4, 7]],
        cache_key.flatten(0, 1),
        cache_value.flatten(0, 1),
        ContextLayout.padded(lengths, 7, q_lengths=1),
    )
    torch.testing.assert_close(out, prefill[[4, 7]])


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_nan_stays_in_its_segment(dtype):
    query, key, value = make_inputs(11, 11, dtype=dtype)
    key[0] = torch.nan
    value[1] = torch.inf
    out = ops.compressed_context_attention(query, key, value, ContextLayout.packed([4, 7]))
    assert out[4:].isfinite().all()
    assert out[:4].isnan().any()


def test_sharp_scores_do_not_overflow():
    layout, rows, keys = LAYOUTS["branches"]
    inputs = [tensor * 5 for tensor in make_inputs(rows, keys, dtype=torch.float32)]
    assert_attention_within_budget(layout, inputs)
    inputs = [(tensor * 100).requires_grad_() for tensor in make_inputs(rows, keys, dtype=torch.float32)]
    out = ops.compressed_context_attention(*inputs, layout)
    assert all(tensor.isfinite().all() for tensor in (out, *torch.autograd.grad(out.sum(), inputs)))


def test_autocast_makes_dtypes_agree():
    layout, rows, keys = LAYOUTS["packed"]
    query, key, value = make_inputs(rows, keys, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.compressed_context_attention(query, key, value.bfloat16(), layout)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(3, 4)}, r"query must have 3 dimensions \[rows, heads, size\], got \[3, 4\]"),
        ({"key": torch.zeros(3, 2, 8, dtype=torch.float64)}, "key must be floating point like query"),
        ({"query": torch.zeros(3, 3, 8)}, r"query heads \(3\) must be a multiple of key heads \(2\)"),
        ({"query": torch.zeros(3, 4, 9)}, r"query head size \(9\) must be that of key \(8\)"),
        ({"value": torch.zeros(4, 2, 8)}, r"value rows and heads \[4, 2\] must be those of key \[3, 2\]"),
    ],
)
def test_errors(change, message):
    inputs = {
        "query": torch.zeros(3, 4, 8),
        "key": torch.zeros(3, 2, 8),
        "value": torch.zeros(3, 2, 8),
    } | change
    with pytest.raises(ValueError, match=message):
        ops.compressed_context_attention(**inputs, layout=ContextLayout.packed([3]))


def test_offsets_past_int32():
    vast, vast_layout, short, short_layout = vast_attention_arguments()
    out = ops.compressed_context_attention(*vast, vast_layout)
    torch.testing.assert_close(out, ops.compressed_context_attention(*short, short_layout))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0], [3], [0], [4], [[]]], r"kv_start \+ kv_len \(4\) of segment 0 .* rows \(3\)"),
        ([[1], [3], [0], [3], [[]]], r"q_start \+ q_len \(4\) of segment 0 .* rows \(3\)"),
        ([[0], [-1], [0], [3], [[]]], r"q_len \(-1\) of segment 0 must not be negative"),
        ([[0], [3], [0], [3], [[1]]], r"contexts \(1\) of segment 0 must be -1 or .* below 1"),
    ],
)
def test_native_kernels_read_nothing_outside(values, message):
    *lists, contexts = (torch.tensor(value, dtype=torch.int32) for value in values)
    layout = ContextLayout(*lists, contexts.reshape(1, -1))
    if not _library.native:
        pytest.skip("no native kernels")
    for requires_grad in (False, True):
        inputs = [tensor.requires_grad_(requires_grad) for tensor in make_inputs(3, 3, dtype=torch.float32)]
        with pytest.raises(RuntimeError, match=message):
            ops.compressed_context_attention(*inputs, layout)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_lesser_instruction_sets_pass_the_same_tests(isa):
    if "CLARA_FAST_CPU_ISA" in os.environ or not _library.native:
        pytest.skip("already under a chosen instruction set, or without native kernels")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "native", __file__]
    result = subprocess.run(
        command, env=os.environ | {"CLARA_FAST_CPU_ISA": isa}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-3000:]
