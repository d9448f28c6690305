"""Joint training: the loss teaches retrieval, a store changes nothing, runs resume, what is frozen stays."""

from __future__ import annotations

import pytest
import torch

from clara_fast import Clara, JointTrainer, MemoryStore, ops
from clara_fast.data import QuestionSample
from clara_fast.modeling import roles
from clara_fast.store import StoreMismatchError
from clara_fast.training import JointTrainingArguments
from clara_fast.training.candidates import index_candidates, with_positives
from tests.modeling.tiny import DOCUMENTS, make_base
from tests.training.reading import VALUES, make_memories, make_questions, make_reader, token_of
from tests.training.test_scp import StopAfter, losses_of

# Longest first, as compress() packs them: one pack has them in the order of another.
TEXTS = sorted({document[: 40 + 6 * i] for i, document in enumerate(DOCUMENTS)}, key=len, reverse=True)
QUESTIONS = ["What is it made of?", "Who came?", "Where does it lead?", "Which colour?", "When?", "How old is it?"]


def arguments(folder, **options):
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "lr_scheduler_kwargs": None,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "top_k": 2,
        "num_candidates": 4,
    }
    return JointTrainingArguments(**{**settings, **options})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), "mistral")


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """A model whose adapters do something, and which has dropout."""
    torch.manual_seed(0)
    lora = {"r": 4, "alpha": 8, "dropout": 0.1}
    model = Clara.from_base(base, doc_max_length=64, compression_rate=32, lora=lora, device="cpu")
    for role in sorted(model.roles):
        for parameter in roles.role_parameters(model.lm, role).values():
            parameter.data.normal_(std=0.05)
    folder = tmp_path_factory.mktemp("model") / "model"
    model.save_pretrained(folder, adapter_dtype=torch.float32)
    return folder


@pytest.fixture
def model(saved):
    return Clara.from_pretrained(saved, device="cpu")


@pytest.fixture
def store(model, tmp_path):
    return make_store(tmp_path / "store", model)


def make_store(folder, model, dtype="float32"):
    with MemoryStore.create(folder, model, dtype=dtype) as store:
        store.add([str(i) for i in range(len(TEXTS))], TEXTS, model.compress(TEXTS))
    return store


def samples():
    """Six questions; one has fewer candidates than are selected."""
    found = []
    for i, question in enumerate(QUESTIONS):
        documents = TEXTS[i : i + 4] if i else TEXTS[:1]
        found.append(
            QuestionSample(f"j{i}", question, documents, ["It is made of wood."], positives=[len(documents) - 1])
        )
    return found


def step(trainer, batch):
    """Loss and gradients of one batch in training mode, always with the same dropout."""
    trainer.model.train()
    trainer.model.zero_grad()
    torch.manual_seed(0)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(batch))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gradient", [True, False], ids=["with its gradient", "without"])
