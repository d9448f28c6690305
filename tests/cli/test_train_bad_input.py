"""What a user can get wrong in `clara-fast train`: one line that names it, and nothing left behind."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from clara_fast import Clara
from clara_fast.cli import main
from tests.modeling.tiny import make_base

DOCUMENTS = [f"The {thing} is here." for thing in ("door", "boat", "lamp")]
GOOD = {"id": "good", "question": "Where is the door?", "docs": DOCUMENTS, "gold_answer": "here", "pos_index": [0]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, another one, and the first one's store of the documents."""
    folder = tmp_path_factory.mktemp("place")
    base = make_base(folder / "base", "mistral")
    for name, seed in (("model", 0), ("other", 1)):
        torch.manual_seed(seed)
        model = Clara.from_base(base, doc_max_length=32, lora={"r": 2, "alpha": 4}, device="cpu", dtype="float32")
        model.save_pretrained(folder / name)
    (folder / "good.jsonl").write_text(json.dumps(GOOD) + "\n")
    compress = ["compress", str(folder / "good.jsonl"), "--text-field", "docs", "--out", str(folder / "store")]
    assert main([*compress, "--model", str(folder / "model"), "--device", "cpu"]) == 0
    return folder


def refused(capsys, out, arguments, code=2):
    """The one line that the command prints."""
    capsys.readouterr()
    assert main(["train", *map(str, arguments), "--out", str(out)]) == code
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert not printed.out
    return errors[0]


@pytest.mark.parametrize("stage", ["instruct", "joint"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold_answer": None}, "line 2: there is no answer: gold_answer, golden_answers, answers or answer must hold"),
        ({"gold_answer": []}, "line 2: there is no answer"),
        ({"gold_answer": " "}, "line 2: gold_answer must hold answers with text"),
        ({"docs": []}, "line 2: docs must hold at least one candidate document"),
        ({"docs": ["The door.", ""]}, "line 2: docs[1] must hold text"),
        ({"pos_index": [3]}, "line 2: pos_index (3) must be at least 0 and below the 3 docs"),
        ({"pos_index": [-1]}, "line 2: pos_index (-1) must be at least 0 and below the 3 docs"),
        ({"question": ""}, "line 2: question must hold one question with text"),
    ],
)
def test_bad_rows(place, tmp_path, capsys, stage, change, message):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "id": "bad", **change}) + "\n")
    error = refused(capsys, tmp_path / "out", [stage, rows, "--model", place / "model"])
    assert f"{rows}, {message}" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 0], "steps (0) must be at least 1, or -1"),
        (["--epochs", 0], "epochs (0.0) must be above 0 and finite"),
        (["--batch-size", 0], "batch_size (0) must be at least 1"),
        (["--accumulate", 0], "accumulate (0) must be at least 1"),
        (["--eval-every", 0], "eval_every (0) must be at least 1"),
        (["--eval-samples", 0], "eval_samples (0) must be at least 1"),
        (["--learning-rate", "nan"], "learning_rate (nan) must be at least 0 and finite"),
        (["--dtype", "float33"], "--dtype (float33) must be"),
        (["--compression-rate", 0], "compression_rate (0) must be"),
        (["--bits", 5], "bits (5) must be 4 or 8"),
        (["--model", "model", "--bits", 4], "bits goes with --base only"),
        (["--model", "model", "--lora-r", 4], "lora_r goes with --base only"),
        (["--max-words", 1], "max_words (1) leaves no passage"),
    ],
)
def test_options(place, tmp_path, capsys, options, message):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"docs": DOCUMENTS[:1], "question": ["Where?"], "answers": ["here"]}) + "\n")
    start = [] if "--model" in options else ["--base", place / "base"]
    assert message in refused(capsys, tmp_path / "out", ["scp", rows, *start, *options])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_this_run_s(place, tmp_path, capsys):
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(GOOD) + "\n")
    common = [rows, "--model", place / "model", "--steps", 1]
    assert main(["train", "joint", *map(str, common), "--out", str(out)]) == 0
    error = refused(capsys, out, ["instruct", *common])
    assert f"{out / 'checkpoint-1'} is of another run, so this one cannot go on from it" in error
    assert "stage (InstructionTrainer) must be JointTrainer" in error
    assert "must be a folder" in refused(capsys, rows, ["joint", *common])
    assert json.loads(rows.read_text()) == GOOD


def test_candidates(place, tmp_path, capsys):
    joint = ["joint", place / "good.jsonl", "--model", place / "model", "--top-k", 2]
    for options, message in (
        (["--num-candidates", 0], "num_candidates (0) must be at least 1"),
        (["--num-candidates", 1], "num_candidates (1) must be at least"),
        (["--candidates", "search"], "candidates ('search') need a store"),
        (["--candidates", "web"], "candidates ('web') must be 'data' or 'search'"),
        (["--store", tmp_path / "nowhere"], "nowhere"),
    ):
        assert message in refused(capsys, tmp_path / "out", [*joint, *options])
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({**GOOD, "docs": [*DOCUMENTS, "Nobody compressed this."]}) + "\n")
    error = refused(capsys, tmp_path / "out", ["joint", rows, "--model", place / "model", "--store", place / "store"])
    assert "sample good: docs[3] ('Nobody compressed this.') is not in the store" in error
    assert not list(tmp_path.glob("out/checkpoint-*"))


def test_a_store_of_another_compressor(place, tmp_path, capsys):
    for stage in (["joint", place / "good.jsonl"], ["retriever", place / "good.jsonl"]):
        error = refused(capsys, tmp_path / "out", [*stage, "--model", place / "other", "--store", place / "store"])
        assert "was written by another model (fingerprint" in error
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite(place, tmp_path, capsys):
    """The third of four questions reaches a document whose memory in the store was damaged to NaN."""
    store = tmp_path / "store"
    things = ("door", "boat", "lamp", "coat")
    rows = [{**GOOD, "id": t, "question": f"Where is the {t}?", "docs": [f"The {t} is red."]} for t in things]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compress = ["compress", str(file), "--text-field", "docs", "--out", str(store), "--model", str(place / "model")]
    assert main([*compress, "--device", "cpu"]) == 0
    (shard,) = store.rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    begin, end = (header + offset for offset in json.loads(data[8:header])["memory"]["data_offsets"])
    row = (end - begin) // len(things)
    data[begin + 2 * row : begin + 3 * row] = b"\xff" * row  # NaN in every floating-point format
    shard.write_bytes(data)
    joint = ["joint", file, "--model", place / "model", "--store", store, "--top-k", 1, "--steps", 4]
    joint += ["--batch-size", 1, "--eval-every", 1]
    error = refused(capsys, tmp_path / "out", joint, 1)
    assert "the loss is nan (samples lamp)" in error
    assert "no weight was changed by it" in error
    kept = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert kept, "the seed puts another question first"
    assert str(kept[-1]) in error
    saved = load_file(kept[-1] / "generator" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
