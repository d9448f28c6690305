"""Two-stage search: what an index proposes, exact scores decide; and which indexes are refused."""

from __future__ import annotations

import json

import pytest
import torch
from standin import StandIn, names, texts

from clara_fast.store import MemoryStore, StoreDamagedError, StoreError

faiss = pytest.importorskip("faiss", reason="needs the extra 'faiss'")


def described(count: int, start: int) -> list[dict]:
    """Texts with a number in [0, 100) each, which has nothing to do with the topic."""
    return [
        {"text": text, "metadata": {"part": number * 37 % 101 % 100}}
        for number, text in enumerate(texts(count, start), start)
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """600 documents around 30 topics, so that there are neighbours to be found; the last 20 repeat the first."""
    torch.manual_seed(0)
    model = StandIn(num_memory=4, hidden_size=32)
    topics = torch.randn(30, 1, 32)
    memory = topics[torch.arange(600) % 30] + 0.7 * torch.randn(600, 4, 32)
    memory[580:] = memory[:20]
    with MemoryStore.create(tmp_path_factory.mktemp("stores") / "s", model) as store:
        for start in (0, 250, 500):
            part = memory[start : start + 250]
            store.add(names(len(part), start), described(len(part), start), part)
    return store


@pytest.fixture(scope="module")
def queries(store):
    torch.manual_seed(1)
    return store.memory(range(0, 600, 25)).float() + 0.5 * torch.randn(24, 4, 32)


@pytest.mark.parametrize("kind", ["IVF", "HNSW", "IVF8,SQ8", "Flat", "PCA16,IVF4,Flat"])
def test_all_candidates_give_exact_search(store, queries, kind):
    index = store.build_index(kind)
    again = store.open_index(effort=None if kind == "Flat" else 600)
    assert again.facts == index.facts
    expected = store.topk(queries, 20)
    scores, rows = store.topk(queries, 20, index=again, candidates=600)
    if kind == "HNSW":  # a graph may leave out a node that nothing links to
        assert (rows == expected[1]).float().mean() > 0.95
    else:
        assert rows.equal(expected[1])  # ties too: documents 580 to 599 are 0 to 19
        torch.testing.assert_close(scores, expected[0], rtol=0, atol=1e-6)
    assert (scores[:, 1:] <= scores[:, :-1]).all()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_eight_bit_memories(tmp_path, store, queries, dtype):
    model = StandIn(num_memory=4, hidden_size=32)
    with MemoryStore.create(tmp_path / "s", model, dtype=dtype) as small:
        small.add(names(100), texts(100), store.memory(range(100)))
        index = small.build_index("Flat")
        scores, rows = small.topk(queries, 9, index=index, candidates=100)
        expected = small.topk(queries, 9)
    assert rows.equal(expected[1])
    torch.testing.assert_close(scores, expected[0], rtol=0, atol=1e-6)


def test_few_candidates_find_most(store, queries):
    index = store.build_index("IVF").with_effort(4)
    expected = store.topk(queries, 5)[1]
    recall = []
    for candidates in (5, 40):
        found = store.topk(queries, 5, index=index, candidates=candidates)[1]
        recall.append(sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist())) / expected.numel())
    assert recall[0] < recall[1]
    assert recall[1] > 0.9
    hits = store.search(queries[:2], 5, index=index, candidates=40)
    assert [hit.row for hit in hits[0]] == store.topk(queries[:1], 5, index=index, candidates=40)[1][0].tolist()


def test_where_the_index_finds_too_few_all_are_compared(store, queries):
    index = store.build_index("IVF15,Flat").with_effort(1)
    assert store.topk(queries, 100, index=index)[1].equal(store.topk(queries, 100)[1])


@pytest.mark.parametrize("kind", ["IVF15,Flat", "HNSW", "Flat", "IVF8,SQ8", "PCA16,IVF4,Flat", "PCA16,HNSW16"])
@pytest.mark.parametrize("below", [1, 8, 60])
def test_filters(store, queries, kind, below):
    """6, 48 and 360 of the documents fulfil the condition: fewer than are looked for, than are proposed, and more."""
    index, where = store.build_index(kind), {"part": {"<": below}}
    expected = store.topk(queries, 20, where=where)
    scores, rows = store.topk(queries, 20, index=index, candidates=100, where=where)
    assert rows.shape == expected[1].shape
    assert {document.metadata["part"] for document in store.documents(rows.flatten().unique())} <= set(range(below))
    if below < 60:
        assert rows.equal(expected[1])
        torch.testing.assert_close(scores, expected[0], rtol=0, atol=1e-6)
    else:
        found = (rows[:, :5, None] == expected[1][:, None, :5]).any(1).float().mean()
        assert found > (0.5 if kind.startswith("IVF15") else 0.9)  # one list in fifteen is visited, or two


def test_the_fewer_a_filter_leaves_the_more_is_visited(store, queries):
    """As many lists as hold as many documents that count: one of 15 would hold 3 of these 48."""
    index, where = store.build_index("IVF15,Flat").with_effort(1), {"part": {"<": 8}}
    expected = store.topk(queries, 3, where=where)[1]
    found = store.topk(queries, 3, index=index, candidates=20, where=where)[1]
    assert (found[:, :, None] == expected[:, None, :]).any(1).float().mean() > 0.9


