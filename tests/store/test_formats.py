"""What memories are stored as: what is read back, found, and what it takes on disk."""

from __future__ import annotations

import itertools

import pytest
import torch
from standin import StandIn, names, texts
from test_memory_store import brute_force

from clara_fast.store import MemoryStore
from clara_fast.store.formats import FORMATS, format_of

EIGHT_BITS = ["int8", "float8_e4m3fn"]


@pytest.fixture
def wide():
    return StandIn(num_memory=3, hidden_size=64)


def spread(count, m, width):
    """Memories whose tokens differ in size by orders of magnitude, so that one scale per document would not do."""
    torch.manual_seed(0)
    return torch.randn(count, m, width) * torch.exp(2 * torch.randn(count, m, 1))


def fill(path, model, memory, sizes, **options):
    with MemoryStore.create(path, model, **options) as store:
        start = 0
        for size in sizes:
            store.add(names(size, start), texts(size, start), memory[start : start + size])
            start += size
    return MemoryStore.open(path, model)


@pytest.mark.parametrize("dtype", FORMATS)
def test_search_equals_float64_brute_force_on_what_is_stored(tmp_path, wide, dtype):
    memory = spread(200, 3, 64)
    store = fill(tmp_path / "s", wide, memory, [60, 1, 139], dtype=dtype)
    stored = store.memory(range(200))
    assert stored.dtype == (torch.float32 if dtype in EIGHT_BITS else getattr(torch, dtype))
    queries = torch.randn(20, 3, 64)
    for part in (queries[:1], queries):
        scores, rows = store.topk(part, 30)
        expected, expected_rows = brute_force(stored, part, 30)
        torch.testing.assert_close(scores.double(), expected, rtol=0, atol=3e-6)
        assert rows.equal(expected_rows)


@pytest.mark.parametrize(("dtype", "step"), [("int8", 1 / 254), ("float8_e4m3fn", 1 / 16)])
def test_rounding_is_relative_to_each_memory_token(tmp_path, wide, dtype, step):
    memory = spread(50, 3, 64)
    memory[7, 1] = 0
    stored = fill(tmp_path / "s", wide, memory, [50], dtype=dtype).memory(range(50))
    largest = memory.abs().amax(-1, keepdim=True)
    assert ((stored - memory).abs() <= largest * step * 1.001).all()
    assert ((stored - memory).norm(dim=-1) > 0).sum() == 149
    assert stored[7, 1].eq(0).all()


def test_a_tiny_or_huge_token_keeps_finite_numbers():
    for name, size in itertools.product(EIGHT_BITS, (1e-45, 1e-38, 3e38)):
        form = format_of(name)
        decoded = form.decode(*form.encode(torch.tensor([[size, -size, 0.0]])))
        assert decoded.isfinite().all()
        assert (decoded - torch.tensor([[size, -size, 0.0]])).abs().max() <= max(1e-36, size / 16)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_not_finite_is_refused_in_8_bits_too(tmp_path, wide, dtype):
    memory = spread(3, 3, 64)
    memory[1, 0, 0] = torch.nan
    with MemoryStore.create(tmp_path / "s", wide, dtype=dtype) as store:
        with pytest.raises(ValueError, match=f"memory of 'doc-1' holds NaN or Inf in {dtype}"):
            store.add(names(3), texts(3), memory)
        assert len(store) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_pooled_keys(tmp_path, wide, dtype):
    memory, queries = spread(100, 3, 64), torch.randn(9, 3, 64)
    store = fill(tmp_path / "s", wide, memory, [40, 60], dtype=dtype, pooled_keys=True)
    form = format_of(dtype)
    pooled = form.decode(*form.encode(memory.mean(1)))
    scores, rows = store.topk(queries, 10, keys="pooled")
    expected, expected_rows = brute_force(pooled, queries.mean(1), 10)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=3e-6)
    assert rows.equal(expected_rows)
    assert not rows.equal(store.topk(queries, 10)[1])
    assert [hit.row for hit in store.search(queries, 10, keys="pooled")[3]] == rows[3].tolist()


def test_pooled_keys_must_be_there(tmp_path, wide):
    store = fill(tmp_path / "s", wide, spread(3, 3, 64), [3])
    with pytest.raises(ValueError, match=r"keys \('pooled'\): .* keeps none; .* --pooled-keys --out NEW"):
        store.topk(torch.randn(1, 3, 64), 1, keys="pooled")
    with pytest.raises(ValueError, match=r"keys \('mean'\) must be one of 'memory', 'pooled'"):
        store.topk(torch.randn(1, 3, 64), 1, keys="mean")


def test_bytes_per_document(tmp_path):
    model = StandIn(num_memory=16, hidden_size=512)
    memory = spread(256, 16, 512)
    each = {
        dtype: fill(tmp_path / dtype, model, memory, [256], dtype=dtype).stats()["bytes_per_document"]
        for dtype in FORMATS
    }
    # Numbers, scales, the digest of the id; some bytes of text.
    for dtype, numbers in {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}.items():
        exact = 16 * 512 * numbers + (64 if numbers == 1 else 0) + 16
        assert exact < each[dtype] < exact + 100


@pytest.mark.parametrize(("source", "target"), [("float32", "int8"), ("int8", "float32"), ("bfloat16", "bfloat16")])
def test_convert(tmp_path, wide, source, target):
    memory = spread(70, 3, 64)
    store = fill(tmp_path / "s", wide, memory, [30, 40], dtype=source)
    with store:
        store.delete(["doc-3", "doc-35"])
    copy = store.convert(tmp_path / "t", dtype=target, pooled_keys=True, shard_documents=25)
    copy.verify()
    assert copy.stats()["shards"] == 3
    assert (copy.stats()["dtype"], copy.stats()["pooled_keys"], copy.stats()["deleted"]) == (target, True, 0)
    assert list(copy) == list(store)
    form = format_of(target)
    assert copy.memory(range(68)).equal(form.decode(*form.encode(store.memory(range(68)))))
    copy.check_model(wide)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "t"]


def test_convert_refuses_what_does_not_fit_and_leaves_nothing(tmp_path, wide):
    memory = spread(4, 3, 64)
    memory[2] = 1e6
    store = fill(tmp_path / "s", wide, memory, [4], dtype="float32")
    with pytest.raises(ValueError, match="too large for dtype 'float16'"):
        store.convert(tmp_path / "t", dtype="float16")
    with pytest.raises(FileExistsError, match="already exists"):
        store.convert(tmp_path / "s", dtype="int8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]
