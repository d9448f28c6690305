"""Contrastive training of the query reasoner against a real store."""

from __future__ import annotations

import json

import pytest
import torch

from clara_fast import Clara, MemoryStore
from clara_fast.training import RetrieverTrainer, RetrieverTrainingArguments, read_questions
from clara_fast.training.retriever import info_nce
from tests.modeling.tiny import make_base

THINGS = ["door", "boat", "lamp", "coat", "tree", "bell", "ship", "road", "ring", "fish", "wall", "song"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    lora = {"r": 8, "alpha": 16, "dropout": 0.0}
    base = make_base(tmp_path_factory.mktemp("base"), "mistral")
    return Clara.from_base(base, doc_max_length=32, compression_rate=16, lora=lora, device="cpu")


@pytest.fixture
def store(model, tmp_path):
    texts = [f"The {thing} number {i} is here." for i, thing in enumerate(THINGS)]
    with MemoryStore.create(tmp_path / "store", model) as store:
        store.add(THINGS, texts, model.compress(texts))
    return MemoryStore.open(tmp_path / "store", model)


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    rows = [{"id": thing, "question": f"Where is the {thing}?", "gold_ids": [thing]} for thing in THINGS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_it_learns_where_to_look_and_leaves_the_memories_alone(model, store, questions, tmp_path):
    samples = read_questions(questions, store)
    fingerprint, generator = model.fingerprint, model.lm.state_dict()
    generator = {name: tensor.clone() for name, tensor in generator.items() if ".generator." in name}
    arguments = RetrieverTrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=30,
        per_device_train_batch_size=12,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = RetrieverTrainer(model, store, arguments, samples, samples)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_recall@1"] == 1.0 > before["eval_recall@1"]
    assert model.fingerprint == fingerprint
    now = model.lm.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in generator.items())
    model.save_pretrained(tmp_path / "saved")
    loaded = Clara.from_pretrained(tmp_path / "saved", device="cpu")
    hits = MemoryStore.open(store.path, loaded).search(loaded.encode_queries("Where is the bell?"), 1)
    assert hits[0][0].id == "bell"


def test_info_nce():
    scores = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    positive = torch.tensor([[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    shares = (scores / 0.5).softmax(1)
    expected = -torch.stack([shares[0, 0].log(), shares[1, 1:3].sum().log(), torch.zeros((), dtype=torch.float64)])
    assert torch.allclose(info_nce(scores, positive, 0.5), expected.sum() / 3)
    assert torch.autograd.gradcheck(lambda s: info_nce(s, positive, 0.5), scores)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"gold_ids": ["door"]}, "line 1: question must hold text"),
        ({"question": "Where?"}, "line 1: gold_ids must name at least one document"),
        ({"question": "Where?", "gold_ids": ["moon"]}, "line 1: gold_ids names 'moon', which the store"),
    ],
)
def test_bad_rows_are_named(store, tmp_path, row, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        read_questions(file, store)


def test_a_store_of_another_compressor_is_refused(model, store, tmp_path):
    other = Clara.from_base(model.config.base_model, doc_max_length=64, compression_rate=32, device="cpu")
    with pytest.raises(ValueError, match="fingerprint"):
        RetrieverTrainer(other, store, RetrieverTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
