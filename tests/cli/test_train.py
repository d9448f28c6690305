"""`clara-fast train` from the command line, on a tiny base: a run that is interrupted goes on where it stopped."""

from __future__ import annotations

import inspect
import json
import socket
import subprocess
import sys

import pytest

from clara_fast import Clara
from clara_fast.cli import main, train, train_options
from clara_fast.cli.train_config import make_arguments, read_config, shipped_configs
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


def test_instruct_compress_and_train_jointly(base, tmp_path, capsys):
    documents = [f"{t.title()}\nThe {t} is here." for t in THINGS]
    questions = [
        {
            "id": t,
            "question": f"Where is the {t}?",
            "docs": documents[: i + 1],
            "gold_answer": "here",
            "answer": f"The {t} is here.",
            "pos_index": [i],
        }
        for i, t in enumerate(THINGS)
    ]
    train = write(tmp_path / "train.jsonl", questions)
    model = Clara.from_base(base, doc_max_length=32, lora={"r": 2, "alpha": 4}, device="cpu", dtype="float32")
    model.save_pretrained(tmp_path / "scp")
    settings = tmp_path / "small.yaml"
    settings.write_text("max_steps: 9\nbatch_size: 3\neval_every: 2\nlearning_rate: 1e-3\nlogging_steps: 1\n")
    common = ["--config", str(settings), "--eval", train, "--steps", "2", "--json"]
    tuned, joint = str(tmp_path / "tuned"), str(tmp_path / "joint")
    assert main(["train", "instruct", train, "--model", str(tmp_path / "scp"), "--out", tuned, *common]) == 0
    log = json.loads(capsys.readouterr().out)["log"]
    assert [e["eval_loss_full_text"] for e in log if "eval_loss" in e]

    store = str(tmp_path / "store")
    assert main(["compress", train, "--text-field", "docs", "--model", tuned, "--out", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == len(THINGS)
    command = ["train", "joint", train, "--model", tuned, "--top-k", "2", *common]
    assert main([*command, "--out", joint, "--store", store, "--eval-answers", "3", "--report-to", "tensorboard"]) == 0
    assert list((tmp_path / "joint").glob("runs/*/events.out.tfevents.*"))
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 2, "the command line counts before the file"
    assert {"eval_recall@1", "eval_loss_other_memory", "eval_em", "eval_f1", "eval_cover", "mfu"} <= {
        key for entry in report["log"] for key in entry
    }
    assert [e["grad_norm_query_reasoner"] for e in report["log"] if "loss" in e]
    assert main([*command, "--out", joint, "--store", store, "--candidates", "search", "--steps", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    assert main([*command, "--out", str(tmp_path / "other")]) == 0, "compressing at every step is the other way"
    capsys.readouterr()
    assert main(["ask", store, "Where is the bell?", "--model", joint, "--json", "--top-k", "2"]) == 0
    assert main([*command, "--out", joint, "--candidates", "search"]) == 2
    assert "need a store" in capsys.readouterr().err


@pytest.mark.slow
def test_launchers_start_the_same_run(base, tmp_path):
    """torchrun's two processes and accelerate's end with the same weights: one process would need twice the steps."""
    rows = [{"id": t, "docs": [f"The {t} is red."], "question": ["Which?"], "answers": ["red"]} for t in THINGS]
    data = write(tmp_path / "train.jsonl", rows)
    arguments = ["-m", "clara_fast.cli", "train", "scp", data, "--base", str(base), "--batch-size", "3", "--json"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    two = ["--multi_gpu", "--num_processes", "2", "--main_process_port", port]
    launchers = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": ["accelerate.commands.launch", *two],
    }
    for name, launcher in launchers.items():
        command = [sys.executable, "-m", *launcher, *arguments, "--out", str(tmp_path / name)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        assert json.loads(printed.stdout)["steps"] == 1, "of two batches with all six samples"
    for file in tmp_path.glob("torchrun/**/*.safetensors"):
        same = tmp_path / "accelerate" / file.relative_to(tmp_path / "torchrun")
        assert same.read_bytes() == file.read_bytes()
    assert (tmp_path / "torchrun" / "checkpoint-1" / "rng_state_1.pth").is_file()


def test_reports_that_cannot_be_made(monkeypatch):
    assert train_options.reports("none") == ["none"]
    assert train_options.reports("tensorboard") == ["tensorboard"]
    with pytest.raises(ValueError, match=r"report_to \(tensorbord\) must be none or some of .*tensorboard, .*wandb"):
        train_options.reports("tensorboard, tensorbord")
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", list)
    with pytest.raises(ImportError, match=r"report_to \(wandb\) needs .*: pip install clara-fast\[wandb\]"):
        train_options.reports("wandb")


class TestConfig:
    @pytest.mark.parametrize("name", sorted(shipped_configs()))
    def test_what_comes_along_is_understood(self, name, tmp_path):
        """Every setting is an option of its command or an argument of its stage, and the stage accepts it."""
        from clara_fast import training

        stage = name.partition("_")[0]
        cls = {"scp": "Scp", "instruct": "Instruction", "joint": "Joint"}[stage]
        command = next(c for c in train.app.registered_commands if c.name == stage)
        options = set(inspect.signature(command.callback).parameters)
        content = read_config(name)
        arguments = {key: value for key, value in content.items() if key not in options}
        made = make_arguments(
            getattr(training, f"{cls}TrainingArguments"), {"output_dir": str(tmp_path), **arguments}, name
        )
        assert all(getattr(made, key) == value for key, value in arguments.items() if "checkpointing" not in key)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("- 1", "must hold a mapping"),
            ("{", "is not YAML"),
            ("weight_decay: heavy", "bad.yaml sets weight_decay ('heavy'), which must be a number"),
            ("colour: red", "sets colour: neither an option of this command nor of transformers"),
        ],
    )
    def test_bad_files(self, tmp_path, capsys, content, message):
        rows = write(tmp_path / "train.jsonl", [{"question": "Who?", "docs": ["Ann came."], "gold_answer": "Ann"}])
        (tmp_path / "bad.yaml").write_text(content)
        command = ["train", "instruct", rows, "--model", "x", "--out", str(tmp_path / "out"), "--config"]
        assert main([*command, str(tmp_path / "bad.yaml")]) == 2
        assert message in capsys.readouterr().err
        assert main([*command, "nothing"]) == 2
        assert "config nothing is neither a file nor one of instruct_mistral-7b" in capsys.readouterr().err

    def test_they_are_listed(self, capsys):
        assert main(["train", "configs"]) == 0
        assert "joint_smollm2-135m" in capsys.readouterr().out


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
