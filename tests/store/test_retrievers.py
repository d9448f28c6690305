"""A store in LangChain and LlamaIndex, with the real packages."""

from __future__ import annotations

import asyncio
import sys

import pytest
from standin import StandIn, names, texts

from clara_fast.store import Corpus, MemoryStore, StoreMismatchError, compress_corpus


@pytest.fixture
def chunked(tmp_path):
    """Five documents of three or more chunks, and a short one."""
    model = StandIn(doc_max_length=8)
    rows = [{"id": f"d{i}", "title": f"T{i}", "text": f"Animal{i} runs far. It eats plant{i}. " * 4} for i in range(5)]
    with MemoryStore.create(tmp_path / "s", model) as store:
        compress_corpus(store, model, Corpus.of_rows([*rows, {"id": "short", "text": "Nothing."}]), chunk=8)
    return store, model, rows


def test_langchain(filled, model, chunked):
    pytest.importorskip("langchain_core", reason="needs the extra 'langchain'")
    from langchain_core.documents import Document
    from langchain_core.runnables import RunnableLambda

    retriever = filled.as_retriever(model, k=3)
    found = retriever.invoke(texts(1, 4)[0])
    (expected,) = filled.search(model.encode_queries(texts(1, 4)), 3)
    assert all(isinstance(document, Document) for document in found)
    assert [(d.id, d.page_content, d.metadata["score"]) for d in found] == [(h.id, h.text, h.score) for h in expected]
    # As a part of a chain, in batches, and awaited.
    chain = retriever | RunnableLambda(lambda documents: documents[0].id)
    assert chain.batch(texts(4)) == names(4)
    assert asyncio.run(chain.ainvoke(texts(1, 6)[0])) == "doc-6"
    assert len(filled.as_retriever(model, k=100).invoke("Text")) == len(filled)
    assert [d.id for d in filled.as_retriever(model, where={"id": "doc-2"}).invoke("Text")] == ["doc-2"]

    store, model, rows = chunked
    (whole, *_) = found = store.as_retriever(model, k=len(store), parents=True).invoke("plant3")
    assert (whole.id, whole.page_content, whole.metadata["title"]) == ("d3", rows[3]["text"], "T3")
    assert sorted(d.id for d in found) == ["d0", "d1", "d2", "d3", "d4", "short"]


def test_llamaindex(filled, model, chunked):
    pytest.importorskip("llama_index.core", reason="needs the extra 'llamaindex'")
    from llama_index.core.schema import NodeWithScore

    retriever = filled.as_retriever(model, "llamaindex", k=3)
    found = retriever.retrieve(texts(1, 4)[0])
    (expected,) = filled.search(model.encode_queries(texts(1, 4)), 3)
    assert all(isinstance(node, NodeWithScore) for node in found)
    assert [(n.node_id, n.text, n.score) for n in found] == [(h.id, h.text, h.score) for h in expected]
    assert asyncio.run(retriever.aretrieve(texts(1, 6)[0]))[0].node_id == "doc-6"
    store, model, rows = chunked
    (whole, *_) = store.as_retriever(model, "llamaindex", parents=True).retrieve("plant3")
    assert (whole.node_id, whole.text, whole.metadata["title"]) == ("d3", rows[3]["text"], "T3")


def test_what_cannot_be_a_retriever(filled, model, monkeypatch):
    with pytest.raises(ValueError, match=r"framework \('haystack'\) must be one of 'langchain', 'llamaindex'"):
        filled.as_retriever(model, "haystack")
    with pytest.raises(ValueError, match=r"k \(0\) must be at least 1"):
        filled.as_retriever(model, k=0)
    with pytest.raises(StoreMismatchError):
        filled.as_retriever(StandIn(name="b"))
    for package, framework in (("langchain_core", "langchain"), ("llama_index", "llamaindex")):
        for name in [name for name in sys.modules if name.startswith((package, "clara_fast.store.retr"))]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"pip install clara-fast\[{framework}\]"):
            filled.as_retriever(model, framework)
