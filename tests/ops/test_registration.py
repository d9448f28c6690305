"""Every operator as a torch operator: opcheck, torch.compile without recompiling, and a light import."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
from ops_checks import DTYPES

from clara_fast import ops
from clara_fast.ops import ContextLayout, _library

OFFSETS = torch.tensor([0, 5, 8, 15], dtype=torch.int32)
LAYOUT = ContextLayout.branches([5, 4], [[3, 2], [1]])


def samples(dtype):
    """Arguments of the operators and of their backward operators, with each optional argument and without."""

    def rand(*shape, grad=True):
        return torch.randn(*shape, dtype=dtype, requires_grad=grad)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    valid = torch.tensor([[True] * 5, [True, False, True, False, False]])
    ours = torch.ops.clara_fast
    with torch.no_grad():
        scores, indices = ours.cosine_topk(rand(2, 6), rand(5, 6), 3, None)
        _, selected, cosines = ours.select_memory(rand(2, 6), rand(2, 5, 6), rand(2, 5, 2, 3), 3, 0.5, -math.inf, None)
        out, lse = ours.compressed_context_attention(
            rand(15, 4, 8), rand(15, 2, 8), rand(15, 2, 8), *LAYOUT.tensors(), 0.3
        )
    select = (rand(2, 6), rand(2, 5, 6), rand(2, 5, 2, 3))
    qkv = (rand(15, 4, 8), rand(15, 2, 8), rand(15, 2, 8))
    plain_qkv = tuple(tensor.detach() for tensor in qkv)
    return {
        "pool_memory": [(rand(15, 6), OFFSETS, 2, None, 1e-6), (rand(15, 6), OFFSETS, 2, rand(6), 1e-6)],
        "pool_memory_backward": [
            (
                rand(3, 2, 6, grad=False),
                torch.ones(3, dtype=wide),
                torch.ones(3, 6, dtype=wide),
                rand(15, 6, grad=False),
                OFFSETS,
                2,
                weight,
                1e-6,
            )
            for weight in (None, rand(6, grad=False))
        ],
        "cosine_topk": [
            (rand(2, 6), rand(5, 6), 3, None),
            (rand(2, 6), torch.ones(5, 6, dtype=torch.int8), 3, torch.ones(5)),
        ],
        "cosine_topk_backward": [
            (scores, rand(2, 6, grad=False), rand(5, 6, grad=False), indices, None),
            (scores, rand(2, 6, grad=False), torch.ones(5, 6, dtype=torch.int8), indices, torch.ones(5)),
        ],
        "select_memory": [(*select, 3, 0.5, -math.inf, mask) for mask in (None, valid)],
        "select_memory_backward": [
            (
                rand(2, 3, 2, 3, grad=False),
                cosines,
                *(tensor.detach() for tensor in select),
                selected,
                cosines,
                0.5,
                math.log(1e-8),
                mask,
            )
            for mask in (None, valid)
        ],
        "compressed_context_attention": [(*qkv, *LAYOUT.tensors(), 0.3)],
        "compressed_context_attention_backward": [
            (rand(15, 4, 8, grad=False), grad_lse, *plain_qkv, out, lse, *LAYOUT.tensors(), 0.3)
            for grad_lse in (None, lse)
        ],
    }


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("name", samples(torch.float32))
def test_opcheck(name, dtype):
    for arguments in samples(dtype)[name]:
        # rtol: gradients in low precision are compared between two runs of the same code, so they are equal.
        torch.library.opcheck(getattr(torch.ops.clara_fast, name).default, arguments, rtol=1e-3, atol=1e-3)


def test_outputs_do_not_alias_inputs():
    hidden = torch.randn(4, 3)
    memory, _ = ops.pool_memory(hidden, torch.tensor([0, 4], dtype=torch.int32), 4)
    memory.zero_()
    assert (hidden != 0).all()


def pool(rows):
    hidden = torch.randn(rows, 6, requires_grad=True)
    weight = torch.randn(6, requires_grad=True)
    offsets = torch.tensor([0, 4, rows], dtype=torch.int32)
    return lambda h, o, w: ops.pool_memory(h, o, 2, norm_weight=w), (hidden, offsets, weight), {0: [0]}


def topk(rows):
    return (
        lambda q, k: ops.cosine_topk(q, k, 3),
        (torch.randn(rows, 6, requires_grad=True), torch.randn(rows + 3, 6, requires_grad=True)),
        {0: [0], 1: [0]},
    )


def select(rows):
    inputs = (
        torch.randn(rows, 6, requires_grad=True),
        torch.randn(rows, rows + 2, 6, requires_grad=True),
        torch.randn(rows, rows + 2, 2, 3, requires_grad=True),
        torch.rand(rows, rows + 2) > 0.2,
    )
    dynamic = {0: [0], 1: [0, 1], 2: [0, 1], 3: [0, 1]}
    return lambda q, k, m, v: ops.select_memory(q, k, m, 3, valid=v), inputs, dynamic


def attention(rows):
    layout = ContextLayout.branches([rows], [[2] * (rows - 2)])
    total = rows + 2 * (rows - 2)
    qkv = [torch.randn(total, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    function = lambda q, k, v, *lists: ops.compressed_context_attention(q, k, v, ContextLayout(*lists))  # noqa: E731
    return function, (*qkv, *layout.tensors()), {position: [0] for position in range(8)}


@pytest.mark.parametrize("case", [pool, topk, select, attention])
def test_compiles_whole_and_once(case):
    torch._dynamo.reset()
    function, _, dynamic = case(6)
    compiled = torch.compile(lambda *x: function(*x), fullgraph=True, backend="aot_eager")
    for rows in (6, 7, 9):
        _, inputs, _ = case(rows)
        for position, dims in dynamic.items():
            for dim in dims:
                torch._dynamo.mark_dynamic(inputs[position], dim)
        with torch._dynamo.config.patch(error_on_recompile=rows != 6):
            results = compiled(*inputs)
        expected = function(*inputs)
        leaves = [tensor for tensor in inputs if tensor.requires_grad]
        for ours, theirs in zip(as_tuple(results), as_tuple(expected), strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        grads = [
            torch.autograd.grad([out.square().sum() for out in as_tuple(outs) if out.requires_grad], leaves)
            for outs in (results, expected)
        ]
        torch.testing.assert_close(*grads)


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def test_layout_is_made_inside_a_compiled_function():
    layout = ContextLayout.packed([3, 4])
    inputs = [torch.randn(7, 2, 4) for _ in range(3)]
    compiled = torch.compile(ops.compressed_context_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, layout), ops.compressed_context_attention(*inputs, layout))


def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); from clara_fast import ops; "
        "assert not torch.cuda.is_initialized(); "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "assert not new & {'triton', 'transformers', 'numpy.f2py', 'peft'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_missing_kernels_are_said_once_and_replaced(monkeypatch):
    monkeypatch.setattr(_library, "native", {})
    monkeypatch.setattr(_library, "_missing_warned", set())
    queries, keys = torch.randn(2, 4), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="has no kernel cosine_topk"):
        scores, _ = ops.cosine_topk(queries, keys, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(ops.cosine_topk(queries, keys, 3)[0], scores)
        ops.select_memory(queries, keys.expand(2, 5, 4), torch.randn(2, 5, 1, 4), 2)


class OnGpu:
    """Stands for a tensor on a GPU, where only its facts are asked."""

    def __init__(self, *shape, dtype=torch.float32):
        self.is_cuda, self.is_cpu, self.dtype, self.shape = True, False, dtype, shape
        self.device = torch.device("cuda", 3)

    def numel(self):
        return math.prod(self.shape)


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA library with an image for GPU 3 or not, as ``gpu["image"]`` says."""
    state = {"image": True, "asked": 0}

    def has_image(_):
        state["asked"] += 1
        return state["image"]

    kernels = {"cuda_has_image": has_image, "cosine_topk": lambda *_: None}
    monkeypatch.setattr(_library, "native_cuda", kernels)
    monkeypatch.setattr(_library, "_images", {})
    monkeypatch.setattr(_library, "_missing_warned", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (10, index))
    return state


