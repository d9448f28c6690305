"""convert, compact, delete, inspect --plot, search --where: a store's life from the command line."""

from __future__ import annotations

import shutil

import pytest

from clara_fast import MemoryStore


@pytest.fixture
def copy(store, tmp_path):
    return shutil.copytree(store, tmp_path / "copy")


def test_convert_out_and_back(run, store, tmp_path):
    code, result, _ = run("convert", store, "--dtype", "int8", "--pooled-keys", "--out", tmp_path / "small", "--json")
    assert code == 0
    assert (result["documents"], result["dtype"], result["pooled_keys"]) == (20, "int8", True)
    assert result["bytes_per_document"] < result["before"]
    assert run("search", tmp_path / "small", "penguin", "--pooled", "--json")[1]["results"][0]["hits"]

    assert run("convert", tmp_path / "small", "--export", "--out", tmp_path / "files", "--json")[1]["files"] == 2
    code, out, _ = run("convert", tmp_path / "files", "--out", tmp_path / "back")
    assert code == 0
    assert "20 documents" in out
    back, small = MemoryStore.open(tmp_path / "back"), MemoryStore.open(tmp_path / "small")
    assert list(back) == list(small)
    assert back.memory(range(20)).equal(small.memory(range(20)))
    assert run("search", tmp_path / "back", "penguin", "--json")[0] == 0  # the files say which model it was


def test_delete_and_compact(run, copy):
    names = list(MemoryStore.open(copy).ids)
    assert run("delete", copy, names[3], names[5], "--json")[1] == {"store": str(copy), "deleted": 2, "documents": 18}
    code, result, _ = run("compact", copy, "--json")
    assert (code, result["documents"], result["deleted"], result["written"]) == (0, 18, 0, 1)
    assert list(MemoryStore.open(copy).ids) == [name for name in names if name not in (names[3], names[5])]
    assert run("compact", copy)[1].startswith(f"{copy}: 1 shards with ")


def test_inspect_draws(run, store, tmp_path):
    pytest.importorskip("matplotlib")
    code, facts, _ = run("inspect", store, "--plot", tmp_path / "p.png", "--json")
    assert code == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert -1 <= facts["cosines_of_documents"]["min"] <= facts["cosines_of_documents"]["max"] <= 1.0001
    assert facts["memory_token_norms"]["min"] > 0


def test_search_where(run, store):
    found = run("search", store, "penguin", "-k", 20, "--where", '{"id": ["emperor-penguin"]}', "--json")[1]
    assert [hit["id"] for hit in found["results"][0]["hits"]] == ["emperor-penguin"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "STORE", "--dtype", "int3", "--out", "OUT"), "dtype ('int3') must be one of"),
        (("convert", "STORE", "--out", "STORE"), "already exists and is not an empty folder"),
        (("convert", "STORE", "--export", "--dtype", "int8", "--out", "OUT"), "convert first, then export"),
        (("convert", "OUT", "--out", "OUT2"), "holds no .safetensors files"),
        (("delete", "STORE", "nobody"), "ids not in the store: 'nobody'"),
        (("inspect", "STORE", "--plot", "p.txt"), "must end in .png, .svg, .pdf"),
        (("search", "STORE", "q", "--where", "{"), "--where ({) is not JSON"),
        (("search", "STORE", "q", "--where", "[1]"), "--where ([1]) must be a JSON object"),
        (("search", "STORE", "q", "--pooled"), "keeps none; make a store that does"),
    ],
)
def test_errors_are_one_line(run, copy, tmp_path, arguments, message):
    places = {"STORE": copy, "OUT": tmp_path / "out", "OUT2": tmp_path / "out2"}
    code, _, err = run(*(places.get(argument, argument) for argument in arguments))
    assert code != 0
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
