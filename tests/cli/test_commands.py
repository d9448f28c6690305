"""The commands on a real, tiny model: what they print, in words and as JSON, and how they fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clara_fast import Clara, MemoryStore
from clara_fast.cli import main
from clara_fast.store import parent_text


def test_help_and_wrong_use_do_not_import_torch():
    script = (
        "import sys\nfrom clara_fast.cli import main\n"
        "for args in (['--help'], ['compress', '--help'], ['train', 'scp', '--help'], ['--version']):\n"
        "    assert main(args) == 0, args\n"
        "for args in ([], ['nonsense'], ['ask'], ['search', '-k', 'x', 's', 'q']):\n"
        "    assert main(args) == 2, args\n"
        "assert not {'torch', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Exit codes" in run.stdout
    assert "error: No such command 'nonsense'. (see clara-fast --help)\n" in run.stderr


def test_compress_again_adds_nothing_and_needs_no_model_option(run, store, corpus, model):
    code, result, err = run("compress", corpus, "--out", store, "--json")
    assert (code, err) == (0, "")
    assert (result["added"], result["skipped"], result["documents"], result["shards"]) == (0, 20, 20, 1)
    assert set(result["timings"]) == {"load", "compress"}
    assert MemoryStore.open(store).model.loaded_from == {"name_or_path": str(model)}


@pytest.mark.filterwarnings("ignore:.*doc_max_length")
def test_compress_writes_what_the_model_says(store, model):
    clara = Clara.from_pretrained(model, device="cpu")
    opened = MemoryStore.open(store, clara)
    documents = list(opened)
    memory = clara.compress([f"{d.title}\n{d.text}" for d in documents])
    error = (opened.memory(range(20)).float() - memory).abs().max()
    assert error <= memory.abs().max() / 128
    assert documents[1].id == "arctic-tern"


def test_compress_reports_documents_that_are_too_long(run, tmp_path, model, corpus):
    code, result, err = run("compress", corpus, "-m", model, "-o", tmp_path / "s", "--limit", 3, "--json")
    assert code == 0
    assert result["added"] == result["truncated"] == 3
    assert err == (
        "warning: 3 of 3 documents are longer than 64 tokens; only their beginnings were compressed "
        "(--chunk 64 keeps all of them)\n"
    )


def test_compress_takes_a_folder(run, tmp_path, model):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("# Ants\nAnts carry leaves.")
    (tmp_path / "notes" / "b.txt").write_text("Bees make honey.")
    code, out, _ = run("compress", tmp_path / "notes", "-m", model, "-o", tmp_path / "s")
    assert code == 0
    assert "2 documents added" in out
    assert "clara-fast ask" in out
    assert [(d.id, d.title, d.text) for d in MemoryStore.open(tmp_path / "s")] == [
        ("a.md", "Ants", "Ants carry leaves."),
        ("b.txt", "b", "Bees make honey."),
    ]


def test_search(run, store, model):
    code, result, err = run("search", store, "arctic birds", "a famous bridge", "-k", 3, "--json")
    assert code == 0, err
    assert [entry["query"] for entry in result["results"]] == ["arctic birds", "a famous bridge"]
    hits = result["results"][0]["hits"]
    assert set(hits[0]) == {"row", "id", "score", "title", "text", "metadata"}
    clara = Clara.from_pretrained(model, device="cpu")
    expected = MemoryStore.open(store, clara).search(clara.encode_queries("arctic birds"), 3)[0]
    assert [hit["id"] for hit in hits] == [hit.id for hit in expected]
    assert [hit["score"] for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-6)
    code, out, _ = run("search", store, "arctic birds")
    assert f"  1. {hits[0]['score']:.4f}  {hits[0]['id']}  {hits[0]['title']}" in out.splitlines()
    assert sum(line.startswith("  ") and ". " in line[:5] for line in out.splitlines()) == 5
    assert "20 documents; load" in out


def test_ask(run, store, model):
    code, result, _ = run("ask", store, "Where do terns fly?", "--top-k", 2, "--max-new-tokens", 5, "--json")
    assert code == 0
    assert set(result) == {"question", "answer", "documents", "timings"}
    assert set(result["timings"]) == {"load", "query", "search", "generate"}
    clara = Clara.from_pretrained(model, device="cpu")
    expected = clara.answer("Where do terns fly?", store=MemoryStore.open(store), top_k=2, max_new_tokens=5)
    assert result["answer"] == expected.text
    assert [document["id"] for document in result["documents"]] == [d.id for d in expected.documents]
    code, out, _ = run("ask", store, "Where do terns fly?", "-k", 2, "--max-new-tokens", 5)
    assert out.startswith(expected.text + "\n\n  1. ")
    assert "generate" in out.splitlines()[-1]


def test_inspect(run, store, model):
    code, facts, _ = run("inspect", store, "--verify", "--json")
    assert code == 0
    assert (facts["kind"], facts["documents"], facts["num_memory"], facts["dtype"]) == (
        "store",
        20,
        4,
        "bfloat16",
    )
    assert facts["first_documents"][0]["id"] == "emperor-penguin"
    assert facts["verified_in_seconds"] > 0
    code, facts, _ = run("inspect", model, "--json")
    assert (facts["kind"], facts["config"]["compression_rate"]) == ("model", 16)
    adapter = next(f for f in facts["files"] if f["file"] == "compressor/adapter_model.safetensors")
    assert adapter["parameters"] > 0
    for path in (store, model):
        assert run("inspect", path)[0] == 0


def test_info(run):
    code, facts, _ = run("info", "--json")
    assert code == 0
    assert facts["packages"]["torch"]
    assert "cpu" in facts["devices"]
    assert facts["native"]
    assert "torch" in run("info")[1]


def test_bad_input_is_one_line_and_code_2(run, store, model, tmp_path, corpus):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": no}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"id": "e", "text": "  "}\n')
    new = ["--model", model, "--out", tmp_path / "new"]
    cases = [
        (["compress", bad, *new], "bad.jsonl, line 2 is not JSON"),
        (["compress", empty, *new], "line 1: document 'e' is empty"),
        (["compress", tmp_path / "none.jsonl", *new], "none.jsonl does not exist"),
        (["compress", corpus, *new, "--batch-tokens", 0], "batch_tokens (0) must be at least 1"),
        (["compress", corpus, "--out", tmp_path / "other"], "--model is missing"),
        (["compress", corpus, "--model", tmp_path, "--out", tmp_path / "other"], "holds no config.json"),
        (["search", store, "q", "-k", 21], "k (21) must be at most the number of documents (20)"),
        (["search", tmp_path, "q"], "is not a memory store"),
        (["ask", store, "q", "--top-k", 21], "top_k (21)"),
        (["ask", store, " "], "question is empty"),
        (["ask", store, "q", "--dtype", "int3"], "--dtype (int3) must be"),
        (["ask", store, "q", "--model", tmp_path / "none"], "none does not exist"),
        (["inspect", tmp_path], "neither a store"),
        (["inspect", tmp_path / "none"], "does not exist"),
    ]
    for args, message in cases:
        code, out, err = run(*args)
        assert (code, out) == (2, ""), args
        assert err.startswith("error: "), args
        assert err.count("\n") == 1, err
        assert message in err


def test_a_model_that_did_not_write_the_store(run, store, base, tmp_path, corpus):
    other = Clara.from_base(base, doc_max_length=48, compression_rate=12, lora={"r": 2}, device="cpu")
    other.save_pretrained(tmp_path / "other")
    for args in (["ask", store, "q"], ["search", store, "q"], ["compress", corpus, "--out", store]):
        code, _, err = run(*args, "--model", tmp_path / "other")
        assert code == 2
        assert "was written by another model" in err


def test_failures_are_code_1_and_debug_shows_where(run, store, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    os.truncate(copy / "shards" / "00000.safetensors", 100)
    code, _, err = run("inspect", copy, "--verify")
    assert code == 1
    assert err.startswith("error: ")
    assert "00000.safetensors is damaged" in err
    monkeypatch.setenv("CLARA_FAST_DEBUG", "1")
    assert "Traceback" in run("inspect", copy, "--verify")[2]
    monkeypatch.delenv("CLARA_FAST_DEBUG")
    code, facts, err = run("inspect", copy, "--repair", "--json")
    assert (code, facts["dropped_shards"], facts["documents"]) == (0, ["00000"], 0)


def test_an_error_nobody_foresaw_is_one_line_too(run, store, monkeypatch):
    def broken(path):
        raise TypeError("two\nlines")

    monkeypatch.setattr(MemoryStore, "open", broken)
    code, _, err = run("search", store, "q")
    assert code == 1
    assert err == "error: TypeError: two lines (clara-fast --debug shows where)\n"


def test_ctrl_c_is_code_130(run, store, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(MemoryStore, "open", interrupted)
    code, _, err = run("search", store, "q")
    assert (code, err) == (130, "error: interrupted\n")


def test_a_killed_compress_is_finished_by_running_it_again(tmp_path, model, corpus):
    """Ctrl-C, then kill -9, then to the end: nothing is lost, nothing is there twice."""
    folder = tmp_path / "s"
    command = [sys.executable, Path(__file__).with_name("killing.py"), folder]
    command += ["compress", corpus, "-m", model, "-o", folder, "--shard-size", "1", "--batch-tokens", "80"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    statuses = [tuple(map(int, line.split())) for line in done.stdout.splitlines() if line[0] in "-0123456789"]
    assert [status for status, _ in statuses] == [130, -signal.SIGKILL, 0], done.stderr
    first, second, last = (count for _, count in statuses)
    assert 2 <= first < 20
    assert 6 <= second < 20
    assert last == 20
    assert f"{folder} holds {first} documents; the same command does the rest\nerror: interrupted" in done.stderr
    whole = MemoryStore.open(folder)
    whole.verify()
    assert list(whole.ids) == [json.loads(line)["id"] for line in corpus.read_text().splitlines()]
    assert len(list((folder / "shards").iterdir())) == 2 * whole.stats()["shards"]


def test_main_takes_the_command_line_by_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["clara-fast", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.strip()


def test_long_documents_in_chunks(run, tmp_path, model, corpus):
    """Compress in chunks, find one, see where it stands; nothing is cut off."""
    code, result, err = run("compress", corpus, "-m", model, "-o", tmp_path / "s", "--chunk", 48, "--json")
    assert (code, err) == (0, "")
    assert result["truncated"] == 0
    assert result["added"] == 20 < result["documents"]
    code, out, _ = run("search", tmp_path / "s", "arctic birds", "-k", 2)
    assert re.search(r"  1\. 0\.\d+  \S+#\d+  .* \(part \d+ of \d+ of \S+, characters \d+-\d+\)\n", out)
    store = MemoryStore.open(tmp_path / "s")
    texts = {json.loads(line)["id"]: json.loads(line)["text"] for line in corpus.read_text().splitlines()}
    assert all(parent_text(store, chunk) == texts[chunk.metadata["parent"]] for chunk in store)
    code, _, err = run("compress", corpus, "-m", model, "-o", tmp_path / "t", "--chunk", 65)
    assert (code, "chunk (65) must be at most the model's doc_max_length (64)" in err) == (2, True)


def test_what_is_left_out_is_listed(run, tmp_path, model):
    rows = ['{"id": "a", "text": "Ants carry leaves."}', "{", '{"id": "b", "text": "Ants carry leaves."}']
    (tmp_path / "c.jsonl").write_text("\n".join(rows))
    command = ["compress", tmp_path / "c.jsonl", "-m", model, "-o", tmp_path / "s"]
    assert run(*command)[0] == 2
    code, result, _ = run(*command, "--skip-bad", "--skipped", tmp_path / "left.jsonl", "--json")
    assert (code, result["documents"], result["duplicates"], result["bad"]) == (0, 1, 1, 1)
    bad, duplicate = map(json.loads, (tmp_path / "left.jsonl").read_text().splitlines())
    assert "line 2 is not JSON" in bad["reason"]
    assert (duplicate["reason"], duplicate["id"], duplicate["same_as"]) == ("duplicate", "b", "a")
    assert run(*command, "--keep-duplicates", "--skip-bad", "--json")[1]["documents"] == 2
    code, result, _ = run(
        *command[:-1], tmp_path / "t", "--skip-bad", "--store-dtype", "int8", "--pooled-keys", "--json"
    )
    stats = MemoryStore.open(tmp_path / "t").stats()
    assert (code, stats["dtype"], stats["pooled_keys"]) == (0, "int8", True)
    assert "--pooled-keys: " in run(*command, "--pooled-keys")[2]
    code, _, err = run(*command, "--store-dtype", "int8")
    assert (code, err.count("\n"), "--store-dtype (int8) must be that of" in err) == (2, 1, True)


def test_a_corpus_without_text_is_told_of_before_the_model_is_loaded(run, tmp_path):
    new = ["--model", tmp_path / "no-model", "--out", tmp_path / "s"]
    (tmp_path / "c.jsonl").write_text('{"body": "x"}')
    (tmp_path / "empty.jsonl").write_text("\n")
    for corpus, message in (
        (
            "c.jsonl",
            "no field 'text' with the text (there are: 'body'); name it with text_field (--text-field)",
        ),
        ("empty.jsonl", "holds no document"),
    ):
        code, _, err = run("compress", tmp_path / corpus, *new)
        assert (code, message in err, err.count("\n")) == (2, True, 1)
    assert not (tmp_path / "s").exists()


def test_two_stage_search(run, tmp_path, store):
    pytest.importorskip("faiss", reason="needs the extra 'faiss'")
    shutil.copytree(store, tmp_path / "s")
    assert "has no index" in run("search", tmp_path / "s", "birds", "--index")[2]
    code, result, _ = run("index", tmp_path / "s", "--kind", "Flat", "--json")
    assert (code, result["kind"], result["documents"]) == (0, "Flat", 20)
    code, result, _ = run("search", tmp_path / "s", "birds", "--index", "--candidates", 20, "--compare", "--json")
    assert (code, result["recall"]) == (0, 1.0)
    assert "exact search" in result["timings"]
    code, result, _ = run("index", tmp_path / "s", "--report", "-k", 3, "--candidates", 4, "--candidates", 20, "--json")
    assert [line["candidates"] for line in result["report"]] == [4, 20]
    assert result["report"][0]["recall"] <= result["report"][1]["recall"] == 1
    assert "recall@3 1.0000" in run("index", tmp_path / "s", "--report", "-k", 3, "--candidates", 20)[1]
    code, _, err = run("search", store, "birds", "--candidates", 3)
    assert (code, err) == (2, "error: --candidates is for a search with --index\n")


@pytest.mark.slow
def test_torchrun_shares_a_corpus(tmp_path, model, corpus, store):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "clara_fast"]
    command = ["compress", corpus, "-m", model, "-o", tmp_path / "s", "--device", "cpu", "--json"]
    done = subprocess.run([*launch, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["added"] == 20
    both, one = MemoryStore.open(tmp_path / "s"), MemoryStore.open(store)
    both.verify()
    assert [(d.id, d.text) for d in both] == [(d.id, d.text) for d in one]
    error = (both.memory(range(20)).float() - one.memory(range(20)).float()).abs().max()
    assert error <= one.memory(range(20)).abs().max() / 64