@pytest.mark.parametrize(
    ("keys", "k", "native"),
    [
        (OnGpu(50, 8), 5, True),
        (OnGpu(50, 8, dtype=torch.int8), 5, True),
        (OnGpu(5000, 8, dtype=torch.bfloat16), 1024, True),
        (OnGpu(5000, 8), 1025, False),
        (OnGpu(2**32, 8), 5, False),
        (OnGpu(50, 8), 0, False),
        (OnGpu(50, 8, dtype=torch.float64), 5, False),
    ],
)
def test_cuda_kernel_is_called_for_what_it_takes(gpu, keys, k, native):
    kernel = ops.cosine_topk.__globals__["kernel_for"]
    row_scales, group_scales = torch.ones(50), torch.ones(50, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scales in (None, row_scales):
            assert (kernel(OnGpu(2, 8), keys, k, scales) is _library.native_cuda["cosine_topk"]) == native
        assert kernel(OnGpu(2, 8), keys, k, group_scales) is None
        assert kernel(OnGpu(2, 8, dtype=torch.float64), keys, k, None) is None
        assert kernel(OnGpu(0, 8), keys, k, None) is None


def test_a_gpu_without_an_image_is_said_once(gpu):
    gpu["image"] = False
    with pytest.warns(UserWarning, match=r"holds no code for GPU 3 \(sm_103\): its operators run in PyTorch there"):
        assert _library.cuda_kernel("cosine_topk", OnGpu(2, 4)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _library.cuda_kernel("cosine_topk", OnGpu(2, 4)) is None
    assert gpu["asked"] == 1


def test_a_missing_cuda_library_is_said_once(gpu, monkeypatch):
    monkeypatch.setattr(_library, "native_cuda", {})
    with pytest.warns(UserWarning, match="native CUDA library has no kernel cosine_topk"):
        assert _library.cuda_kernel("cosine_topk", OnGpu(2, 4)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _library.cuda_kernel("cosine_topk", OnGpu(2, 4)) is None
