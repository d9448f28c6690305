"""Search beyond the plain case: filters, keys on a device, several processes, memory that stays small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch
from standin import StandIn, names, texts
from test_memory_store import brute_force

from clara_fast.store import MemoryStore, search
from clara_fast.store.device_keys import DeviceKeys

YEARS = [1980 + i % 40 for i in range(90)]


def records():
    """90 documents; every seventh has no metadata at all."""
    return [
        {
            "title": f"T{i % 4}",
            "text": f"Text {i}.",
            "metadata": {} if i % 7 == 0 else {"year": YEARS[i], "lang": ["en", "de", "fr"][i % 3], "at": {"x": i}},
        }
        for i in range(90)
    ]


@pytest.fixture
def labelled(tmp_path):
    model = StandIn(num_memory=2, hidden_size=16)
    torch.manual_seed(0)
    memory, documents = torch.randn(90, 2, 16), records()
    with MemoryStore.create(tmp_path / "s", model, dtype="float32") as store:
        for start, stop in ((0, 1), (1, 50), (50, 90)):
            store.add(names(stop - start, start), documents[start:stop], memory[start:stop])
    return MemoryStore.open(tmp_path / "s"), memory


CONDITIONS = [
    ({"lang": "en"}, lambda i, m: m.get("lang") == "en"),
    ({"lang": ["de", "fr"]}, lambda i, m: m.get("lang") in ("de", "fr")),
    ({"year": {">=": 1990, "<": 2005}}, lambda i, m: 1990 <= m.get("year", 0) < 2005),
    ({"year": {">": 1990, "<=": 2005, "!=": 2000}, "lang": "de"}, lambda i, m: 1990 < m.get("year", 0) <= 2005
     and m["year"] != 2000 and m["lang"] == "de"),
    ({"lang": None}, lambda i, m: "lang" not in m),
    ({"id": {"in": ["doc-3", "doc-77", "nothing"]}}, lambda i, m: i in (3, 77)),
    ({"title": "T2", "text": {"!=": "Text 6."}}, lambda i, m: i % 4 == 2 and i != 6),
    (pc.field("year") + 10 > 2020, lambda i, m: m.get("year", 0) > 2010),
    ((pc.field("lang") == "fr") | pc.starts_with(pc.field("text"), "Text 1"), lambda i, m: m.get("lang") == "fr"
     or f"Text {i}.".startswith("Text 1")),
    (pc.field(("at", "x")) < 20, lambda i, m: m.get("at", {"x": 99})["x"] < 20),
]  # fmt: skip


@pytest.mark.parametrize(("where", "holds"), CONDITIONS)
def test_filters(labelled, where, holds):
    store, memory = labelled
    with store:
        store.delete(["doc-8", "doc-44"])
    kept = [i for i in range(90) if i not in (8, 44)]
    rows_of = {i: row for row, i in enumerate(kept)}
    wanted = [i for i in kept if holds(i, records()[i]["metadata"])]
    assert wanted
    queries = torch.randn(4, 2, 16)
    for k in (1, len(wanted), 88):
        scores, rows = store.topk(queries, k, where=where)
        expected, order = brute_force(memory[wanted], queries, k)
        torch.testing.assert_close(scores.double(), expected, rtol=0, atol=2e-6)
        assert rows.tolist() == [[rows_of[wanted[place]] for place in row] for row in order.tolist()]
    assert {hit.id for hit in store.search(queries[:1], 88, where=where)[0]} == {f"doc-{i}" for i in wanted}


def test_a_filter_that_finds_nothing(labelled):
    store, _ = labelled
    scores, rows = store.topk(torch.randn(3, 2, 16), 5, where={"year": {">": 3000}})
    assert scores.shape == rows.shape == (3, 0)
    assert store.search(torch.randn(1, 2, 16), 5, where={"lang": "xx"}) == [[]]


def test_what_filters_refuse(labelled, tmp_path):
    store, _ = labelled
    query = torch.randn(1, 2, 16)
    for where, message in (
        (
            {"yaer": 1},
            r"where names FieldRef.Name\(yaer\), which no document has; fields: \['at', 'id', 'lang', ",
        ),
        ({}, r"where \({}\) holds no condition"),
        ({"year": {"~": 1}}, r"where\['year'\] has unknown comparisons \['~'\]; there are ==, !="),
        ({"lang": {">": 3}}, "does not apply"),
    ):
        with pytest.raises(ValueError, match=message):
            store.topk(query, 1, where=where)
    with pytest.raises(TypeError, match=r"where must be a mapping or .*, not str"):
        store.topk(query, 1, where="lang = 'en'")
    model = StandIn()
    with MemoryStore.create(tmp_path / "mixed", model) as mixed:
        mixed.add(names(2), [{"text": "a", "metadata": {"y": y}} for y in (1, "1")], model.compress(texts(2)))
        with pytest.raises(ValueError, match=r"metadata of shard 00000 .* cannot be filtered: a field has values of"):
            mixed.topk(torch.randn(1, 4, 8), 1, where={"y": 1})


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("resident", [0, 20_000, 1 << 30])
def test_keys_on_a_device_give_the_same(tmp_path, monkeypatch, dtype, resident):
    """The same steps as on a GPU, with plain copies: nothing, a part or all of the keys stays there."""
    monkeypatch.setattr(search, "BLOCK_BYTES", 4096)
    model = StandIn(num_memory=2, hidden_size=64)
    torch.manual_seed(0)
    memory, queries = torch.randn(300, 2, 64), torch.randn(3, 2, 64)
    with MemoryStore.create(tmp_path / "s", model, dtype=dtype, pooled_keys=True) as store:
        for start, stop in ((0, 130), (130, 131), (131, 300)):
            store.add(names(stop - start, start), texts(stop - start, start), memory[start:stop])
        store.delete(names(30, 100))
        expected = {keys: store.topk(queries, 20, keys=keys) for keys in search.KEYS}
        source = DeviceKeys("cpu", resident)
        store._keys = source
        for _ in range(2):
            for keys, (scores, rows) in expected.items():
                found = store.topk(queries, 20, keys=keys)
                assert found[0].equal(scores)
                assert found[1].equal(rows)
        assert source.resident_bytes <= resident
        assert (source.resident_bytes > 0) == (resident > 0)
        store.compact()
        assert source.resident_bytes == 0
        assert store.topk(queries, 20)[1].equal(expected["memory"][1])


def test_what_a_device_refuses(labelled):
    store, _ = labelled
    with pytest.raises(ValueError, match=r"resident_bytes \(-1\) must not be negative"):
        DeviceKeys("cpu", -1)
    assert store.to("cpu") is store


RANKS = """
import sys
import torch
import torch.distributed as dist
from clara_fast.store import MemoryStore

