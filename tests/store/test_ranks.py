"""Several processes on one store: what they write together, and what they find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from standin import StandIn, names, texts
from test_ingest import write

from clara_fast.store import Corpus, MemoryStore, compress_corpus
from clara_fast.store.parts import Parts


def run(task: str, folder: Path, size: int, **environment: str) -> list[int]:
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), task, str(folder), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    assert done.stdout, done.stderr
    return [int(status) for status in done.stdout.split()]


@pytest.fixture
def corpus(tmp_path):
    """150 documents: short and long ones, and every tenth a repetition of an earlier one."""
    rows = []
    for i in range(150):
        said = i - 7 if i % 10 == 9 else i
        text = f"Text {said} is said. " + " ".join(f"Sentence {said} {j} has words." for j in range(said % 12))
        rows.append({"id": f"d{i}", "text": text})
    return write(tmp_path / "corpus.jsonl", rows)


@pytest.fixture
def alone(tmp_path, corpus):
    """What one process makes of the corpus."""
    model = StandIn()
    with MemoryStore.create(tmp_path / "alone", model) as store:
        report = compress_corpus(store, model, corpus, batch_tokens=64, shard_documents=8, chunk=16, overlap=4)
    assert (report.added, report.duplicates) == (135, 15)
    assert report.chunks > 300
    return store


def assert_same(store: MemoryStore, other: MemoryStore) -> None:
    store.verify()
    assert list(store) == list(other)
    rows = range(len(store))
    assert store.memory(rows).equal(other.memory(rows))
    assert not (store.path / "parts").exists()


@pytest.mark.parametrize("size", [3])
def test_several_processes_write_what_one_writes(tmp_path, corpus, alone, size):
    assert run("compress", tmp_path, size) == [0] * size
    assert_same(MemoryStore.open(tmp_path / "store"), alone)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == {"added": 135, "chunks": len(alone), "skipped": 0, "duplicates": 15, "truncated": 0}
    assert run("compress", tmp_path, size) == [0] * size
    assert json.loads((tmp_path / "report.json").read_text())["skipped"] == 135


@pytest.mark.parametrize("then", [1, 3])
def test_another_number_of_processes_goes_on_after_a_kill(tmp_path, corpus, alone, then):
    """One process's work first, then two of which one dies while writing, then one or three to the end."""
    model = StandIn()
    with MemoryStore.create(tmp_path / "store", model) as store:
        compress_corpus(store, model, corpus.__class__.open(corpus.path, limit=20), chunk=16, overlap=4)
        before = len(store)
    assert -9 in run("killed", tmp_path, 2, KILL_AFTER="3")
    store = MemoryStore.open(tmp_path / "store", model)
    assert len(store) == before
    parts = {path.name for path in (store.path / "parts").iterdir()}
    assert len(parts) > 3  # and one of them is not whole
    if then > 1:
        assert run("compress", tmp_path, then) == [0] * then
    else:
        with store:
            compress_corpus(store, model, corpus, batch_tokens=64, shard_documents=8, chunk=16, overlap=4)
    assert_same(MemoryStore.open(tmp_path / "store"), alone)


@pytest.mark.parametrize("moment", ["manifest.json", "parts/000000000001"])
def test_a_kill_while_joining_loses_nothing_and_repeats_nothing(tmp_path, moment):
    """Before the manifest names the parts' shards, and after, when some parts are gone and others are not."""
    model, path = StandIn(), tmp_path / "store"
    with MemoryStore.create(path, model) as store:
        parts = Parts(store, model)
        for i in (0, 2, 1):
            parts.write(
                i, names(3, 3 * i), [{"text": text} for text in texts(3, 3 * i)], model.compress(texts(3, 3 * i))
            )
    assert run("join", tmp_path, 1, KILL_IN=moment) == [-9]
    store = MemoryStore.open(path, model)
    assert len(store) == (0 if moment == "manifest.json" else 9)
    assert len(list(parts.open())) == (3 if moment == "manifest.json" else 2)
    with store:
        rows = [{"id": name, "text": text} for name, text in zip(names(12), texts(12), strict=True)]
        report = compress_corpus(store, model, Corpus.of_rows(rows))
        assert (report.added, report.skipped) == (3, 9)
    assert list(store.ids) == names(12)
    store.verify()
    assert len(list((path / "shards").iterdir())) == 2 * store.stats()["shards"]


def test_four_processes_find_what_one_finds(tmp_path):
    """Six shards, every document three times, so that most scores tie across processes."""
    model = StandIn()
    documents = texts(20) * 3
    with MemoryStore.create(tmp_path / "store", model) as store:
        for start in range(0, 60, 11):
            rows = [{"text": text, "metadata": {"even": i % 2 == 0}} for i, text in enumerate(documents)][
                start : start + 11
            ]
            store.add(names(len(rows), start), rows, model.compress([row["text"] for row in rows]))
        assert store.stats()["shards"] == 6
        store.delete(["doc-3", "doc-25"])
        queries = model.encode_queries(texts(5, 7))
        torch.save(queries, tmp_path / "queries.pt")
        expected = [
            store.topk(queries, k, where=where)
            for k in (1, 9, len(store))
            for where in (None, {"even": True}, {"even": None})
        ]
        hits = [[hit.id for hit in row] for row in store.search(queries[:2], 3)]
    assert run("search", tmp_path, 4) == [0] * 4
    for rank in range(4):
        for (scores, rows), (their_scores, their_rows) in zip(torch.load(tmp_path / f"found-{rank}.pt"), expected):
            assert rows.equal(their_rows)
            assert scores.equal(their_scores)
        assert json.loads((tmp_path / f"hits-{rank}.json").read_text()) == hits
