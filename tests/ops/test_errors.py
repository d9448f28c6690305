"""Bad input, as users make it: one clear error that names the argument, the rule and the value."""

import math

import pytest
import torch

from clara_fast import ops
from clara_fast.ops import ContextLayout

zeros = torch.zeros


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def pool(**change):
    return ops.pool_memory(**({"hidden": zeros(6, 4), "offsets": ints(0, 3, 6), "num_memory": 2} | change))


def search(**change):
    return ops.cosine_topk(**({"queries": zeros(2, 4), "keys": zeros(5, 4), "k": 3} | change))


def select(**change):
    given = {"query": zeros(2, 4), "keys": zeros(2, 5, 4), "memory": zeros(2, 5, 1, 4), "k": 2}
    return ops.select_memory(**(given | change))


def attend(**change):
    states = {"query": zeros(5, 4, 8), "key": zeros(5, 2, 8), "value": zeros(5, 2, 8)}
    return ops.compressed_context_attention(**(states | {"layout": ContextLayout.packed([2, 3])} | change))


META = {"device": "meta"}


@pytest.mark.parametrize(
    ("call", "change", "error", "message"),
    [
        (pool, {"hidden": [[1.0]]}, TypeError, "hidden must be a Tensor, got list"),
        (pool, {"offsets": [0, 6]}, TypeError, "offsets must be a Tensor, got list"),
        (pool, {"offsets": zeros(3)}, ValueError, r"offsets must be int32 \[S \+ 1\], got torch.float32 \[3\]"),
        (pool, {"offsets": ints()}, ValueError, r"offsets must be int32 \[S \+ 1\], got torch.int32 \[0\]"),
        (pool, {"offsets": ints(0, 6, 3)}, ValueError, r"offsets give segment 1 -3 rows, .* num_memory \(2\)"),
        (pool, {"offsets": ints(-1, 6)}, ValueError, r"offsets \(-1 .. 6\) must lie within the rows of hidden \(6\)"),
        (pool, {"offsets": zeros(3, dtype=torch.int32, **META)}, ValueError, r"device of hidden \(cpu\), is on meta"),
        (pool, {"num_memory": 2.0}, TypeError, r"num_memory must be an integer, got 2.0"),
        (pool, {"num_memory": -1}, ValueError, r"num_memory \(-1\) must be at least 1"),
        (pool, {"hidden": zeros(6, 4, dtype=torch.complex64)}, ValueError, "hidden must be floating point"),
        (
            pool,
            {"norm_weight": zeros(4).int()},
            ValueError,
            r"norm_weight must be floating point \[D\] = \[4\], got .*32",
        ),
        (pool, {"norm_weight": zeros(4, **META)}, ValueError, r"norm_weight must be on the device of hidden \(cpu\)"),
        (pool, {"norm_weight": zeros(4), "norm_eps": math.nan}, ValueError, r"norm_eps \(nan\) must be finite and not"),
        (
            pool,
            {"norm_weight": zeros(4), "norm_eps": -1.0},
            ValueError,
            r"norm_eps \(-1.0\) must be finite and not neg",
        ),
        (search, {"queries": [1.0]}, TypeError, "queries must be a Tensor, got list"),
        (
            search,
            {"queries": zeros(4)},
            ValueError,
            r"queries must be floating point \[B, R\], got torch.float32 \[4\]",
        ),
        (
            search,
            {"queries": zeros(2, 4).to(torch.float8_e4m3fn)},
            ValueError,
            "queries must be floating point .*float8",
        ),
        (search, {"keys": zeros(5, 4).to(torch.float8_e5m2)}, ValueError, "or float8_e4m3fn, got torch.float8_e5m2"),
        (
            search,
            {"keys": zeros(5, 4, **META)},
            ValueError,
            r"keys must be on the device of queries \(cpu\), is on meta",
        ),
        (search, {"k": 3.0}, TypeError, "k must be an integer, got 3.0"),
        (search, {"k": 6}, ValueError, r"k \(6\) must be at most the number of keys \(5\)"),
        (
            search,
            {"keys": zeros(5, 4).char(), "key_scales": zeros(5).int()},
            ValueError,
            r"key_scales must be floating point \[N\] = \[5\] for torch.int8 keys, or .* got torch.int32 \[5\]",
        ),
        (
            search,
            {"keys": zeros(5, 4).char(), "key_scales": zeros(5, **META)},
            ValueError,
            r"key_scales must be on the device of queries \(cpu\), is on meta",
        ),
        (select, {"query": [1.0]}, TypeError, "query must be a Tensor, got list"),
        (select, {"valid": [[True] * 5] * 2}, TypeError, "valid must be a Tensor, got list"),
        (select, {"memory": zeros(2, 5, 1, 4, **META)}, ValueError, r"memory must be on the device of query \(cpu\)"),
        (select, {"keys": zeros(3, 5, 4)}, ValueError, r"B = 2 and R = 4, got \[3, 5, 4\]"),
        (select, {"k": 2.0}, TypeError, "k must be an integer, got 2.0"),
        (select, {"temperature": math.nan}, ValueError, r"temperature \(nan\) must be positive and finite"),
        (select, {"temperature": math.inf}, ValueError, r"temperature \(inf\) must be positive and finite"),
        (select, {"taken_logit": math.nan}, ValueError, r"taken_logit \(nan\) must not be positive"),
        (attend, {"layout": [2, 3]}, TypeError, "layout must be a ContextLayout, got list"),
        (attend, {"query": None}, TypeError, "query must be a Tensor, got NoneType"),
        (
            attend,
            {"key": zeros(5, 2, 8, **META)},
            ValueError,
            r"key must be on the device of query \(cpu\), is on meta",
        ),
        (
            attend,
            {"layout": ContextLayout.packed([5]).to("meta")},
            ValueError,
            r"layout must be on the device of query",
        ),
        (attend, {"query": zeros(5, 4, 0), "key": zeros(5, 2, 0)}, ValueError, r"head size \(0\) must be at least 1"),
        (attend, {"scale": math.nan}, ValueError, r"scale \(nan\) must be finite"),
    ],
)
def test_operators(call, change, error, message):
    with pytest.raises(error, match=message) as caught:
        call(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_offsets_are_checked_wherever_the_op_runs(dtype):
    """Also from the torch op itself and from compiled code, which skip the Python checks."""
    hidden, offsets = zeros(6, 4, dtype=dtype), ints(0, 3, 7)
    with pytest.raises(ValueError, match=r"offsets \(0 .. 7\) must lie within the rows of hidden \(6\)"):
        torch.ops.clara_fast.pool_memory(hidden, offsets, 2, None, 1e-6)
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, o: ops.pool_memory(h, o, 2), backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"offsets \(0 .. 7\) must lie within"):
        compiled(hidden, offsets)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ContextLayout.packed([2, -1]), ValueError, r"q_len \(-1\) of segment 1 must not be negative"),
        (lambda: ContextLayout.packed([2.5]), TypeError, "lengths must be a list of integers .*, got 2.5"),
        (
            lambda: ContextLayout.packed(torch.tensor([2.0])),
            TypeError,
            "lengths must be a list of integers .*, got 2.0",
        ),
        (lambda: ContextLayout.packed(ints(2)[None]), TypeError, r"lengths must be a list of integers .*, got \[2\]"),
        (
            lambda: ContextLayout.packed(offsets=[0, 5, 3]),
            ValueError,
            r"q_len \(-2\) of segment 1 must not be negative",
        ),
        (lambda: ContextLayout.packed(offsets=[]), ValueError, "offsets must hold at least 1 number, got none"),
        (lambda: ContextLayout.packed([2**30] * 3), ValueError, r"q_len \(2147483648\) of segment 1 must be at most"),
        (lambda: ContextLayout([0], [1], [0], [1], [[]]), TypeError, "q_start must be an int32 tensor, got list"),
        (lambda: ContextLayout.from_lists([0], [1], [0], [1], []), ValueError, r"contexts \(0\) must hold one list"),
        (lambda: ContextLayout.branches([1], [1]), TypeError, "branch_lengths"),
        (
            lambda: ContextLayout.blocks([[1]], [1, 2]),
            ValueError,
            r"block_lengths \(1\) must hold one list for each of",
        ),
        (
            lambda: ContextLayout.padded([5], 3),
            ValueError,
            r"kv_lengths \(5\) of sample 0 must be at most kv_stride \(3\)",
        ),
        (lambda: ContextLayout.padded([5], 8, q_lengths=4, q_stride=2), ValueError, r"at most q_stride \(2\)"),
        (lambda: ContextLayout.padded([5], 8, kv_padding=[1, 2]), ValueError, r"kv_padding \(2\) must hold one number"),
        (
            lambda: ContextLayout(ints(0), ints(1).to("meta"), ints(0), ints(1), ints(0)[:, None]),
            ValueError,
            r"must be on the device of q_len \(meta\), is on cpu",
        ),
    ],
)
def test_layouts(make, error, message):
    with pytest.raises(error, match=message):
        make()
