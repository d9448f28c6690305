"""How a launcher chooses a configuration, and what changes from batch to batch without a new compilation."""

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402

from clara_fast.triton_kernels import (  # noqa: E402
    _attention_backward,
    _attention_blocks,
    _attention_forward,
    _launch,
    pool_memory,
    select_memory,
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
@pytest.mark.parametrize("widest", [16, 64, 128, 256])
def test_every_candidate_has_the_same_names(architecture, element_size, widest):
    names = {"BLOCK_ROWS", "BLOCK_KEYS", "num_warps", "num_stages"}
    chosen = architecture, element_size, widest
    lists = [_attention_blocks.bwd_query_blocks(*chosen), _attention_blocks.bwd_key_blocks(*chosen)]
    lists += [_attention_blocks.fwd_blocks(*chosen, few, crowded) for few in (0, 1) for crowded in (0, 1)]
    for candidates in lists:
        assert all(blocks.keys() == names and min(blocks.values()) >= 1 for blocks in candidates)
        assert len({tuple(blocks.items()) for blocks in candidates}) == len(candidates)


def test_splits_fill_the_device_and_no_more(monkeypatch):
    monkeypatch.setattr(_launch, "num_processors", lambda device: 132)
    device = torch.device("cpu")
    assert _launch.num_splits(1, 1000, device) == 528
    assert _launch.num_splits(1, 16, device) == 16
    assert _launch.num_splits(528, 16, device) == 1
    assert _launch.num_splits(0, 0, device) == 1


@pytest.mark.parametrize("module", [_attention_backward, _attention_forward, pool_memory, select_memory])
def test_counts_of_a_batch_compile_nothing_again(module):
    kernels = [value for name, value in vars(module).items() if name.endswith("_kernel")]
    assert kernels
    for kernel in kernels:
        counts = [
            parameter for parameter in kernel.params if parameter.name.startswith("num_") or parameter.name == "k"
        ]
        assert counts
        assert all(parameter.do_not_specialize for parameter in counts), kernel
