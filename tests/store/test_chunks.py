"""Long documents in chunks: what each holds, and that nothing is lost."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standin import StandIn

from clara_fast.store import Chunking, Corpus, CorpusError, MemoryStore, StoreError, compress_corpus, parent_text
from clara_fast.store.chunks import cut
from clara_fast.store.corpus import Record

TEXT = (
    "The first sentence is here. A second one follows it! Does a third one? It does.\n"
    "A new line begins, and it goes on and on and on and on and on and on without any end in sight until now. Done."
)


def spans(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"\S+", text)]


def test_pieces_end_between_sentences():
    pieces = [TEXT[a:b] for a, b in cut(TEXT, spans(TEXT), 12, 4)]
    assert pieces[:3] == [
        "The first sentence is here. A second one follows it! ",
        "Does a third one? It does.\n",
        "It does.\nA new line begins, and it goes on and on ",
    ]
    # Where there is no sentence, between words; and the overlap is words too.
    assert pieces[3] == "goes on and on and on and on and on and on "
    assert pieces[-1].endswith("Done.")


@settings(deadline=None, max_examples=200)
@given(
    st.text(alphabet="ab .!?\n“”。\t\u00e9", max_size=300),
    st.integers(1, 20),
    st.data(),
    st.integers(1, 3),
)
def test_nothing_is_lost_and_nothing_too_long(text, size, data, letters):
    """Whatever the text and wherever tokens end: pieces ascend, cover the text, overlap by no more than is asked."""
    overlap = data.draw(st.integers(0, size // 2))
    tokens = [match.span() for match in re.finditer(rf"\S{{1,{letters}}}", text)]
    pieces = cut(text, tokens, size, overlap)
    covered = 0
    for (start, end), (before_start, before_end) in zip(pieces, [(-1, 0), *pieces]):
        assert before_start < start < end
        assert not text[covered:start].strip()  # between pieces there is white space at most
        assert sum(start <= a and b <= end for a, b in tokens) <= size
        assert sum(start <= a and b <= before_end for a, b in tokens) <= overlap
        covered = end
    assert not text[covered:].strip()


def test_chunks_know_their_parent(tmp_path):
    model = StandIn(doc_max_length=12)
    (tmp_path / "c.jsonl").write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (
                {"id": "long", "title": "A title", "text": TEXT, "year": 1999},
                {"id": "short", "text": "Few words."},
            )
        )
    )
    corpus = Corpus.open(tmp_path / "c.jsonl")
    with MemoryStore.create(tmp_path / "s", model) as store:
        report = compress_corpus(store, model, corpus, chunk=12, overlap=4)
        assert (report.added, report.truncated, report.chunks) == (2, 0, len(store))
        *chunks, short = store
        assert [chunk.id for chunk in chunks] == [f"long#{i}" for i in range(len(chunks))]
        for i, chunk in enumerate(chunks):
            start, end = chunk.metadata["span"]
            assert chunk.text == TEXT[start:end]
            assert (chunk.title, chunk.metadata["year"]) == ("A title", 1999)
            assert (chunk.metadata["parent"], chunk.metadata["chunk"]) == ("long", i)
            assert chunk.metadata["chunks"] == len(chunks)
            assert model.count_tokens([f"A title\n{chunk.text}"])[0] <= 12
            assert parent_text(store, chunk) == TEXT
        assert (short.id, short.metadata) == ("short", {})
        assert parent_text(store, short) == "Few words."
        # Again: all there. The text changed anywhere: refused.
        report = compress_corpus(store, model, corpus, chunk=12, overlap=4)
        assert (report.added, report.skipped) == (0, 2)
        (tmp_path / "c.jsonl").write_text(json.dumps({"id": "long", "title": "A title", "text": TEXT + " More."}))
        with pytest.raises(CorpusError, match=r"line 1: document 'long' is in .* with another text"):
            compress_corpus(store, model, corpus, chunk=12, overlap=4)
    with MemoryStore.create(tmp_path / "t", model) as part:
        part.add(["long#0"], [{"text": chunks[0].text, "metadata": chunks[0].metadata}], model.compress(["x"]))
        with pytest.raises(StoreError, match="lacks chunk 'long#1' of document 'long'"):
            parent_text(part, next(iter(part)))


def test_a_document_stays_in_one_shard(tmp_path):
    model = StandIn(doc_max_length=12)
    rows = [{"id": f"d{i}", "text": f"{i}. {TEXT}"} for i in range(4)]
    with MemoryStore.create(tmp_path / "s", model) as store:
        compress_corpus(store, model, Corpus.of_rows(rows), chunk=12, shard_documents=1)
        assert store.stats()["shards"] == 4
        parents = [{chunk.metadata["parent"] for chunk in shard.documents(range(shard.entry.rows))}
                   for shard in store._snapshot.shards]  # fmt: skip
        assert parents == [{f"d{i}"} for i in range(4)]


def test_what_cannot_be_cut():
    model = StandIn()
    for size, overlap, message in ((0, 0, r"chunk \(0\)"), (8, 5, r"overlap \(5\)"), (8, -1, r"overlap \(-1\)")):
        with pytest.raises(ValueError, match=message):
            Chunking(size, overlap)
    record = Record("x", "A title of seven words is long", TEXT, {}, "c.jsonl, line 3")
    with pytest.raises(CorpusError, match=r"line 3: document 'x' cannot be cut into chunks of 8 tokens: its title"):
        Chunking(8, 1).split(record, model)
    record = Record("x", "", TEXT, {"parent": 1, "span": 2}, "c.jsonl, line 3")
    with pytest.raises(CorpusError, match=r"has the metadata \['parent', 'span'\], which its chunks would overwrite"):
        Chunking(8, 1).split(record, model)


def test_sizes_must_fit_the_model(tmp_path):
    model = StandIn(doc_max_length=12)
    with MemoryStore.create(tmp_path / "s", model) as store:
        with pytest.raises(ValueError, match=r"chunk \(13\) must be at most the model's doc_max_length \(12\)"):
            compress_corpus(store, model, [], chunk=13)
        with pytest.raises(ValueError, match=r"overlap \(3\) is for chunks"):
            compress_corpus(store, model, [], overlap=3)