def test_only_the_answer_teaches_retrieval(tmp_path, gradient, monkeypatch):
    """Nothing but the answer's loss says which memory to read: without the selection's gradient chance remains."""
    if not gradient:
        select = ops.select_memory
        monkeypatch.setattr(ops, "select_memory", lambda query, *a, **k: select(query.detach(), *a, **k))
    model = make_reader(tmp_path / "base")
    # It knows no end: a value is all that there is to say.
    model.lm.generation_config.eos_token_id = [token_of(model.tokenizer, value) for value in VALUES]
    store = make_memories(tmp_path / "store", model)
    settings = arguments(
        tmp_path / "out",
        max_steps=120 if gradient else 25,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        num_candidates=6,
        top_k=1,
        save_strategy="no",
        eval_answers=48,
    )
    questions, held_out = make_questions(3840, 6, seed=1), make_questions(128, 6, seed=2)
    trainer = JointTrainer(model, settings, questions, held_out, store=store)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    norms = [entry.get("grad_norm_query_reasoner") for entry in trainer.state.log_history if "loss" in entry]
    assert before["eval_recall@1"] < 0.35
    if gradient:
        assert after["eval_recall@1"] > 0.95
        assert after["eval_loss_memory"] < 0.2 < 1.0 < after["eval_loss_other_memory"]
        assert all(norm > 0 for norm in norms)
        # The generator reads what is retrieved: it answers as often as retrieval is right.
        assert before["eval_em"] < 0.5 < 0.85 < after["eval_em"] <= after["eval_cover"]
        assert all(entry["tokens_per_second"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    else:
        assert after["eval_recall@1"] == before["eval_recall@1"]
        assert not any(norms)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_store_changes_nothing(saved, tmp_path, dtype):
    model = Clara.from_pretrained(saved, dtype=dtype, device="cpu")
    store = make_store(tmp_path / "store", model, dtype)
    batch = [*samples()[:1], QuestionSample("all", "What is it?", TEXTS, ["Wood."])]
    results = []
    for source in (store, None):
        settings = arguments(tmp_path, num_candidates=len(TEXTS))
        trainer = JointTrainer(model, settings, batch, store=source)
        # The longest question first, so that its documents are packed as they were for the store.
        results.append(step(trainer, trainer.train_dataset[::-1]))
    (loss, gradients), (other_loss, other_gradients) = results
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    assert all(torch.equal(g, other_gradients[name]) for name, g in gradients.items())
    assert any(g.any() for name, g in gradients.items() if ".query_reasoner." in name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_store_of_another_dtype_is_taken_at_its_word(model, tmp_path, dtype):
    """The step is that of the numbers in the store, whatever the model computes in."""
    store = make_store(tmp_path / "store", model, dtype)
    trainer = JointTrainer(model, arguments(tmp_path), samples(), store=store)
    batch = trainer.data_collator(trainer.train_dataset)
    with model.inference():
        loss, output = trainer.compute_loss(model, batch, return_outputs=True)
        members, candidates = index_candidates([s.candidates for s in trainer.train_dataset])
        memory = model.compress(TEXTS)[members].to(getattr(torch, dtype)).float()
        expected = model(
            queries=batch["queries"], prompts=batch["prompts"], memory=memory, candidates=candidates, top_k=2
        )
    assert torch.equal(loss, expected.lm_loss)
    assert torch.equal(output.memory, memory)
    assert torch.equal(output.scores, expected.scores)


@pytest.mark.parametrize("copies", [2, 5])
def test_a_text_in_the_store_twice_is_one_candidate(model, tmp_path, copies):
    """As if the store had no copies: for the search, for positives, and for Recall."""
    once = make_store(tmp_path / "once", model)
    memory = model.compress(TEXTS)
    with MemoryStore.create(tmp_path / "often", model, dtype="float32") as often:
        for copy in range(copies):
            often.add([f"{i}-{copy}" for i in range(len(TEXTS))], TEXTS, memory)
    results = []
    for store, name in ((once, "{}"), (often, f"{{}}-{copies - 1}")):
        questions = [
            QuestionSample(f"g{i}", q, [], ["Wood."], gold_ids=[name.format(i)]) for i, q in enumerate(QUESTIONS)
        ]
        settings = arguments(tmp_path, candidates="search", num_candidates=4, top_k=4)
        trainer = JointTrainer(model, settings, questions, questions, store=store)
        trainer.search()
        metrics = trainer.evaluate()
        rows = [trainer._rows(sample) for sample in trainer.train_dataset]
        results.append((rows, {name: value for name, value in metrics.items() if "loss" not in name}))
    assert results[0] == results[1]
    settings = arguments(tmp_path, candidates="search", num_candidates=2 * len(TEXTS))
    trainer = JointTrainer(model, settings, questions, store=often)
    trainer.search()
    assert all(sorted(rows) == list(range(len(TEXTS))) for rows in trainer._found.tolist())


def test_only_query_reasoner_and_generator_train(model, store, tmp_path):
    assert "query_reasoner" not in model.roles
    trainer = JointTrainer(model, arguments(tmp_path), samples())
    assert all(
        torch.equal(p, roles.role_parameters(model.lm, "compressor")[name])
        for name, p in roles.role_parameters(model.lm, "query_reasoner").items()
    )
    _, gradients = step(trainer, trainer.train_dataset)
    assert {name.split(".")[-2] for name in gradients} == {"query_reasoner", "generator"}
    assert len(gradients) == 2 * 2 * 7 * 2
    model.train()
    packed = model.pack(TEXTS)
    memory, _ = model.encode(packed, "compressor")
    assert not memory.requires_grad
    assert torch.equal(memory, model.compress(TEXTS)), "the frozen compressor has no dropout"


def test_fewer_candidates_than_are_selected(model, store, tmp_path):
    """A ragged batch is worth what its questions are worth one by one."""
    trainer = JointTrainer(model, arguments(tmp_path), samples()[:3], store=store)
    items = trainer.train_dataset
    assert [len(s.candidates) for s in items] == [1, 4, 4]
    counts, sums = [], []
    with model.inference():
        for item in items:
            batch = trainer.data_collator([item])
            counts.append(int((batch["labels"] != -100).sum()))
            sums.append(float(trainer.compute_loss(model, batch)) * counts[-1])
        together, output = trainer.compute_loss(model, trainer.data_collator(items), return_outputs=True)
    assert float(together) == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert (output.indices >= 0).sum(1).tolist() == [1, 2, 2]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, store, tmp_path, reentrant):
    trainer = JointTrainer(model, arguments(tmp_path), samples(), store=store)
    loss, plain = step(trainer, trainer.train_dataset)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    other_loss, checkpointed = step(trainer, trainer.train_dataset)
    assert torch.allclose(loss, other_loss)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, checkpointed[name], rtol=0, atol=1e-5 * float(gradient.abs().max())), name


@pytest.mark.parametrize("candidates", ["data", "search"])
def test_resumed_run_equals_the_unbroken_one(saved, tmp_path, candidates):
    """The search falls between the checkpoint and the interruption's other side: its result is part of the state."""

    def trainer(folder):
        model = Clara.from_pretrained(saved, device="cpu")
        options = {"candidates": candidates, "search_every": 2, "gradient_accumulation_steps": 2}
        return JointTrainer(model, arguments(folder, **options), samples(), store=store)

    store = make_store(tmp_path / "store", Clara.from_pretrained(saved, device="cpu"))
    unbroken = trainer(tmp_path / "a")
    unbroken.train()
    broken = trainer(tmp_path / "b")
    broken.add_callback(StopAfter(4))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert losses_of(resumed) == losses_of(unbroken)
    for (name, p), (_, expected) in zip(
        resumed.model.named_parameters(), unbroken.model.named_parameters(), strict=True
    ):
        assert torch.equal(p, expected), name
    assert resumed.model.fingerprint == store.model.fingerprint, "the store stays valid"


def test_searched_candidates_follow_the_query_reasoner(model, store, tmp_path):
    settings = arguments(tmp_path, candidates="search", max_steps=3, search_every=2, top_k=1, num_candidates=3)
    questions = [QuestionSample(f"g{i}", q, [], ["Wood."], gold_ids=[str(i)]) for i, q in enumerate(QUESTIONS)]
    trainer = JointTrainer(model, settings, questions, questions, store=store)
    searched = []
    search = trainer.search
    trainer.search = lambda: searched.append(trainer.state.global_step) or search()
    trainer.train()
    assert searched == [0, 2]
    with torch.no_grad():
        for parameter in roles.role_parameters(model.lm, "query_reasoner").values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    before = trainer._found.clone()
    search()
    assert not torch.equal(before, trainer._found)
    expected = store.topk(model.encode_queries(QUESTIONS), 3)[1]
    assert torch.equal(trainer._found, expected)
    for i, item in enumerate(trainer.train_dataset):
        rows = trainer._rows(item)
        assert i in rows
        assert len(set(rows)) == 3
    metrics = trainer.evaluate()
    found = [i in row[:1] for i, row in enumerate(expected.tolist())]
    assert metrics["eval_recall@1"] == pytest.approx(sum(found) / 6)


def test_evaluation_names_retrieval_and_controls(model, store, tmp_path):
    for source in (store, None):
        trainer = JointTrainer(model, arguments(tmp_path), samples(), samples(), store=source)
        metrics = trainer.evaluate()
        losses = {f"eval_loss_{name}" for name in ("memory", "other_memory", "no_context", "full_text")}
        assert losses | {"eval_recall@1", "eval_recall@5", "eval_mrr@10", "eval_loss"} <= metrics.keys()
        # The last of the candidates is the positive one of each question.
        with model.inference():
            ranked = [model.rerank(s.question, s.documents)[0].tolist() for s in samples()]
        expected = sum(r[0] == len(r) - 1 for r in ranked) / 6
        assert metrics["eval_recall@1"] == pytest.approx(expected)


def test_candidate_lists():
    members, indices = index_candidates([["a", "b"], ["c"], ["b", "a"]])
    assert members == ["a", "b", "c"]
    assert indices.tolist() == [[0, 1], [2, -1], [1, 0]]
    assert with_positives([5, 6, 7], []) == [5, 6, 7]
    assert with_positives([5, 6, 7], [9]) == [5, 6, 9]
    assert with_positives([5, 6, 7], [7, 9]) == [5, 7, 9]
    assert with_positives([5, 6, 7], [1, 2, 3, 4]) == [1, 2, 3]
    sample = QuestionSample("x", "?", list("abcdef"), ["A"], positives=[5, 1])
    assert sample.chosen(3) == [0, 1, 5]
    assert sample.chosen(3, keep_positives=False) == [0, 1, 2]
    assert sample.chosen(20) == [0, 1, 2, 3, 4, 5]


class TestBadInput:
    def test_a_store_of_another_compressor(self, base, store, tmp_path):
        other = Clara.from_base(base, doc_max_length=64, compression_rate=32, device="cpu")
        with pytest.raises(StoreMismatchError, match="fingerprint"):
            JointTrainer(other, arguments(tmp_path), samples(), store=store)

    def test_a_document_that_the_store_lacks(self, model, store, tmp_path):
        foreign = QuestionSample("f", "Who?", [TEXTS[0], "Nobody compressed this."], ["Ann"])
        with pytest.raises(ValueError, match=r"sample f: docs\[1\] \('Nobody compressed this.'\) is not in the store"):
            JointTrainer(model, arguments(tmp_path), [foreign], store=store)
        foreign = QuestionSample("f", "Who?", [], ["Ann"], gold_ids=["nobody"])
        with pytest.raises(ValueError, match="sample f: gold_ids names 'nobody'"):
            JointTrainer(model, arguments(tmp_path, candidates="search"), [foreign], store=store)

    @pytest.mark.parametrize("stored", [True, False])
    def test_no_candidates(self, model, store, tmp_path, stored):
        empty = QuestionSample("e", "Who?", [], ["Ann"])
        with pytest.raises(ValueError, match="sample e has no candidate documents"):
            JointTrainer(model, arguments(tmp_path), [empty], store=store if stored else None)

    def test_settings(self, model, store, tmp_path):
        with pytest.raises(ValueError, match=r"candidates \('search'\) need a store"):
            JointTrainer(model, arguments(tmp_path, candidates="search"), samples())
        with pytest.raises(ValueError, match=r"num_candidates \(4\) must be at least top_k \(5\)"):
            JointTrainer(model, arguments(tmp_path, top_k=None), samples(), store=store)
        with pytest.raises(ValueError, match=r"candidates \('web'\) must be 'data' or 'search'"):
            arguments(tmp_path, candidates="web")
        with pytest.raises(ValueError, match=r"search_every \(0\)"):
            arguments(tmp_path, search_every=0)
        with pytest.raises(ValueError, match="documents or their memory, not both"):
            model(model.pack(TEXTS), memory=torch.zeros(1, 2, 32))
