"""Search beyond the plain case: filters, keys on a device, several processes, memory that stays small."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from standin import StandIn, names, texts
from test_memory_store import brute_force

from clara_fast.store import MemoryStore, blocks, device_keys, pages, search
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
    for where, message in (
        ({"lang": {"in": "en"}}, r"where\['lang'\]\['in'\] \('en'\) must be a list"),
        ({"year": [1990, "a"]}, "does not apply"),
        ({"": 2}, "which no document has"),
    ):
        with pytest.raises(ValueError, match=message):
            store.topk(query, 1, where=where)
    model = StandIn()
    with MemoryStore.create(tmp_path / "mixed", model) as mixed:
        mixed.add(names(2), [{"text": "a", "metadata": {"y": y}} for y in (1, "1")], model.compress(texts(2)))
        with pytest.raises(ValueError, match=r"metadata of shard 00000 .* cannot be filtered: a field has values of"):
            mixed.topk(torch.randn(1, 4, 8), 1, where={"y": 1})


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("resident", [0, 20_000, 1 << 30])
def test_keys_on_a_device_give_the_same(tmp_path, monkeypatch, dtype, resident):
    """The same steps as on a GPU, with plain copies: nothing, a part or all of the keys stays there."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(device_keys, "BLOCK_BYTES", 4096)
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


def test_dates_are_compared_as_they_are_written(tmp_path):
    model = StandIn()
    dates = ["2020-01-03", "2021-05-01", "2019-12-31T10:00:00", "unknown", None]
    documents = [{"text": f"Text {i}.", "metadata": {"at": {"date": date}, "": 5}} for i, date in enumerate(dates)]
    with MemoryStore.create(tmp_path / "s", model) as store:
        for i, document in enumerate(documents):
            store.add(names(1, i), [document], model.compress(texts(1, i)))
    field = pc.field(("at", "date"))
    for where, wanted in ((field == "2020-01-03", {0}), (field >= "2020", {0, 1, 3}), (field < "2020", {2})):
        rows = store.topk(torch.randn(1, 4, 8), 5, where=where)[1]
        assert set(rows[0].tolist()) == wanted


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


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are let go, and looked for, on Linux only")


@on_linux
def test_what_stays_resident_is_bounded(tmp_path, monkeypatch):
    from clara_fast._memory import peak_memory
    from clara_fast.benchmarks.machine import reset_peak_memory
    from clara_fast.benchmarks.store import Size, Stored

    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(blocks, "RESIDENT_BYTES", 4 << 20)

    def rise(documents: int, room: int | None) -> int:
        stored = Stored(Size(documents, 1, 512, 4096), tmp_path / f"{documents}-{room}")
        store = stored.store.to("cpu", resident_bytes=room)
        store.topk(torch.ones(1, 512), 3, where={"id": ["0"]})  # what is loaded at first use is not meant
        before = reset_peak_memory()
        for _ in range(2):
            store.topk(torch.ones(1, 512), 3)
        return peak_memory() - before

    few, many = 8192, 32768  # 8 and 32 MB of memories
    assert rise(many, 0) < rise(few, 0) + (2 << 20)
    assert rise(many, None) < rise(few, None) + (2 << 20)
    assert 12 << 20 < rise(many, 16 << 20) < 20 << 20
    assert rise(many, 1 << 30) > 28 << 20  # and all of it where it may


PEAK = """
import sys, torch
from clara_fast._memory import peak_memory
from clara_fast.store import MemoryStore
store = MemoryStore.open(sys.argv[1])
for _ in range(3):
    store.topk(torch.ones(1, 512), 3)
print(peak_memory())
"""


@on_linux
@pytest.mark.slow
def test_peak_memory_of_a_process_that_searches(tmp_path):
    """As they come: no patched sizes, no arguments."""
    from clara_fast.benchmarks.store import Size, Stored

    def peak(documents: int) -> int:
        stored = Stored(Size(documents, 1, 512, 1 << 15), tmp_path / str(documents))
        run = subprocess.run([sys.executable, "-c", PEAK, stored.store.path], capture_output=True, check=True)
        stored.remove()
        return int(run.stdout)

    nothing, some, many = peak(10), peak(300_000), peak(900_000)  # 1 kB each
    assert some < nothing + (256 << 20)
    # Two blocks are resident at the most, but a short search may never have both in full.
    assert many < some + blocks.BLOCK_BYTES


def drop_from_cache(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def is_cached(file: Path) -> bool:
    return pages.cached(torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="c")))


def faults_of(action) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    action()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def has_huge_pages(folder: Path) -> bool:
    """Whether files there come into the cache in huge pages where that is asked for."""
    file = folder / "probe"
    file.write_bytes(bytes(16 << 20))
    drop_from_cache(file)
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as view:
        with contextlib.suppress(OSError):  # a system without them
            view.madvise(mmap.MADV_HUGEPAGE)
        places = range(0, len(view), mmap.PAGESIZE)
        [view[place] for place in places]
        view.madvise(mmap.MADV_DONTNEED)
        return faults_of(lambda: [view[place] for place in places]) < 16


@on_linux
@pytest.mark.parametrize(("kind", "dtype"), [("memory", "bfloat16"), ("pooled", "int8")])
def test_a_search_reads_what_the_cache_lost(tmp_path, kind, dtype):
    """And leaves it there in huge pages, so that the next searches can map it at little cost."""
    if not has_huge_pages(tmp_path):
        pytest.skip("this system or file system has no huge pages for files")
    path, model = tmp_path / "s", StandIn(num_memory=2, hidden_size=512)
    rows = torch.randn(12_000, 2, 512)
    with MemoryStore.create(path, model, dtype=dtype, pooled_keys=True) as store:
        store.add(names(12_000), texts(12_000), rows)
        store.add(names(12_000, 12_000), texts(12_000, 12_000), -rows)
    before = MemoryStore.open(path).topk(rows[:2], 5, keys=kind)
    for was_open in (False, True):
        store = MemoryStore.open(path).to("cpu", resident_bytes=0)
        if was_open:
            store.topk(rows[:2], 5, keys=kind)
        for file in (path / "shards").glob("*.safetensors"):
            drop_from_cache(file)
            if is_cached(file):
                pytest.skip("this file system keeps what it is told to drop")
        after = store.topk(rows[:2], 5, keys=kind)
        assert all(a.equal(b) for a, b in zip(before, after, strict=True))
        assert huge_share(store, kind) > 0.6


def huge_share(store, kind: str) -> float:
    """The share of the keys that is mapped by huge pages: a fault maps one of them, or 64 kB of small ones."""
    found = [getattr(shard.rows, kind) for shard in store._snapshot.shards]
    assert all(map(pages.cached, found))
    small = sum(part.numel() * part.element_size() for part in found) / (64 << 10)
    return 1 - faults_of(lambda: [part.view(torch.uint8)[..., :1].sum() for part in found]) / small
