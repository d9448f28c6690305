"""``clara-fast eval`` and ``clara-fast explain``: what they print and write, and how they fail."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.modeling.tiny import DOCUMENTS

ROWS = [
    {"question": f"What is {i}?", "docs": [f"{i}. {d}" for d in DOCUMENTS[:3]], "answers": ["tea"], "pos_index": [1]}
    for i in range(3)
]


@pytest.fixture
def asked(tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_eval(run, asked, model, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "out"
    command = [
        "eval",
        asked,
        "-m",
        model,
        "--max-new-tokens",
        3,
        "--top-k",
        1,
        "--out",
        folder,
        "--methods",
        "none,memory",
    ]
    code, out, err = run(*command)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "asked, 3 questions"
    assert lines[2] == "| context | answer loss | EM | F1 | cover | Recall@1 | Recall@5 |"
    assert [line.split(" | ")[0] for line in lines[4:6]] == ["| no context", "| memory"]
    names = {"predictions.jsonl", "results.json", "report.md", "settings.json", "asked.png"}
    assert {file.name for file in folder.iterdir()} == names
    code, document, _ = run(*command, "--json")
    assert code == 0
    assert document == json.loads((folder / "results.json").read_text())
    assert list(document["settings"]["models"]) == ["model"]
    assert [(r["method"], r["questions"]) for r in document["results"]] == [("none", 3), ("memory", 3)]


def test_eval_of_several_models(run, asked, model, base, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    code, out, err = run("eval", asked, "-m", model, "-m", other, "--base-model", base, "--max-new-tokens", 2,
                         "--methods", "memory,text", "--limit", 2)  # fmt: skip
    assert code == 0, err
    rows = [line.strip("| ").split(" | ") for line in out.splitlines()[4:8]]
    assert [row[:2] for row in rows] == [
        ["model", "memory"], ["model", "full text"], ["other", "memory"], ["other", "full text"]
    ]  # fmt: skip
    assert [row[2:] for row in rows[:2]] == [row[2:] for row in rows[2:]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wikihop"], "'wikihop' is neither a file nor a data set: those are nq, hotpotqa, musique, 2wiki"),
        (["nq", "--data", "nowhere"], "data set 'nq' is not in nowhere: none of multidoc_dev_nq.jsonl"),
        (["ASKED", "--methods", "memory,pisco"], "method ('pisco') must be one of none, other, memory"),
        (["ASKED", "--methods", "infonce"], "method 'infonce' needs --retriever-model"),
        (["ASKED", "--methods", "bm25", "--select", "gold"], "method 'bm25' differs by the documents it chooses"),
        (["ASKED", "--protocol", "best"], "protocol ('best') must be one of normal, oracle"),
        (["ASKED", "--batch-size", "0"], "--batch-size (0) must be at least 1"),
        (["ASKED", "--limit", "0"], "limit (0) must be at least 1"),
        (["ASKED", "--model", "nowhere"], "nowhere does not exist"),
        (["CORPUS"], "corpus.jsonl, line 1: holds no question, but id, title, text"),
        (["ASKED", "ASKED2"], "two files are called asked"),
    ],
)
def test_eval_errors(run, asked, corpus, model, tmp_path, arguments, message):
    twin = tmp_path / "twin" / "asked.jsonl"
    twin.parent.mkdir()
    twin.write_text(asked.read_text())
    files = {"ASKED": asked, "CORPUS": corpus, "ASKED2": twin}
    chosen = [] if "--model" in arguments else ["--model", model]
    code, out, err = run("eval", *(files.get(a, a) for a in arguments), *chosen)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_explain(run, store, model, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "why.png"
    command = ["explain", "Where do terns go?", "--store", store, "--answer", "far", "--candidates", 6, "-k", 2]
    code, out, err = run(*command, "--plot", picture)
    assert code == 0, err
    assert out.startswith("question: Where do terns go?\n")
    assert "loss of the answer 'far'" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, document, _ = run(*command, "--json")
    assert code == 0
    assert [c["selected"] for c in document["candidates"]] == [True, True, False, False, False, False]
    assert len(document["slots"]) == 4
    code, out, err = run("explain", "tea?", "-m", model, "--tokens", 2)
    assert code == 0, err
    assert "\nretrieved\n" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([" "], "the question is empty"),
        (["q?", "--answer", "a"], "an answer teaches the retriever about documents"),
        (["q?", "--document", "d", "--answer", " "], "answer must hold text, but is empty"),
        (["q?", "--document", "d", "-k", "2"], "top_k (2) must be at least 1 and at most the number of documents (1)"),
        (["q?", "--tokens", "0"], "num_tokens (0) must be at least 1"),
        (["q?", "--plot", "why.gif"], "the picture's name (why.gif) must end in .png, .svg, .pdf"),
    ],
)
def test_explain_errors(run, model, arguments, message):
    code, out, err = run("explain", *arguments, "--model", model)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
