"""The store as a list of documents with memories: adding, reading back, searching."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from standin import StandIn, names, texts

from clara_fast.store import Document, Hit, MemoryStore, StoreError, StoreMismatchError


def brute_force(memory, queries, k):
    """Scores and rows by float64 cosine, ties to the lower row."""
    keys = torch.nn.functional.normalize(memory.flatten(1).double(), dim=1)
    units = torch.nn.functional.normalize(queries.flatten(1).double(), dim=1)
    scores = (units[:, None] * keys).sum(-1)  # not @: its rounding depends on the row, so equal rows would not tie
    scores, rows = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k], rows[:, :k]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_added_is_read_back(tmp_path, model, dtype):
    memory = model.compress(texts(5))
    with MemoryStore.create(tmp_path / "s", model, dtype=dtype) as store:
        store.add(names(2), texts(2), memory[:2])
        store.add(
            names(3, 2),
            [{"title": "T", "text": t, "metadata": {"n": [1, None]}} for t in texts(3, 2)],
            memory[2:],
        )
        assert len(store) == 5
    store = MemoryStore.open(tmp_path / "s", model)
    assert store.memory([4, 0, 4]).equal(memory[[4, 0, 4]].to(getattr(torch, dtype)))
    assert store.documents(torch.tensor([3, 1])) == [
        Document(3, "doc-3", "T", texts(5)[3], {"n": [1, None]}),
        Document(1, "doc-1", "", texts(5)[1], {}),
    ]
    assert [document.id for document in store] == list(store.ids) == names(5)
    assert "doc-3" in store.ids
    assert store.ids["doc-3"] == 3
    assert "doc-5" not in store.ids


def test_search_equals_float64_brute_force(tmp_path):
    model = StandIn(num_memory=3, hidden_size=40)
    torch.manual_seed(0)
    memory, queries = torch.randn(300, 3, 40), torch.randn(17, 3, 40)
    with MemoryStore.create(tmp_path / "s", model) as store:
        for start, stop in ((0, 1), (1, 200), (200, 203), (203, 300)):
            store.add(names(stop - start, start), texts(stop - start, start), memory[start:stop])
        scores, rows = store.topk(queries, 25)
        expected, expected_rows = brute_force(memory.to(torch.bfloat16), queries, 25)
        torch.testing.assert_close(scores.double(), expected, rtol=0, atol=2e-6)
        assert rows.equal(expected_rows)
        hits = store.search(queries.flatten(1), 3)
    assert [[hit.row for hit in row] for row in hits] == rows[:, :3].tolist()
    first = hits[4][0]
    assert first == Hit(first.row, f"doc-{first.row}", scores[4, 0].item(), "", texts(300)[first.row], {})


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [7, 20, 33], [59, 1]])
def test_results_do_not_depend_on_shards(tmp_path, model, sizes):
    """Doubled documents too: where they tie, the lower row comes first."""
    documents = texts(30) * 2
    memory, queries = model.compress(documents), model.encode_queries(texts(8, 11))
    with MemoryStore.create(tmp_path / "s", model) as store:
        start = 0
        for size in sizes:
            part = slice(start, start + size)
            store.add(names(size, start), documents[part], memory[part])
            start += size
        scores, rows = store.topk(queries, 10)
        expected, expected_rows = brute_force(memory.to(torch.bfloat16), queries, 10)
        torch.testing.assert_close(scores.double(), expected, rtol=0, atol=2e-6)
        assert (rows % 30).equal(expected_rows % 30)  # an operator in plain PyTorch may round equal rows unequally
        tied = scores[:, 1:] == scores[:, :-1]
        assert bool((rows[:, 1:] > rows[:, :-1])[tied].all())
        assert store.topk(queries, 60)[1].sort().values.equal(torch.arange(60).expand(8, -1))


def test_zero_memories_score_zero(tmp_path, model):
    with MemoryStore.create(tmp_path / "s", model) as store:
        store.add(names(2), texts(2), torch.zeros(2, 4, 8))
        assert store.topk(torch.randn(1, 4, 8), 2)[0].tolist() == [[0.0, 0.0]]


def test_memory_files_are_ordinary_safetensors_and_aligned(filled):
    path = filled.path / "shards" / "00001.safetensors"
    assert load_file(path)["memory"].equal(filled.memory(range(4, 8)))
    assert int.from_bytes(path.read_bytes()[:8], "little") % 64 == 56
    assert filled._snapshot.shards[1].rows.memory.data_ptr() % 64 == 0


def test_an_open_reader_keeps_its_view_while_another_adds(filled, model):
    with MemoryStore.open(filled.path, model) as writer:
        writer.add(["new"], ["New text."], model.compress(["New text."]))
        assert len(writer) == 11
    assert len(filled) == 10
    assert filled.topk(model.encode_queries(["New text."]), 10)[1].max() == 9
    assert len(MemoryStore.open(filled.path)) == 11


def test_a_writer_sees_what_was_added_since_it_was_opened(filled, model):
    late = MemoryStore.open(filled.path, model)
    with MemoryStore.open(filled.path, model) as other:
        other.add(["new"], ["New text."], model.compress(["New text."]))
    with pytest.raises(ValueError, match="ids already in the store: 'new'"):
        late.add(["new"], ["New text."], model.compress(["New text."]))
    late.add(["newer"], ["Newer text."], model.compress(["Newer text."]))
    late.close()
    assert list(MemoryStore.open(filled.path).ids)[-2:] == ["new", "newer"]


def test_stats_and_verify(filled):
    stats = filled.stats()
    assert (stats["documents"], stats["shards"], stats["num_memory"], stats["hidden_size"]) == (10, 3, 4, 8)
    on_disk = sum(file.stat().st_size for file in (filled.path / "shards").iterdir())
    assert stats["memory_bytes"] + stats["document_bytes"] == on_disk
    assert stats["model"]["fingerprint"] == "stand-in-a"
    assert filled.verify()["documents"] == 10


def test_an_empty_store(tmp_path, model):
    with MemoryStore.create(tmp_path / "s", model) as store:
        store.add([], [], torch.empty(0, 4, 8))
        assert len(store) == 0
        assert list(store) == []
        assert store.stats()["shards"] == 0
        store.verify()
        with pytest.raises(ValueError, match="holds no documents to search"):
            store.search(torch.randn(1, 4, 8), 1)


def test_what_add_refuses(filled, model):
    good = model.compress(texts(2, 20))
    cases = [
        (names(2, 20), texts(1), good, r"documents \(1\) must be as many as ids \(2\)"),
        (names(2, 20), texts(2), good[:1], r"memory must be \[2, 4, 8\], not \[1, 4, 8\]"),
        (names(2, 20), texts(2), good[:, :3], r"memory must be \[2, 4, 8\], not \[2, 3, 8\]"),
        (["x", "x"], texts(2), good, r"ids\[1\] \('x'\) is given twice"),
        (["x", ""], texts(2), good, r"ids\[1\] is empty"),
        (["x", "doc-3"], texts(2), good, "ids already in the store: 'doc-3'"),
        (["x", "y"], ["text", " \n"], good, "document 'y' is empty"),
        (["x", "y"], ["text", {"text": "t", "url": "u"}], good, r"document 'y' has unknown keys \['url'\]"),
        (
            ["x", "y"],
            ["text", {"text": "t", "metadata": {"s": {1}}}],
            good,
            "metadata of document 'y' must be JSON",
        ),
    ]
    for ids, documents, memory, message in cases:
        with pytest.raises(ValueError, match=message):
            filled.add(ids, documents, memory)
    for ids, documents in (
        (["x", 7], texts(2)),
        (["x", "y"], ["text", 5]),
        (["x", "y"], ["text", {"title": "t"}]),
    ):
        with pytest.raises(TypeError):
            filled.add(ids, documents, good)
    assert len(filled) == 10
    assert filled.verify()["shards"] == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_memory_that_is_not_finite_is_refused(filled, model, bad):
    memory = model.compress(texts(3))
    memory[1, 2, 3] = bad
    with pytest.raises(ValueError, match="memory of 'doc-21' holds NaN or Inf"):
        filled.add(names(3, 20), texts(3), memory)


def test_a_memory_that_overflows_the_stores_dtype_is_refused(tmp_path, model):
    with (
        MemoryStore.create(tmp_path / "s", model, dtype="float16") as store,
        pytest.raises(ValueError, match="'doc-0' holds NaN or Inf in float16"),
    ):
        store.add(names(1), texts(1), torch.full((1, 4, 8), 1e5))


def test_what_search_refuses(filled):
    queries = torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match=r"k \(11\) must be at most the number of documents \(10\)"):
        filled.search(queries, 11)
    with pytest.raises(ValueError, match=r"k \(0\) must be at least 1"):
        filled.search(queries, 0)
    with pytest.raises(ValueError, match=r"queries must be \[B, 4, 8\] or \[B, 32\], not \[4, 8\]"):
        filled.search(queries[0], 1)
    with pytest.raises(ValueError, match="queries hold NaN or Inf"):
        filled.search(queries * float("nan"), 1)
    assert filled.search(queries[:0], 1) == []


def test_rows_out_of_range(filled):
    for rows in ([10], [-1]):
        with pytest.raises(IndexError, match=r"must be in \[0, 10\)"):
            filled.memory(rows)
        with pytest.raises(IndexError, match=r"must be in \[0, 10\)"):
            filled.documents(rows)
    assert filled.memory([]).shape == (0, 4, 8)
    assert filled.documents([]) == []


def test_a_store_refuses_a_model_that_did_not_write_it(filled):
    with pytest.raises(StoreMismatchError, match=r"written by another model \(fingerprint stand-in-a\)"):
        MemoryStore.open(filled.path, StandIn(name="b"))


def test_create_refuses_what_is_there(filled, model, tmp_path):
    with pytest.raises(FileExistsError, match="already holds a store"):
        MemoryStore.create(filled.path, model)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match=r"no store and not empty \('letter.txt'\)"):
        MemoryStore.create(tmp_path / "other", model)
    with pytest.raises(FileExistsError, match="is a file"):
        MemoryStore.create(tmp_path / "other" / "letter.txt", model)
    with pytest.raises(ValueError, match=r"dtype \('int3'\) must be one of"):
        MemoryStore.create(tmp_path / "s", model, dtype="int3")


def test_open_says_what_is_not_a_store(tmp_path):
    with pytest.raises(StoreError, match="is not a memory store"):
        MemoryStore.open(tmp_path / "nothing")
    with pytest.raises(StoreError, match="is not a memory store"):
        MemoryStore.open(tmp_path)


def test_opening_maps_and_does_not_copy(tmp_path):
    """Opening and one small read of a 64 MB store touch a small part of it."""
    import psutil

    model = StandIn(num_memory=16, hidden_size=512)
    with MemoryStore.create(tmp_path / "s", model) as store:
        memory = torch.randn(2048, 16, 512)
        for start in (0, 2048):
            store.add(names(2048, start), texts(2048, start), memory)
    del memory
    process = psutil.Process()
    before = process.memory_info().rss
    store = MemoryStore.open(tmp_path / "s", model)
    assert store.memory([5, 3000]).shape == (2, 16, 512)
    assert process.memory_info().rss - before < 16e6


def test_rows_are_integers_and_scores_float32(filled):
    for rows in ([True, False], [1.9], torch.tensor([True])):
        with pytest.raises(TypeError, match="rows must be integers"):
            filled.documents(rows)
    assert filled.documents([]) == []
    assert filled.topk(torch.randn(2, 4, 8, dtype=torch.float64), 3)[0].dtype == torch.float32
    with pytest.raises(ValueError, match="too large for float32"):
        filled.topk(torch.full((1, 4, 8), 1e300, dtype=torch.float64), 3)
