from types import SimpleNamespace

import pytest
import torch

import clara_fast
from clara_fast import ops

OPERATORS = ["pool_memory", "select_memory", "cosine_topk", "compressed_context_attention"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_runs_every_operator(dtype, training):
    seconds = clara_fast.warmup(
        hidden_size=24, num_memory=2, num_heads=3, num_key_heads=1, dtype=dtype, device="cpu", training=training
    )
    assert list(seconds) == OPERATORS
    assert all(value > 0 for value in seconds.values())


def test_takes_the_sizes_of_a_model(monkeypatch):
    lm = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size=24)
    lm.get_text_config = lambda: lm
    model = SimpleNamespace(
        lm=SimpleNamespace(config=lm),
        config=SimpleNamespace(hidden_size=24, num_memory=3),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    called = []

    def attention(query, key, value, layout):
        called.append((query.shape[1:], key.shape[1:], query.dtype))
        return query

    monkeypatch.setattr("clara_fast.ops._warmup.compressed_context_attention", attention)
    assert list(ops.warmup(model)) == OPERATORS
    assert set(called) == {((4, 8), (2, 8), torch.float32)}


def test_leaves_out_what_has_no_sizes():
    assert list(ops.warmup(num_heads=2, head_size=8, device="cpu")) == OPERATORS[3:]
    assert list(ops.warmup(hidden_size=8, device="cpu")) == OPERATORS[:3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to warm up"),
        ({"hidden_size": 0}, r"hidden_size \(0\) must be at least 1"),
        ({"num_heads": 3, "num_key_heads": 2}, r"num_heads \(3\) must be a multiple of num_key_heads \(2\)"),
        ({"num_heads": 3}, r"head_size \(0\) must be at least 1"),
        ({"hidden_size": 8, "top_k": 30}, r"top_k \(30\) must be .* at most the number of candidates \(20\)"),
    ],
)
def test_names_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        ops.warmup(device="cpu", **options)
