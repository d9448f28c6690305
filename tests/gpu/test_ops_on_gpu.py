"""Every operator on a GPU: right in all dtypes, on any stream and device, never waiting for the host, in graphs."""

import warnings

import citizenship
import pytest
import torch
from citizenship import MAKERS, make, values_and_gradients
from ops_checks import DTYPES, vast_attention_arguments

from clara_fast import ops
from clara_fast.ops import ContextLayout, reference

every_op = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture(autouse=True)
def exact_products():
    """float32 products are float32 in what the operators are compared with."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@every_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_budget(name, dtype):
    citizenship.check_error_budget(name, "cuda", dtype)


@every_op
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_strided_inputs_and_gradients(name, dtype):
    citizenship.check_strides(name, "cuda", dtype)


@every_op
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_reruns_are_bit_identical(name, dtype):
    citizenship.check_rerun(name, "cuda", dtype)


@every_op
def test_float64_is_the_cpu_s(name):
    """No kernel: plain PyTorch, under deterministic algorithms."""
    case = make(name, "cpu", torch.float64)
    expected = values_and_gradients(case.function, case.inputs)
    on_gpu = make(name, "cuda", torch.float64)
    actual = values_and_gradients(on_gpu.function, [tensor.cuda() for tensor in case.inputs])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=1e-9)


@every_op
def test_no_kernel_is_missing(name):
    """On a GPU that the package has kernels for, nothing may fall back to plain PyTorch unsaid."""
    case = make(name, "cuda", torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values_and_gradients(case.function, case.inputs)


@every_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_host_never_waits(name, dtype):
    case = make(name, "cuda", dtype)
    leaves = [tensor.requires_grad_() for tensor in case.inputs]

    def step():
        outputs = case.function(*leaves)
        used = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out.requires_grad]
        return torch.autograd.grad(used, leaves, [torch.ones_like(out) for out in used])

    step()  # compiles and tunes
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        with torch.inference_mode():
            case.function(*case.inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
def test_another_stream(name):
    """The operator waits for what its own stream does before, and for nothing else."""
    case = make(name, "cuda", torch.float32)
    expected = values_and_gradients(case.function, case.inputs)
    late = [torch.full_like(tensor, torch.nan) for tensor in case.inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, case.inputs, strict=True):
            target.copy_(source)
        actual = values_and_gradients(case.function, late)
    stream.synchronize()
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@every_op
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device(name):
    expected = make(name, "cuda:0", torch.float32)
    case = make(name, "cuda:1", torch.float32)
    case.inputs = [tensor.to("cuda:1") for tensor in expected.inputs]
    assert torch.cuda.current_device() == 0
    actual = values_and_gradients(case.function, case.inputs)
    assert {tensor.device for tensor in actual} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
    for ours, theirs in zip(actual, values_and_gradients(expected.function, expected.inputs), strict=True):
        assert torch.equal(ours.cpu(), theirs.cpu())


@every_op
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True])
def test_captured_in_a_graph(name, dtype, backward):
    """Replayed on new contents of the same tensors, it gives what it gives without a graph."""
    case = make(name, "cuda", dtype)
    leaves = [tensor.clone().requires_grad_(backward) for tensor in case.inputs]

    def step():
        outputs = case.function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        used = [out for out in outputs if out.requires_grad]
        grads = torch.autograd.grad(used, leaves, [torch.ones_like(out) for out in used]) if backward else ()
        return [*outputs, *grads]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.set_grad_enabled(backward):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.set_grad_enabled(backward), torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for leaf, source in zip(leaves, case.inputs, strict=True):
                leaf.copy_(source.flip(0) * seed)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        with torch.set_grad_enabled(backward):
            expected = step()
        for ours, theirs in zip(replayed, expected, strict=True):
            assert torch.equal(ours, theirs)


@every_op
def test_compiled(name):
    citizenship.check_compiled(name, "cuda", torch.float32, "inductor")


@every_op
def test_compiled_for_graphs(name):
    """``reduce-overhead`` replays CUDA graphs: a host synchronisation or a stale pointer would show."""
    case = make(name, "cuda", torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(case.function, fullgraph=True, mode="reduce-overhead")
    expected = case.function(*case.inputs)
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            actual = compiled(*case.inputs)
    for ours, theirs in zip(_tuple(actual), _tuple(expected), strict=True):
        torch.testing.assert_close(ours, theirs)


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


@every_op
def test_autocast(name):
    case = make(name, "cuda", torch.float32)
    leaves = [tensor.requires_grad_() for tensor in case.inputs]
    with torch.autocast("cuda", torch.bfloat16):
        out = _tuple(case.function(leaves[0].bfloat16(), *leaves[1:]))[0]
    grads = torch.autograd.grad(out.float().sum(), leaves, allow_unused=True)
    assert all(grad is None or grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("batch", [1, 5, 130])
@pytest.mark.parametrize("k", [1, 10, 1000])
def test_quantised_search_finds_what_float64_finds(dtype, batch, k):
    values = torch.randn(5000, 576, device="cuda")
    scales = values.abs().amax(1) / (127 if dtype == torch.int8 else 448)
    keys = values / scales[:, None]
    keys = (keys.round() if dtype == torch.int8 else keys).to(dtype)
    queries = torch.randn(batch, 576, device="cuda")
    scores, indices = ops.cosine_topk(queries, keys, k, key_scales=scales)
    exact = reference.cosine(queries.double(), keys.double().expand(batch, -1, -1))
    # int8 rounds the queries; both rank by what they computed.
    allowed = 0.02 if dtype == torch.int8 else 1e-5
    assert (scores - exact.gather(1, indices)).abs().max() <= allowed
    assert (scores - exact.topk(k).values).abs().max() <= allowed
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 9, 200])
def test_search_ties_nan_and_many_blocks(dtype, batch):
    row = torch.randn(1, 64, device="cuda").to(dtype)
    keys = row.repeat(40_000, 1)
    keys[[0, 777, 39_999]] = torch.nan
    scores, indices = ops.cosine_topk(row.repeat(batch, 1), keys, 100)
    assert indices.tolist() == [list(range(1, 101))] * batch
    assert scores.isfinite().all()


def test_keys_past_int32():
    rows = 2**31 // 64 + 100
    if torch.cuda.get_device_properties(0).total_memory < 3 * rows * 64:
        pytest.skip("needs more memory")
    keys = torch.zeros(rows, 64, dtype=torch.int8, device="cuda")
    keys[-1] = 1
    scores, indices = ops.cosine_topk(
        torch.ones(1, 64, device="cuda"), keys, 1, key_scales=torch.ones(rows, device="cuda")
    )
    assert indices.tolist() == [[rows - 1]]
    assert scores.item() == pytest.approx(1, abs=1e-2)


def test_attention_rows_past_int32():
    if torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("needs more memory")
    vast, vast_layout, short, short_layout = vast_attention_arguments()
    key = torch.zeros(vast[1].shape, dtype=torch.float16, device="cuda")
    key[-7:] = vast[1][-7:].cuda()
    out = ops.compressed_context_attention(vast[0].cuda(), key, key, vast_layout.to("cuda"))
    expected = ops.compressed_context_attention(*(x.cuda() for x in short), short_layout.to("cuda"))
    torch.testing.assert_close(out, expected)


def test_pool_rows_past_int32():
    if torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("needs more memory")
    rows, size = 2**19 + 9, 4096
    hidden = torch.zeros(rows, size, dtype=torch.float16, device="cuda")
    hidden[-7:] = torch.randn(7, size)
    offsets = torch.tensor([rows - 7, rows], dtype=torch.int32, device="cuda")
    memory, mse = ops.pool_memory(hidden, offsets, 2)
    assert torch.equal(memory[0], hidden[-2:])
    expected = reference.pool_memory(hidden[-7:].double(), torch.tensor([0, 7], dtype=torch.int32), 2)[1]
    torch.testing.assert_close(mse.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("lengths", [[1, 2] * 150, [2000, 3, 700], [0, 5, 0], []])
@pytest.mark.parametrize("size", [16, 64, 128, 256])
def test_attention_sizes(lengths, size):
    """Error against float64 at most twice that of eager in bfloat16, for every head size in use."""
    layout = ContextLayout.packed(lengths, device="cuda")
    inputs = [torch.randn(sum(lengths), heads, size, device="cuda").bfloat16() for heads in (4, 2, 2)]
    citizenship.assert_within_budget(
        lambda *x: ops.compressed_context_attention(*x, layout),
        lambda *x: reference.compressed_context_attention(*x, layout),
        inputs,
    )


def test_wrong_device_is_one_clear_error():
    with pytest.raises(ValueError, match=r"keys must be on the device of queries \(cuda:0\), is on cpu"):
        ops.cosine_topk(torch.zeros(1, 8, device="cuda"), torch.zeros(2, 8), 1)
    inputs = [torch.zeros(3, 2, 16, device="cuda")] * 3
    with pytest.raises(ValueError, match=r"layout must be on the device of query \(cuda:0\), is on cpu"):
        ops.compressed_context_attention(*inputs, ContextLayout.packed([3]))


@pytest.mark.parametrize("name", ["llama", "mistral, short window", "qwen3"])
def test_transformers_on_a_gpu(name):
    """Packed sequences through the op and separate ones through sdpa, in float32 and generation."""
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    from tests.modeling.test_attention import CONFIGS, LENGTHS, SHAPE, VOCABULARY, flattened, padded

    config_class, options = CONFIGS[name]
    config = config_class(
        vocab_size=VOCABULARY, initializer_range=0.3, pad_token_id=0, eos_token_id=None, **SHAPE, **options
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="clara_fast").cuda().eval()
    ids = [torch.randint(2, VOCABULARY, (length,)) for length in LENGTHS]
    batch = {key: value.cuda() for key, value in flattened(ids).items()}
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0]
        left = {key: value.cuda() for key, value in padded(ids, "left").items() if key != "position_ids"}
        tokens = model.generate(**left, max_new_tokens=8, do_sample=False)
        model.set_attn_implementation("sdpa")
        separate = torch.cat([model(row[None].cuda()).logits[0] for row in ids])
        assert torch.equal(tokens, model.generate(**left, max_new_tokens=8, do_sample=False))
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-4)
