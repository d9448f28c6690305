"""Update, delete, compact; readers that see one state while a writer goes on; copies out and in."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from harm import flip, remove, truncate
from safetensors.torch import load_file, save_file
from standin import StandIn, names, texts
from test_memory_store import brute_force

from clara_fast.store import MemoryStore, StoreDamagedError, StoreError, StoreMismatchError


def files(store):
    return sorted(file.name for file in (store.path / "shards").iterdir())


def test_update_and_delete(filled, model):
    with filled:
        filled.update(["doc-6", "doc-1"], ["New six.", {"title": "T", "text": "New one."}], model.compress(texts(2)))
        assert [d.id for d in filled] == [n for n in names(10) if n not in ("doc-1", "doc-6")] + ["doc-6", "doc-1"]
        filled.delete(["doc-0", "doc-9", "doc-6"])
        left = ["doc-2", "doc-3", "doc-4", "doc-5", "doc-7", "doc-8", "doc-1"]
        assert list(filled.ids) == [d.id for d in filled] == left
        assert [filled.ids[name] for name in left] == list(range(7))
        assert "doc-0" not in filled.ids
    again = MemoryStore.open(filled.path, model)
    assert again.verify()["deleted"] == 5
    filled.refresh()  # it needs nothing older
    assert len(again) == 7
    assert [again.documents([row])[0].id for row in range(7)] == left
    assert again.documents([6])[0].text == "New one."
    memory = model.compress([texts(10)[int(name[4:])] for name in left[:6]] + texts(1, 1)).bfloat16()
    assert again.memory(range(7)).equal(memory)
    assert again.memory([5, 0]).equal(memory[[5, 0]])
    with again:
        again.add(["doc-0"], ["Back."], model.compress(["Back."]))  # its name is free again
        assert again.ids["doc-0"] == 7
        again.delete(left)
        assert [d.text for d in again] == ["Back."]
        filled.refresh()
        again.delete(["doc-0"])
        filled.refresh()
    with MemoryStore.open(filled.path) as again:
        again.lock()
        assert len(again) == again.stats()["shards"] == len(files(again)) == 0


def test_what_update_and_delete_refuse(filled, model):
    with filled:
        for change in (
            lambda: filled.delete(["doc-1", "doc-77"]),
            lambda: filled.update(["doc-1", "doc-77"], texts(2), model.compress(texts(2))),
        ):
            with pytest.raises(ValueError, match="ids not in the store: 'doc-77'"):
                change()
        with pytest.raises(TypeError, match="ids must be a list of strings"):
            filled.delete("doc-1")
        with pytest.raises(ValueError, match=r"ids\[1\] \('doc-1'\) is given twice"):
            filled.update(["doc-1", "doc-1"], texts(2), model.compress(texts(2)))
        filled.delete(["doc-1", "doc-1"])
    assert list(filled.ids) == ["doc-0", *names(8, 2)]


def test_deleted_documents_are_never_found(tmp_path):
    """From none to all but one deleted, in any shard, for few and for many results; without them, exact."""
    model = StandIn(num_memory=2, hidden_size=16)
    torch.manual_seed(0)
    memory, queries = torch.randn(240, 2, 16), torch.randn(5, 2, 16)
    memory[7::40] = memory[3]  # ties over shards
    queries[2] = memory[3]
    left = list(range(240))
    with MemoryStore.create(tmp_path / "s", model, dtype="float32") as store:
        for start, stop in ((0, 100), (100, 103), (103, 240)):
            store.add(names(stop - start, start), texts(stop - start, start), memory[start:stop])
        order = np.random.default_rng(0).permutation(240).tolist()
        for count in (1, 30, 60, 60, 60, 28):
            gone, order = order[:count], order[count:]
            store.delete([f"doc-{i}" for i in gone])
            left = [i for i in left if i not in set(gone)]
            for k in sorted({1, min(7, len(left)), len(left)}):
                scores, rows = store.topk(queries, k)
                expected, expected_rows = brute_force(memory[left], queries, k)
                torch.testing.assert_close(scores.double(), expected, rtol=0, atol=2e-6)
                assert rows.equal(expected_rows)
            assert [d.id for d in store] == [f"doc-{i}" for i in left]
        assert len(left) == 1
        with pytest.raises(ValueError, match=r"k \(2\) must be at most the number of documents \(1\)"):
            store.topk(queries, 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_compact(tmp_path, dtype):
    model = StandIn(num_memory=2, hidden_size=64)
    with MemoryStore.create(tmp_path / "s", model, dtype=dtype, pooled_keys=True) as store:
        for start in range(0, 60, 6):
            store.add(names(6, start), texts(6, start), model.compress(texts(6, start)))
        store.delete(["doc-2", "doc-13", *names(6, 18)])
        documents, memory = list(store), store.memory(range(52))
        found = store.topk(memory.float(), 9), store.topk(memory.float(), 9, keys="pooled")
        before = store.stats()
        assert store.compact(shard_documents=20) == 3
        assert store.stats()["shards"] == 3
        assert store.stats()["deleted"] == 0
        assert store.stats()["memory_bytes"] < before["memory_bytes"]
        assert len(files(store)) == 6
        assert list(store) == documents
        assert store.memory(range(52)).equal(memory)
        again = store.topk(memory.float(), 9), store.topk(memory.float(), 9, keys="pooled")
        for was, now in zip(found, again, strict=True):
            assert was[0].equal(now[0])
            assert was[1].equal(now[1])
        assert store.compact(shard_documents=20) == 0
        assert store.compact() == 1
        store.verify()
        with pytest.raises(ValueError, match=r"shard_documents \(0\) must be at least 1"):
            store.compact(shard_documents=0)
    assert list(MemoryStore.open(store.path)) == documents


def test_readers_keep_their_state_while_a_writer_goes_on(filled, model):
    """Also what they had not yet read: a file stays until the last reader that needs it is gone."""
    reader, other = MemoryStore.open(filled.path), MemoryStore.open(filled.path)
    expected = model.compress(texts(10)).bfloat16()
    with MemoryStore.open(filled.path, model) as writer:
        writer.delete(["doc-0", "doc-5"])
        writer.update(["doc-3"], ["Three."], model.compress(["Three."]))
        assert writer.compact() == 1
        assert len(files(writer)) > 2
        assert [d.id for d in reader] == names(10)
        assert reader.memory(range(10)).equal(expected)
        assert reader.verify()["documents"] == 10

        assert reader.refresh() is True
        assert reader.refresh() is False
        assert [d.id for d in reader] == [d.id for d in writer]
        writer.add(["x"], ["X."], model.compress(["X."]))
        writer.delete(["x"])
        assert len(files(writer)) > 2  # for the other reader
        assert other.documents([0])[0].id == "doc-0"
        del other
        filled.refresh()
        writer.add(["x"], ["X."], model.compress(["X."]))
        reader.refresh()
        writer.delete(["x"])
        assert len(reader) == 9
        assert reader.documents([8])[0].id == "x"
        reader.refresh()
        filled.refresh()
    with MemoryStore.open(reader.path) as writer:
        writer.lock()  # begins by removing what nobody needs
        assert len(files(writer)) == 2
        assert len(reader) == 8


def test_opening_while_a_writer_replaces_everything(filled, model):
    """A reader that read the manifest just before it was replaced looks again."""
    import threading

    stop = threading.Event()

    def write():
        with MemoryStore.open(filled.path, model) as writer:
            turn = 0
            while not stop.is_set():
                turn += 1
                writer.update(["doc-0"], [f"Turn {turn}."], model.compress(["Turn."]))
                writer.compact()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(60):
            store = MemoryStore.open(filled.path)
            assert {d.id for d in store} == set(names(10))
            assert store.memory(range(10)).isfinite().all()
    finally:
        stop.set()
        thread.join()
    filled.refresh()
    filled.verify()


def as_version_1(path):
    """Rewrite a store as the first version had it."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["version"] = 1
    for key in ("generation", "pooled_keys"):
        del manifest[key]
    for shard in manifest["shards"]:
        del shard["deleted"]
        file = path / "shards" / shard["memory"]["file"]
        save_file({"memory": load_file(file)["memory"]}, file)
        import hashlib

        shard["memory"] |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "readers.lock").unlink()


