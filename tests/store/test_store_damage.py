"""What disks, other processes and sudden deaths do to a store: one clear error, nothing half-written."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from harm import flip, remove, scramble, truncate
from killing import fill, state_after
from standin import StandIn, names, texts

from clara_fast.store import MemoryStore, StoreDamagedError, StoreError, StoreLockedError


def killed(what, folder, steps):
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, script, what, folder, *map(str, steps)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(code) for code in run.stdout.split()]


def test_killed_before_every_step_of_writing(tmp_path, monkeypatch):
    """4 steps create the store, and each of 3 shards takes 8: two files, their folder, the manifest."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    steps = 4 + 3 * 8
    assert killed("fill", tmp_path, range(1, steps + 2)) == [-signal.SIGKILL] * steps + [0]
    for step in range(1, steps + 1):
        path = tmp_path / f"killed-{step}"
        if step > 3:
            acknowledged = max(0, step - 4) // 8 * 3
            store = MemoryStore.open(path)
            assert store.verify()["documents"] == len(store)
            assert acknowledged <= len(store) <= acknowledged + 3
            assert list(store.ids) == names(len(store))
        fill(path)
        whole = MemoryStore.open(path)
        whole.verify()
        assert list(whole.ids) == names(9)
        assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "readers.lock", "shards", "writer.lock"]
        assert len(list((path / "shards").iterdir())) == 6


STEPS_OF_LIFE = 128  # as many file operations as killing.changes() takes


def assert_whole(folder: Path, step: int) -> None:
    """What was acknowledged is in the killed store, once; what was begun is whole; a writer goes on."""
    path, done = folder / f"killed-{step}", folder / f"killed-{step}.done"
    acknowledged = done.stat().st_size if done.exists() else 0  # it may have died before it began
    store = MemoryStore.open(path)
    store.verify()
    found = {document.id: document.text for document in store}
    states = [list(state_after(acknowledged + more).items()) for more in (0, 1)]
    assert list(found.items()) in states, (step, acknowledged)
    assert list(store.ids) == list(found)
    assert store.memory(range(len(store))).equal(StandIn().compress(list(found.values())).bfloat16()), step
    with store:  # a writer goes on as if nothing had been
        store.add(["after"], ["After."], StandIn().compress(["After."]))
        store.compact()
    assert list(MemoryStore.open(path).ids) == [*found, "after"]
    assert len(list((path / "shards").iterdir())) == 2, "leftovers"


