"""`clara-fast train` from the command line, on a tiny base: a run that is interrupted goes on where it stopped."""

from __future__ import annotations

import json

import pytest

from clara_fast.cli import main
from tests.modeling.tiny import make_base

THINGS = ["door", "boat", "lamp", "coat", "tree", "bell"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), "mistral")


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_pretrain_compress_train_the_retriever_and_search(base, tmp_path, capsys):
    samples = [
        {
            "id": t,
            "data_type": "qa",
            "docs": [f"The {t} is here."],
            "question": [f"Where is the {t}?"],
            "answers": ["here"],
        }
        for t in THINGS
    ]
    train = write(tmp_path / "train.jsonl", samples)
    out, common = str(tmp_path / "model"), ["--batch-size", "3", "--eval-every", "2"]
    scp = ["train", "scp", train, "--base", str(base), "--out", out, "--eval", train, "--doc-max-length", "32"]
    scp += ["--connector", "--spread", *common]
    assert main([*scp, "--steps", "2"]) == 0
    printed = capsys.readouterr().err
    for control in ("memory", "other memory", "no context", "full text"):
        assert control in printed
    # A kill while a checkpoint was being written leaves one without the Trainer's state: it does not count.
    (tmp_path / "model" / "checkpoint-3").mkdir()
    assert main([*scp, "--steps", "4", "--json"]) == 0
    assert (tmp_path / "model" / "checkpoint-4").is_dir()
    out_text, err_text = capsys.readouterr()
    assert "step 4:" in err_text
    assert json.loads(out_text)["steps"] == 4

    corpus = write(tmp_path / "corpus.jsonl", [{"id": s["id"], "text": s["docs"][0]} for s in samples])
    store = str(tmp_path / "store")
    assert main(["compress", corpus, "--model", out, "--out", store]) == 0
    questions = write(
        tmp_path / "questions.jsonl", [{"question": s["question"][0], "gold_ids": [s["id"]]} for s in samples]
    )
    better = str(tmp_path / "better")
    retriever = ["train", "retriever", questions, "--store", store, "--model", out, "--out", better]
    assert main([*retriever, "--eval", questions, "--steps", "3", *common]) == 0
    capsys.readouterr()
    assert main(["search", store, "Where is the bell?", "--model", better, "--json", "-k", "2"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert len(hits["results"][0]["hits"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl", "--base", "x"], "nowhere.jsonl does not exist"),
        (["nowhere.jsonl"], "exactly one of --base and --model"),
        (["nowhere.jsonl", "--base", "x", "--model", "y"], "exactly one of --base and --model"),
    ],
)
def test_wrong_use_is_one_line(arguments, message, tmp_path, capsys):
    assert main(["train", "scp", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