def test_a_store_of_version_1_is_read_as_it_is_and_written_as_version_2(filled, model):
    as_version_1(filled.path)
    old = MemoryStore.open(filled.path, model)
    assert old.verify()["format_version"] == 1
    assert list(old.ids) == names(10)
    assert old.ids["doc-8"] == 8
    assert old.topk(old.memory(range(10)).float(), 1)[1].flatten().tolist() == list(range(10))
    with old:
        with pytest.raises(ValueError, match="ids already in the store: 'doc-4'"):
            old.add(["doc-4"], ["X."], model.compress(["X."]))
        assert json.loads((filled.path / "manifest.json").read_text())["version"] == 1
        old.delete(["doc-4"])
        assert json.loads((filled.path / "manifest.json").read_text())["version"] == 2
        old.compact()
    new = MemoryStore.open(filled.path, model)
    assert new.verify()["format_version"] == 2
    assert list(new.ids) == [name for name in names(10) if name != "doc-4"]


# Out and in


def test_export_and_import(filled, model, tmp_path):
    with filled:
        filled.delete(["doc-2"])
    assert filled.export(tmp_path / "out", shard_documents=5) == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "00000.parquet", "00000.safetensors", "00001.parquet", "00001.safetensors"
    ]  # fmt: skip
    assert load_file(tmp_path / "out" / "00001.safetensors")["memory"].equal(filled.memory(range(5, 9)))
    assert pq.read_table(tmp_path / "out" / "00000.parquet").column("id").to_pylist() == list(filled.ids)[:5]
    back = MemoryStore.import_from(tmp_path / "out", tmp_path / "back", model)
    back.verify()
    assert list(back) == list(filled)
    assert back.memory(range(9)).equal(filled.memory(range(9)))
    assert back.model == filled.model
    with pytest.raises(StoreMismatchError, match="was written by another model"):
        MemoryStore.import_from(tmp_path / "out", tmp_path / "other", StandIn(name="b"))
    assert not (tmp_path / "other").exists()


