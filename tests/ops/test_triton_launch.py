"""How a launcher chooses a configuration, and what changes from batch to batch without a new compilation."""

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
from triton_compile import POINTERS  # noqa: E402
from triton_configurations import ARCHITECTURES, configuration, configurations  # noqa: E402

from clara_fast.ops import ContextLayout  # noqa: E402
from clara_fast.triton_kernels import (  # noqa: E402  # noqa: E402  # noqa: E402  # noqa: E402
    _attention_backward,
    _attention_blocks,
    _attention_forward,
    _launch,
    _pool_backward,
    _pool_forward,
    _select_backward,
    _select_forward,
    pool_memory,
    select_memory,
)
from clara_fast.triton_kernels import compressed_context_attention as attention  # noqa: E402

KERNEL_MODULES = (
    *(_attention_backward, _attention_forward, _pool_backward, _pool_forward),
    *(_select_backward, _select_forward),
)
CANDIDATES = [{"BLOCK": 16, "num_warps": 4}, {"BLOCK": 32, "num_warps": 8}]


class Kernel:
    """Records how it was launched."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.calls.append((grid, arguments, constants))


@pytest.fixture
def tuner(monkeypatch):
    """Stands for ``triton.autotune``: records what it is asked for."""
    asked = []

    def autotune(configs, key, cache_results=False):
        asked.append((configs, key, cache_results))
        return lambda kernel: kernel

    monkeypatch.setattr(triton, "autotune", autotune)
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    yield asked
    _launch.autotune(False)
    _launch._autotuner.cache_clear()


def test_launches_the_first_candidate(tuner):
    kernel = Kernel()
    _launch.launch(kernel, (3,), "x", candidates=CANDIDATES, SIZE=8)
    assert kernel.calls == [((3,), ("x",), {"SIZE": 8, "BLOCK": 16, "num_warps": 4})]
    assert not tuner


def test_autotuning_is_opt_in_and_cached_on_disk(tuner):
    kernel = Kernel()
    _launch.autotune()
    for _ in range(2):
        _launch.launch(kernel, (3,), "x", candidates=CANDIDATES, SIZE=8)
    assert [call[2] for call in kernel.calls] == [{"SIZE": 8}] * 2
    ((configs, key, cached),) = tuner
    assert [(config.kwargs, config.num_warps) for config in configs] == [({"BLOCK": 16}, 4), ({"BLOCK": 32}, 8)]
    assert key == ["SIZE"]
    assert cached
    # One configuration leaves nothing to try.
    _launch.launch(kernel, (3,), "x", candidates=CANDIDATES[:1], SIZE=8)
    assert kernel.calls[-1][2] == {"SIZE": 8, **CANDIDATES[0]}


@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_every_candidate_has_the_same_names(architecture, element_size, size):
    names = {"BLOCK_ROWS", "BLOCK_KEYS", "CHUNK", "num_warps", "num_stages"}
    chosen = architecture, element_size, size
    lists = [_attention_blocks.bwd_query_blocks(*chosen), _attention_blocks.bwd_key_blocks(*chosen)]
    lists += [_attention_blocks.fwd_blocks(*chosen, few, crowded) for few in (0, 1) for crowded in (0, 1)]
    for candidates in lists:
        assert all(blocks.keys() == names and min(blocks.values()) >= 0 for blocks in candidates)
        assert len({tuple(blocks.items()) for blocks in candidates}) == len(candidates)


def test_splits_fill_the_device_and_no_more(monkeypatch):
    monkeypatch.setattr(_launch, "num_processors", lambda device: 132)
    device = torch.device("cpu")
    assert _launch.num_splits(1, 1000, device) == 528
    assert _launch.num_splits(1, 16, device) == 16
    assert _launch.num_splits(528, 16, device) == 1
    assert _launch.num_splits(0, 0, device) == 1


@pytest.mark.parametrize("module", KERNEL_MODULES)
def test_counts_of_a_batch_compile_nothing_again(module):
    kernels = [value for name, value in vars(module).items() if name.endswith("_kernel")]
    assert kernels
    for kernel in kernels:
        counts = [
            parameter
            for parameter in kernel.params
            if parameter.name.startswith(("num_", "has_")) or parameter.name in ("k", "slot", "groups")
        ]
        assert counts
        assert all(parameter.do_not_specialize for parameter in counts), kernel


class Recorder:
    """Stands for a kernel: keeps the configuration that each launch would compile."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **options):
        named = dict(zip((parameter.name for parameter in self.kernel.params), arguments))
        element = self._element(named)
        for parameter in self.kernel.params:
            value = named.get(parameter.name)
            if parameter.name in named and value is None:
                options[parameter.name] = None
            elif isinstance(value, torch.Tensor):
                if parameter.name == "p_out" and options.get("DECODE"):
                    options["p_out"] = NAMES[value.dtype]
                expected = options.get(parameter.name) or POINTERS.get(parameter.name, element)
                assert NAMES[value.dtype] == expected, parameter.name
                assert parameter.do_not_specialize or value.data_ptr() % 16 == 0, parameter.name
            elif isinstance(value, int) and not parameter.do_not_specialize and value % 16:
                assert parameter.name == "size", (parameter.name, value)
                options["size"] = "any"
        self.found.add(str(configuration(self.kernel, element, **options)))

    @staticmethod
    def _element(named):
        """Of the first tensor whose type is not always the same."""
        free = [
            NAMES[value.dtype]
            for name, value in named.items()
            if isinstance(value, torch.Tensor) and name not in POINTERS
        ]
        return free[0] if free else "fp32"


NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@pytest.fixture(params=ARCHITECTURES)
def launched(request, monkeypatch):
    """Records what the launchers, as on one of the architectures, would run, other candidates included."""
    found = set()

    def launch(kernel, grid, *arguments, candidates, **constants):
        for candidate in candidates:
            kernel[grid](*arguments, **constants, **candidate)

    for module in (attention, pool_memory, select_memory):
        monkeypatch.setattr(module, "INTERPRETING", False)
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(kernel, found))
    monkeypatch.setattr(attention, "launch", launch)
    monkeypatch.setattr(attention, "architecture", lambda device: request.param)
    yield found
    assert found
    assert found <= configurations(request.param).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
class TestEveryLaunchIsInTheTable:
    @pytest.mark.parametrize("size", [(8, 5), (32, 32), (64, 64), (72, 72), (96, 128), (192, 128), (256, 256)])
    def test_attention(self, launched, dtype, size):
        # One row of one head, grouped rows, and enough for the largest blocks.
        for rows, heads, key_heads in ((2, 1, 1), (90, 6, 2), (600, 8, 8)):
            layout = ContextLayout.branches([rows - 1], [[1]]).tensors()
            query = torch.zeros(rows, heads, size[0], dtype=dtype)
            key = torch.zeros(key_heads, rows + 1, size[0], dtype=dtype)[:, 1:].transpose(0, 1)
            value = torch.zeros(rows * key_heads * size[1] + 1, dtype=dtype)[1:].view(rows, key_heads, size[1])
            out, lse = attention.compressed_context_attention_fwd(query, key, value, [*layout], 0.5)
            assert out.shape == (rows, heads, size[1])
            for grad_lse in (None, lse):
                grads = attention.compressed_context_attention_bwd(
                    out, grad_lse, query, key, value, out, lse, [*layout], 0.5
                )
                assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]

    @pytest.mark.parametrize("size", [5, 512, 576, 768, 1000, 2304, 3072, 4096, 5120, 8192])
    def test_pool_memory(self, launched, dtype, size):
        for rows in (6, 200):
            offsets = torch.tensor([0, rows], dtype=torch.int32)
            for weight in (None, torch.zeros(size, dtype=dtype)):
                hidden = torch.zeros(rows * size + 1, dtype=dtype)[1:].view(rows, size)
                memory, mse, difference = pool_memory.pool_memory_fwd(hidden, offsets, 2, weight, 1e-6)
                assert (memory.shape, difference.shape) == ((1, 2, size), (1, size))
                grad, grad_weight = pool_memory.pool_memory_bwd(
                    memory, mse, difference, hidden, offsets, 2, weight, 1e-6
                )
                assert grad.shape == hidden.shape
                assert grad_weight.shape == (0 if weight is None else size,)

    @pytest.mark.parametrize("count", [1, 20, 200, 4096])
    @pytest.mark.parametrize("size", [(3, 10), (32, 16), (48, 48)])
    def test_select_memory(self, launched, dtype, count, size):
        query, keys = torch.zeros(1, size[0], dtype=dtype), torch.zeros(1, count, size[0], dtype=dtype)
        memory = (
            keys.view(1, count, 2, -1) if size[0] == size[1] else torch.zeros(1, count, 2, size[1] // 2, dtype=dtype)
        )
        for k, valid in ((1, None), (min(count, 20), torch.ones(1, count, dtype=torch.bool))):
            selected, indices, scores = select_memory.select_memory_fwd(query, keys, memory, k, valid)
            select_memory.select_memory_bwd(selected, scores, query, keys, memory, indices, scores, 0.5, -1.0, valid)


def test_selection_gradient_keeps_nothing_of_candidates_times_slots(monkeypatch):
    """Twice the candidates and twice the slots take twice the workspace."""
    for name, kernel in list(vars(select_memory).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(select_memory, name, Recorder(kernel, set()))
    taken = []
    for count, k in ((512, 256), (1024, 512)):
        sizes = []
        real = torch.empty

        def empty(*shape, sizes=sizes, real=real, **options):
            made = real(*shape, **options)
            sizes.append(made.numel())
            return made

        monkeypatch.setattr(torch, "empty", empty)
        memory = torch.zeros(1, count, 1, 4096)
        arguments = (
            torch.zeros(1, k, 1, 4096),
            torch.zeros(1, count),
            torch.zeros(1, 16),
            torch.zeros(1, count, 16),
            memory,
        )
        indices, scores = torch.zeros(1, k, dtype=torch.int64), torch.zeros(1, count)
        select_memory.select_memory_bwd(*arguments, indices, scores, 0.5, -1.0, None)
        monkeypatch.setattr(torch, "empty", real)
        taken.append(sum(sizes))
    assert taken[0] > 512
    assert taken[1] <= 2.01 * taken[0]