@pytest.mark.parametrize("moments", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_of_a_stores_life(tmp_path, monkeypatch, moments):
    """Adding, updating, deleting, compacting: what was acknowledged is there, once, and what was begun is whole."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    steps = sorted(random.sample(range(1, STEPS_OF_LIFE + 1), moments))
    assert killed("live", tmp_path, [*steps, 10_000]) == [-signal.SIGKILL] * moments + [0], steps
    for step in steps:
        assert_whole(tmp_path, step)
    assert [(d.id, d.text) for d in MemoryStore.open(tmp_path / "killed-10000")] == list(state_after(9).items())


@pytest.mark.slow
def test_killed_by_the_clock(tmp_path, monkeypatch):
    """Not between steps, but whenever it falls, in the middle of a write too, with the disk's real waits."""
    seeds = random.sample(range(10_000), 50)
    codes = killed("clock", tmp_path, seeds)
    assert set(codes) <= {-signal.SIGKILL, 0}
    assert codes.count(-signal.SIGKILL) > 25, "hardly any was killed before it had finished"
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for seed in seeds:
        assert_whole(tmp_path, seed)


@pytest.mark.parametrize(("call", "late", "kept"), [(1, False, 10), (3, False, 10), (3, True, 12)])
def test_an_interrupt_leaves_the_store_as_the_disk_has_it(filled, model, monkeypatch, call, late, kept):
    """Ctrl-C around a rename: before the manifest's (the third) the shard is gone, after it, there."""
    replace, calls = os.replace, 0

    def interrupted(source, target):
        nonlocal calls
        calls += 1
        if late:
            replace(source, target)
        if calls == call:
            raise KeyboardInterrupt
        if not late:
            replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            filled.add(names(2, 10), texts(2, 10), model.compress(texts(2, 10)))
    assert len(filled) == len(filled.ids) == len(MemoryStore.open(filled.path)) == kept
    filled.add(names(2, kept), texts(2, kept), model.compress(texts(2, kept)))
    filled.verify()
    assert list(filled.ids) == names(kept + 2)
    assert len(list((filled.path / "shards").iterdir())) == 2 * filled.stats()["shards"]
    filled.close()


# Other processes.


HOLDER = """
import sys
from standin import StandIn
from clara_fast.store import MemoryStore
with MemoryStore.open(sys.argv[1]) as store:
    store.add(["held"], ["Held."], StandIn().compress(["Held."]))
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_and_readers_are_not(filled, model):
    command = [sys.executable, "-c", HOLDER, filled.path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": Path(__file__).parent}
    with subprocess.Popen(command, **pipes) as holder:
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(
            StoreLockedError,
            match=rf"written by another process \(pid {holder.pid} on {re.escape(socket.gethostname())}\)",
        ):
            filled.add(["x"], ["X."], model.compress(["X."]))
        assert len(MemoryStore.open(filled.path).search(model.encode_queries(["X."]), 11)[0]) == 11
        holder.stdin.close()
    filled.add(["x"], ["X."], model.compress(["X."]))
    assert list(filled.ids)[-2:] == ["held", "x"]
    filled.close()


def test_two_stores_in_one_process_are_two_writers(tmp_path, model):
    with MemoryStore.create(tmp_path / "s", model) as first:
        second = MemoryStore.open(tmp_path / "s", model)
        with pytest.raises(StoreLockedError):
            second.add(["x"], ["X."], model.compress(["X."]))
        with pytest.raises(StoreLockedError):
            MemoryStore.create(tmp_path / "s", model)
    second.add(["x"], ["X."], model.compress(["X."]))
    second.close()
    assert len(first) == 0


# Damage.


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
@pytest.mark.parametrize("harm", [flip, truncate, remove, scramble])
def test_a_damaged_shard_is_named_and_the_rest_stays_readable(filled, model, harm, suffix):
    harm(filled.path / "shards" / f"00001.{suffix}")
    store = MemoryStore.open(filled.path, model)
    with pytest.raises(StoreDamagedError, match=rf"shards/00001.{suffix} is damaged: .*--repair") as caught:
        store.verify()
    assert caught.value.shards == ["00001"]
    assert len(caught.value.problems) == 1
    assert store.memory([0, 9]).shape == (2, 4, 8)
    assert [d.id for d in store.documents([0, 9])] == ["doc-0", "doc-9"]
    if harm is not flip:
        use = store.topk if suffix == "safetensors" else store.search
        with pytest.raises(StoreDamagedError, match=f"00001.{suffix}"):
            use(model.encode_queries(texts(1)), 10)

    assert store.repair() == ["00001"]
    assert list(store.ids) == names(4) + names(2, 8)
    assert store.repair() == []
    store.add(names(4, 4), texts(4, 4), model.compress(texts(4, 4)))
    store.close()
    again = MemoryStore.open(filled.path, model)
    assert again.verify()["documents"] == 10
    assert {hit.id for hit in again.search(model.encode_queries(texts(1)), 10)[0]} == set(names(10))


def test_a_file_of_another_shard_in_its_place(filled):
    shards = filled.path / "shards"
    shutil.copy(shards / "00000.safetensors", shards / "00001.safetensors")
    shutil.copy(shards / "00000.parquet", shards / "00002.parquet")
    with pytest.raises(StoreDamagedError, match=r"00001.safetensors .*\(and 1 more damaged files\)") as caught:
        MemoryStore.open(filled.path).verify()
    assert caught.value.shards == ["00001", "00002"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "manifest.json is damaged: not JSON"),
        (b"\xff\xfe", "manifest.json is damaged: not JSON"),
        (b"[]", "does not describe a memory store"),
        (b'{"format": "other"}', "does not describe a memory store"),
        (b'{"format": "clara_fast.memory_store", "version": 1}', "manifest.json is damaged: KeyError"),
        (
            b'{"format": "clara_fast.memory_store", "version": 3}',
            "format version 3, this clara_fast reads versions up to 2",
        ),
    ],
)
def test_a_damaged_manifest(filled, content, message):
    (filled.path / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match=message):
        MemoryStore.open(filled.path)


def test_a_manifest_cannot_reach_outside_the_store(filled):
    file = filled.path / "manifest.json"
    content = json.loads(file.read_text())
    content["shards"][0]["memory"]["file"] = "../../secret.safetensors"
    file.write_text(json.dumps(content))
    with pytest.raises(StoreDamagedError, match="is not the name of a shard's file"):
        MemoryStore.open(filled.path)


def test_leftovers_go_and_foreign_files_stay(filled, model):
    shards = filled.path / "shards"
    for name in ("00003.safetensors", "00003.parquet.tmp", "00007.safetensors.tmp", "notes.txt", "7.parquet"):
        (shards / name).write_text("x")
    assert len(MemoryStore.open(filled.path)) == 10
    filled.add(["x"], ["X."], model.compress(["X."]))
    filled.close()
    left = {file.name for file in shards.iterdir()}
    assert {"notes.txt", "7.parquet", "00003.safetensors", "00003.parquet"} <= left
    assert len(left) == 8 + 2
    filled.verify()


# Disks.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("mounting a small file system needs root on Linux")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mount refused: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(small_disk, model):
    with MemoryStore.create(small_disk / "s", model) as store:
        with pytest.raises(StoreError, match=r"cannot write to .*: No space left on device"):  # noqa: PT012
            for start in range(0, 100_000, 100):
                store.add(names(100, start), texts(100, start), model.compress(texts(100, start)))
        count = len(store)
        assert count >= 100
        assert store.verify()["documents"] == count == len(store.ids)
        assert len(list((store.path / "shards").iterdir())) == 2 * store.stats()["shards"]


def test_a_file_size_limit(filled, model):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(StoreError, match=r"cannot write to .*: File too large"):
            filled.add(names(100, 100), texts(100, 100), model.compress(texts(100, 100)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert filled.verify()["documents"] == 10
    filled.add(names(100, 100), texts(100, 100), model.compress(texts(100, 100)))
    filled.close()
    assert len(MemoryStore.open(filled.path)) == 110


def test_a_read_only_folder_can_be_read(small_disk, model):
    with MemoryStore.create(small_disk / "s", model) as store:
        store.add(names(3), texts(3), model.compress(texts(3)))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    store = MemoryStore.open(small_disk / "s", model)
    assert store.verify()["documents"] == 3
    assert store.search(model.encode_queries(texts(1)), 1)[0][0].id == "doc-0"
    with pytest.raises(StoreError, match=r"cannot write to .*: Read-only file system"):
        store.add(["x"], ["X."], model.compress(["X."]))
    with pytest.raises(StoreError, match=r"cannot write to .*: Read-only file system"):
        MemoryStore.create(small_disk / "t", model)