def test_import_of_files_by_others(filled, model, tmp_path):
    filled.export(tmp_path / "out")
    file = tmp_path / "out" / "00000.safetensors"
    memory = load_file(file)["memory"]
    save_file({"memory": memory}, file)
    with pytest.raises(StoreError, match="does not say which model wrote it"):
        MemoryStore.import_from(tmp_path / "out", tmp_path / "new")
    assert list(MemoryStore.import_from(tmp_path / "out", tmp_path / "new", model).ids) == names(10)

    cases = {
        "hold NaN": lambda: save_file({"memory": memory.clone().fill_(torch.nan)}, file),
        r"'memory' is BF16 \[9, 4, 8\], not \[10, m, D\]": lambda: save_file({"memory": memory[:9].clone()}, file),
        "holds no tensor 'memory'": lambda: save_file({"keys": memory}, file),
        "is damaged": lambda: file.write_bytes(b"x" * 100),
        "ids appear twice: 'doc-0'": lambda: [
            save_file({"memory": memory}, file),
            *(
                shutil.copy(file.with_suffix(suffix), file.with_name("again").with_suffix(suffix))
                for suffix in (".safetensors", ".parquet")
            ),
        ],
        "00000.parquet is missing": lambda: file.with_suffix(".parquet").unlink(),
    }
    for message, spoil in cases.items():
        spoil()
        with pytest.raises((StoreError, StoreDamagedError), match=message):
            MemoryStore.import_from(tmp_path / "out", tmp_path / "bad", model)
        assert not (tmp_path / "bad").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out", "store"]


# Damage to what deletions add


@pytest.mark.parametrize("harm", [flip, truncate, remove])
def test_a_damaged_list_of_deleted_rows_harms_its_shard_alone(filled, harm):
    with filled:
        filled.delete(["doc-5"])
    harm(filled.path / "shards" / "00001.deleted-1.safetensors")
    store = MemoryStore.open(filled.path)
    with pytest.raises(StoreDamagedError, match=r"00001.deleted-1.safetensors is damaged"):
        store.verify()
    assert [d.id for d in store.documents([0, 7])] == ["doc-0", "doc-8"]
    with store:
        assert store.repair() == ["00001"]
    assert list(store.ids) == names(4) + names(2, 8)


def test_lookups_cost_no_object_per_document(filled):
    """The digests decide, not a dictionary: a lookup reads no documents' file."""
    for file in (filled.path / "shards").glob("*.parquet"):
        file.unlink()
    assert filled.ids["doc-7"] == 7
    assert filled.ids.rows_of(["doc-9", "nothing", "doc-0"]).tolist() == [9, -1, 0]
    assert 7 not in filled.ids
