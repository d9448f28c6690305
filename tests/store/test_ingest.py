"""A corpus into a store: shards, resuming, and what is refused."""

from __future__ import annotations

import json
import resource
import warnings

import pytest
import torch
from standin import StandIn, names, texts

from clara_fast.store import Corpus, CorpusError, MemoryStore, StoreLockedError, StoreMismatchError, compress_corpus


@pytest.fixture
def corpus(tmp_path):
    return write(
        tmp_path / "c.jsonl",
        [{"id": i, "title": f"T{i}", "text": t} for i, t in zip(names(50), texts(50), strict=True)],
    )


def write(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return Corpus.open(path)


def test_a_corpus_goes_into_shards_in_its_order(tmp_path, model, corpus):
    told = []
    with MemoryStore.create(tmp_path / "s", model) as store:
        report = compress_corpus(store, model, corpus, batch_tokens=100, shard_documents=20, progress=told.append)
        assert (report.added, report.skipped, report.truncated) == (50, 0, 0)
        assert sum(told) == 50
        assert len(told) > 1
        assert list(store.ids) == names(50)
        assert [shard.rows for shard in store._manifest.shards] == [20, 20, 10]
        expected = model.compress([f"T{i}\n{text}" for i, text in zip(names(50), texts(50), strict=True)])
        assert store.memory(range(50)).equal(expected.to(store.memory([0]).dtype))


def test_running_again_does_the_rest(tmp_path, model, corpus):
    with MemoryStore.create(tmp_path / "s", model) as store:
        compress_corpus(store, model, Corpus.open(corpus.path, limit=30), shard_documents=8)
    model.compressed = 0
    with MemoryStore.open(tmp_path / "s", model) as store:
        report = compress_corpus(store, model, corpus)
        assert (report.added, report.skipped, model.compressed) == (20, 30, 20)
        assert list(store.ids) == names(50)
        assert compress_corpus(store, model, corpus).skipped == 50
        store.verify()


def test_a_slow_model_writes_early(tmp_path, model, corpus):
    with MemoryStore.create(tmp_path / "s", model) as store:
        compress_corpus(store, model, corpus, batch_tokens=50, shard_seconds=0)
        assert store.stats()["shards"] == 17


def test_a_text_that_changed_is_refused(tmp_path, model, corpus):
    with MemoryStore.create(tmp_path / "s", model) as store:
        compress_corpus(store, model, corpus)
        changed = write(
            tmp_path / "d.jsonl", [{"id": "new", "text": "N."}, {"id": "doc-7", "title": "T", "text": "New."}]
        )
        with pytest.raises(CorpusError, match=r"d.jsonl, line 2: document 'doc-7' is in .* with another text"):
            compress_corpus(store, model, changed)
        assert len(store) == 51  # what came before the bad row is kept


def test_an_id_given_twice_is_refused(tmp_path, model):
    twice = write(
        tmp_path / "d.jsonl",
        [{"id": "x", "text": "One."}, {"id": "y", "text": "Two."}, {"id": "x", "text": "One."}],
    )
    with MemoryStore.create(tmp_path / "s", model) as store:
        with pytest.raises(CorpusError, match=r"d.jsonl, line 3: id 'x' appears a second time"):
            compress_corpus(store, model, twice)
        compress_corpus(store, model, Corpus.open(twice.path, limit=2))
        with pytest.raises(CorpusError, match="line 3: id 'x' appears a second time"):
            compress_corpus(store, model, twice)


def test_long_documents_are_counted_in_one_warning(tmp_path, model):
    long = write(tmp_path / "d.jsonl", [{"text": f"{i} " + "word " * (40 if i % 3 else 5)} for i in range(30)])
    with MemoryStore.create(tmp_path / "s", model) as store, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = compress_corpus(store, model, long, batch_tokens=64)
    assert report.truncated == 20
    assert [str(w.message) for w in caught] == [
        "20 of 30 documents are longer than 32 tokens; "
        "only their beginnings were compressed (--chunk 32 keeps all of them)"
    ]


def test_another_model_is_refused_before_any_work(tmp_path, model, corpus):
    other = StandIn(name="b")
    with MemoryStore.create(tmp_path / "s", model) as store, pytest.raises(StoreMismatchError):
        compress_corpus(store, other, corpus)
    assert other.compressed == 0


def test_a_store_in_use_is_refused_before_any_work(tmp_path, model, corpus):
    with MemoryStore.create(tmp_path / "s", model), pytest.raises(StoreLockedError):
        compress_corpus(MemoryStore.open(tmp_path / "s"), model, corpus)
    assert model.compressed == 0


@pytest.mark.parametrize("name", ["batch_tokens", "shard_documents"])
def test_sizes_must_be_positive(tmp_path, model, corpus, name):
    with (
        MemoryStore.create(tmp_path / "s", model) as store,
        pytest.raises(ValueError, match=rf"{name} \(0\) must"),
    ):
        compress_corpus(store, model, corpus, **{name: 0})


def test_duplicates_are_left_out(tmp_path, model):
    rows = [{"id": "a", "text": "Same."}, {"id": "b", "text": "Other."}, {"id": "c", "text": "Same."}]
    corpus = write(tmp_path / "d.jsonl", [*rows, {"id": "d", "title": "T", "text": "Same."}])
    left_out = []
    with MemoryStore.create(tmp_path / "s", model) as store:
        for added in (3, 0):  # the second time, they are known from the store
            report = compress_corpus(store, model, corpus, on_duplicate=lambda r, other: left_out.append((r.id, other)))
            assert (report.added, report.duplicates) == (added, 1)
        assert list(store.ids) == ["a", "b", "d"]
        assert left_out == [("c", "a")] * 2
        # Another corpus that says the same, and one that may.
        other = write(tmp_path / "e.jsonl", [{"id": "z", "text": "Other."}])
        assert compress_corpus(store, model, other).duplicates == 1
        assert compress_corpus(store, model, other, keep_duplicates=True).added == 1
        assert compress_corpus(store, model, corpus, keep_duplicates=True).added == 1
        assert list(store.ids) == ["a", "b", "d", "z", "c"]


def test_a_bad_row_loses_nothing_before_it(tmp_path, model):
    rows = [{"id": i, "text": t} for i, t in zip(names(30), texts(30), strict=True)]
    bad = write(tmp_path / "d.jsonl", [*rows[:20], {"id": "x", "text": " "}, *rows[20:]])
    with MemoryStore.create(tmp_path / "s", model) as store:
        with pytest.raises(CorpusError, match="line 21: document 'x' is empty"):
            compress_corpus(store, model, bad)
        assert list(store.ids) == names(20)
        errors = []
        report = compress_corpus(store, model, Corpus.open(bad.path, on_bad=errors.append))
        assert (report.added, report.skipped, len(errors)) == (10, 20, 1)
        assert list(store.ids) == names(30)


class Brief(StandIn):
    """Compresses at once, whatever the length; counts characters."""

    def compress(self, documents, *, max_tokens=8192):
        return torch.ones(len(documents), self.config.num_memory, self.config.hidden_size)

    def count_tokens(self, documents):
        return [len(text) // 100 for text in documents]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """23 MB of texts after 4 MB: no more memory than a few windows."""
    model = Brief()
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"id": f"d{i}", "text": f"{i} {'Some words. ' * 160}"}) + "\n" for i in range(12000))
    )
    peaks = []
    for limit in (2000, 12000):
        with MemoryStore.create(tmp_path / f"s{limit}", model) as store:
            corpus = Corpus.open(tmp_path / "c.jsonl", limit=limit)
            assert compress_corpus(store, model, corpus, shard_documents=256).added == limit
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert peaks[1] - peaks[0] < 12