def test_filters_after_deletions(tmp_path, model):
    """The index numbers the documents that are there, a filter's masks the rows of the shards."""
    with MemoryStore.create(tmp_path / "s", model) as store:
        for start in (0, 150):
            store.add(names(150, start), described(150, start), model.compress(texts(150, start)))
        store.delete(names(40, 20) + names(30, 150))
        index, where = store.build_index("Flat"), {"part": {"<": 50}}
        queries = model.encode_queries(texts(8, 5))
        expected = store.topk(queries, 4, where=where)
        count = sum(document.metadata["part"] < 50 for document in store)
        found = store.topk(queries, 4, index=index, candidates=count - 1, where=where)
        assert (found[1][:, :2]).equal(expected[1][:, :2])  # all but the one whose mean is farthest are compared
        assert {document.metadata["part"] < 50 for document in store.documents(found[1].flatten())} == {True}
        assert store.topk(queries, 4, index=index, where={"part": 1000})[1].shape == (8, 0)


def test_an_index_that_cannot_be_filtered_says_so(store, queries):
    index = store.build_index("Flat,RFlat")
    with pytest.raises(ValueError, match=r"where does not apply to an index of kind 'Flat,RFlat'"):
        store.topk(queries, 5, index=index, where={"part": {"<": 60}})


def test_the_report_counts_what_is_found(store, queries):
    from clara_fast.store.recall import recall_report

    index = store.build_index("IVF").with_effort(15)
    few, all_of_them = recall_report(store, index, 5, [6, 600], queries=queries)
    found = store.topk(queries, 5, index=index, candidates=6)[1]
    true = store.topk(queries, 5)[1]
    shared = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), true.tolist()))
    assert few["recall"] == pytest.approx(shared / true.numel())
    assert few["recall"] < all_of_them["recall"] == 1
    where = {"part": {"<": 60}}
    few, all_of_them = recall_report(store, index, 5, [6, 600], queries=queries, where=where)
    assert few["recall"] < all_of_them["recall"] == 1
    with pytest.raises(ValueError, match="leaves nothing to find"):
        recall_report(store, index, 5, [6], where={"part": 1000})
    # Documents as queries, without themselves and so without the easiest hit.
    few, all_of_them = recall_report(store, index, 5, [6, 600])
    assert few["recall"] < all_of_them["recall"] == 1


def test_a_stale_index_is_refused(tmp_path, model):
    with MemoryStore.create(tmp_path / "s", model) as store:
        store.add(names(50), texts(50), model.compress(texts(50)))
        index = store.build_index("Flat")
        queries = model.encode_queries(texts(1))
        assert store.search(queries, 1, index=index)[0][0].id == "doc-0"
        store.delete(["doc-0"])
        stale = r"index of .* is stale: it was built from other documents \(50, now 49\).*clara-fast index"
        with pytest.raises(StoreError, match=stale):
            store.open_index()
        with pytest.raises(StoreError, match=stale):
            store.search(queries, 1, index=index)
        store.build_index("Flat")
        assert store.search(queries, 1, index=store.open_index())[0][0].id != "doc-0"
        assert len(list((store.path / "index").iterdir())) == 2


def test_a_damaged_index_is_refused(tmp_path, model):
    with MemoryStore.create(tmp_path / "s", model) as store:
        with pytest.raises(ValueError, match="holds no documents to index"):
            store.build_index()
        store.add(names(50), texts(50), model.compress(texts(50)))
        with pytest.raises(StoreError, match=r"has no index: build one \(clara-fast index"):
            store.open_index()
        index = store.build_index("Flat")
        file, facts = store.path / "index" / index.facts.file, store.path / "index" / "index.json"
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(StoreDamagedError, match=r"faiss is damaged: its size or checksum"):
            store.open_index()
        file.unlink()
        with pytest.raises(StoreDamagedError, match=r"is damaged: .*No such file"):
            store.open_index()
        facts.write_text(json.dumps({**vars(index.facts), "file": "../../other.faiss"}))
        with pytest.raises(StoreDamagedError, match=r"'../../other.faiss' is not the name of an index"):
            store.open_index()
        store.verify()


def test_bad_arguments(store, queries):
    with pytest.raises(ValueError, match=r"kind \('Nonsense'\) cannot index"):
        store.build_index("Nonsense")
    with pytest.raises(ValueError, match=r"kind \('IVF1024,Flat'\) cannot index these 600 documents"):
        store.build_index("IVF1024,Flat")
    index = store.build_index("Flat")
    with pytest.raises(ValueError, match=r"effort \(3\) does not apply to an index of kind 'Flat'"):
        index.with_effort(3)
    with pytest.raises(ValueError, match=r"candidates \(4\) must be at least k \(5\)"):
        store.search(queries, 5, index=index, candidates=4)
    with pytest.raises(ValueError, match=r"candidates \(4\) is for a search with an index"):
        store.search(queries, 5, candidates=4)
    with pytest.raises(ValueError, match="takes no keys or group"):
        store.search(queries, 5, index=index, group=object())
    with pytest.raises(ValueError, match=r"where names .*which no document has"):
        store.search(queries, 5, index=index, where={"a": 1})
