from __future__ import annotations

import json
import os
from importlib.resources import files

import pytest

from clara_fast import Clara
from clara_fast.cli import main
from tests.modeling.tiny import make_base

os.environ.setdefault("HF_HUB_OFFLINE", "1")
PASSAGES = files("clara_fast") / "assets/demo/passages.jsonl"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random base model of two layers."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def model(tmp_path_factory, base):
    """Folder of a Clara on it; what it says is noise, but always the same noise."""
    folder = tmp_path_factory.mktemp("models") / "model"
    clara = Clara.from_base(base, doc_max_length=64, lora={"r": 2, "alpha": 4}, device="cpu")
    clara.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """20 passages as JSON lines."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("\n".join(PASSAGES.read_text().splitlines()[:20]))
    return path


@pytest.fixture(scope="session")
def store(tmp_path_factory, model, corpus):
    """The corpus, compressed by the command."""
    folder = tmp_path_factory.mktemp("stores") / "store"
    assert main(["compress", str(corpus), "--model", str(model), "--out", str(folder), "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def run(capsys):
    """Runs a command in this process; returns exit code, stdout (parsed, with ``--json``) and stderr."""

    def call(*args):
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in args and code == 0 else out, err

    return call
