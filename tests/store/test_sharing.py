"""One store in several hands: threads, forked processes, a device that searches share, files mended meanwhile."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from standin import StandIn, names, texts

from clara_fast.store import MemoryStore, StoreDamagedError, device_keys, search, shard
from clara_fast.store.device_keys import DeviceKeys
from clara_fast.store.shard_files import SCHEMA


def test_a_search_and_its_documents_are_of_one_state(tmp_path, monkeypatch):
    """Another thread refreshes between the two: rows move down, but not under a search that has begun."""
    model = StandIn(num_memory=1, hidden_size=16)
    memory = torch.eye(16)[:, None]
    with MemoryStore.create(tmp_path / "s", model, dtype="float32") as store:
        store.add(names(16), texts(16), memory)
    reader = MemoryStore.open(tmp_path / "s")
    plain = search.topk

    def interrupted(*args, **options):
        found = plain(*args, **options)
        if len(reader) == 16:
            with MemoryStore.open(tmp_path / "s") as writer:
                writer.delete(names(3))
            reader.refresh()
        return found

    monkeypatch.setattr(search, "topk", interrupted)
    (((hit,), found),) = reader.search_with_memory(memory[9:10], 1)
    assert (hit.id, hit.score, len(reader)) == ("doc-9", 1.0, 13)
    assert found.equal(memory[9:10])
    assert reader.search(memory[9:10], 1)[0][0].row == 6


def test_threads_share_a_device(tmp_path, monkeypatch):
    monkeypatch.setattr(device_keys, "BLOCK_BYTES", 1 << 14)
    model = StandIn(num_memory=1, hidden_size=64)
    memory, queries = torch.randn(2000, 1, 64), torch.randn(8, 1, 64)
    with MemoryStore.create(tmp_path / "s", model, dtype="float32") as store:
        store.add(names(2000), texts(2000), memory)
    expected = [store.topk(query[None], 5)[1] for query in queries]
    store._keys = DeviceKeys("cpu", 0)
    wrong = []

    def ask(i):
        for _ in range(10):
            if not store.topk(queries[i : i + 1], 5)[1].equal(expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORKED = """
import os, subprocess, sys
from standin import StandIn, names, texts
from clara_fast.store import MemoryStore

path, model = sys.argv[1], StandIn()
CHANGE = "import sys\\nfrom clara_fast.store import MemoryStore\\nwith MemoryStore.open(sys.argv[1]) as s: " \
    "s.delete([sys.argv[2]]); s.compact()"
change = lambda name: subprocess.run([sys.executable, "-c", CHANGE, path, name], check=True)
with MemoryStore.create(path, model) as store:
    for i in range(0, 12, 4):
        store.add(names(4, i), texts(4, i), model.compress(texts(4, i)))
query = model.encode_queries(texts(1))

reader = MemoryStore.open(path)
change("doc-0")
child = os.fork()
if not child:
    reader.refresh()
    os._exit(0)
os.waitpid(child, 0)
change("doc-1")
assert len(reader.search(query, 12)[0]) == 12, "the child let go of its parent's state"

go, done = os.pipe(), os.pipe()
child = os.fork()
if not child:
    os.read(go[0], 1)
    os._exit(0 if len(reader.search(query, 12)[0]) == 12 else 1)
reader.refresh()
change("doc-2")
os.write(go[1], b"x")
assert os.waitpid(child, 0)[1] == 0, "the parent let go of its child's state"

writer = MemoryStore.open(path)
writer.lock()
child = os.fork()
if not child:
    os.read(go[0], 1)
    os._exit(0)
writer.close()
again = MemoryStore.open(path)
again.lock()
again.close()
os.write(go[1], b"x")
os.waitpid(child, 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="states are pinned on Linux only")
def test_forked_processes_hold_what_they_read(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FORKED, str(tmp_path / "s")], check=True, timeout=120, env=environment)


def test_a_file_that_is_mended_is_read_again(tmp_path):
    model = StandIn()
    with MemoryStore.create(tmp_path / "s", model) as store:
        store.add(names(40), texts(40), model.compress(texts(40)))
    file = tmp_path / "s" / "shards" / "00000.parquet"
    good = file.read_bytes()
    for place in islice(unreadable_footers(good), 5):
        file.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        shard._footer.cache_clear()  # as in a process that has not read the good one
        reader = MemoryStore.open(tmp_path / "s")
        with pytest.raises(StoreDamagedError):
            reader.documents([0, 39])
        file.write_bytes(good)
        assert [document.id for document in reader.documents([0, 39])] == ["doc-0", "doc-39"]
        reader.verify()


def unreadable_footers(good):
    """Where a flipped bit leaves a footer that can be parsed, and a file that cannot be read by it."""
    begin = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    for place in range(begin, len(good) - 8):
        flipped = good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :]
        with contextlib.suppress(pa.ArrowException, OSError, ValueError):
            file = pq.ParquetFile(io.BytesIO(flipped), page_checksum_verification=True)
            if file.metadata.num_rows != 40 or file.schema_arrow.names != SCHEMA.names:
                continue
            try:
                file.read_row_group(0)
            except (pa.ArrowException, OSError):
                yield place


def test_a_sparse_filter_does_not_bring_in_what_it_does_not_read(tmp_path, monkeypatch):
    model = StandIn()
    with MemoryStore.create(tmp_path / "s", model) as store:
        store.add(names(40), texts(40), model.compress(texts(40)))
    from clara_fast.store.shard import Shard

    brought = []
    monkeypatch.setattr(Shard, "bring", lambda *args: brought.append(args))
    reader = MemoryStore.open(tmp_path / "s")
    assert reader.search(torch.randn(1, 4, 8), 3, where={"id": "doc-7"})[0][0].id == "doc-7"
    assert not brought
    MemoryStore.open(tmp_path / "s").search(torch.randn(1, 4, 8), 3)
    assert brought