path, rendezvous, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=4)
store = MemoryStore.open(path)
queries = torch.load(path + ".queries", weights_only=True)
for k in (1, 9, 90):
    alone, together = store.topk(queries, k), store.topk(queries, k, group=dist.group.WORLD)
    assert all(a.equal(b) for a, b in zip(alone, together, strict=True)), (rank, k)
filtered = [store.topk(queries, 5, where={"lang": "en"}, group=group) for group in (None, dist.group.WORLD)]
assert filtered[0][1].equal(filtered[1][1])
assert store.search(queries, 3) == store.search(queries, 3, group=dist.group.WORLD)
dist.destroy_process_group()
"""


def test_four_processes_return_what_one_returns(labelled):
    store, memory = labelled
    with store:
        store.add(["twin"], [{"text": "Twin.", "metadata": {"lang": "en"}}], memory[30:31])
    torch.save(torch.cat([memory[30:31], torch.randn(5, 2, 16)]), f"{store.path}.queries")
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANKS, store.path, store.path.parent / "rendezvous", str(rank)])
        for rank in range(4)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * 4


SCAN = """
import sys
import torch
from clara_fast.store import MemoryStore

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

store = MemoryStore.open(sys.argv[1])
queries = torch.randn(2, 16, 512)
store.topk(queries, 3, where={"id": ["doc-0"]})
before = peak()
store.topk(queries, 3)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_search_keeps_little_in_memory(tmp_path, monkeypatch):
    """96 MB of memories in blocks of at most 64 MiB, let go one after the other."""
    model = StandIn(num_memory=16, hidden_size=512)
    with MemoryStore.create(tmp_path / "s", model) as store:
        for start in range(0, 6144, 1024):
            store.add(names(1024, start), texts(1024, start), torch.randn(1024, 16, 512))
    run = subprocess.run([sys.executable, "-c", SCAN, store.path], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 40
