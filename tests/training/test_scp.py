"""SCP training on a tiny model: it learns, resumes, reports its controls, and names bad data."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import TrainerCallback

from clara_fast import Clara, ScpTrainer
from clara_fast.data import ScpSample, read_scp
from clara_fast.evaluation.controls import CONTROLS, answer_losses
from clara_fast.training import ScpTrainingArguments
from clara_fast.training.collation import ScpCollator, question_branches
from tests.modeling.tiny import make_base

COLOURS = ["red", "blue", "green", "black", "white", "brown"]
SAMPLES = [
    ScpSample(f"s{i}", f"The {thing} is {colour}.", [colour], ["Which colour?"])
    for i, (thing, colour) in enumerate(
        (thing, colour) for thing in ("door", "boat", "lamp", "coat") for colour in COLOURS
    )
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), "mistral")


def new_model(base):
    torch.manual_seed(0)
    lora = {"r": 8, "alpha": 16, "dropout": 0.0}
    return Clara.from_base(base, doc_max_length=32, compression_rate=16, lora=lora, device="cpu")


def arguments(folder, **options):
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return ScpTrainingArguments(**{**settings, **options})


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name or "memory_" in name}


def test_killed_and_resumed_run_equals_the_unbroken_one(base, tmp_path):
    unbroken = ScpTrainer(new_model(base), arguments(tmp_path / "a"), SAMPLES)
    unbroken.train()
    broken = ScpTrainer(new_model(base), arguments(tmp_path / "b"), SAMPLES)
    broken.add_callback(StopAfter(4))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = ScpTrainer(new_model(base), arguments(tmp_path / "b"), SAMPLES)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert losses_of(resumed)[-3:] == losses_of(unbroken)[-3:]
    expected = adapters_of(unbroken.model)
    for name, tensor in adapters_of(resumed.model).items():
        assert torch.equal(tensor, expected[name]), name


def test_it_learns_to_read_the_memory(base, tmp_path):
    """The answer is in the document alone, so only a memory that is read can bring the loss down to nothing."""
    model = new_model(base)
    trainer = ScpTrainer(
        model,
        arguments(tmp_path, max_steps=60, save_strategy="no", per_device_train_batch_size=24, max_grad_norm=1.0),
        SAMPLES,
        SAMPLES,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss_memory"] < 0.1
    assert metrics["eval_loss_other_memory"] > metrics["eval_loss_memory"] + 1.0
    assert metrics["eval_loss"] == metrics["eval_loss_memory"]
    assert {f"eval_loss_{name}" for name in CONTROLS} <= metrics.keys()


def test_answers_at_evaluation_and_the_log_in_tensorboard(base, tmp_path, monkeypatch):
    """What memory teaches shows in EM, F1 and cover match; TensorBoard's own files hold what the log holds."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    options = {"max_steps": 40, "per_device_train_batch_size": 24, "max_grad_norm": 1.0, "eval_answers": 5}
    options |= {"report_to": ["tensorboard"], "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 20}
    trainer = ScpTrainer(new_model(base), arguments(tmp_path, **options), SAMPLES, SAMPLES)
    before = trainer.evaluate()
    assert before["eval_em"] == 0
    trainer.train()
    after = [entry for entry in trainer.state.log_history if "eval_em" in entry][-1]
    # Answers of one word, alone: all three agree, and are as good as the loss says.
    assert after["eval_loss"] < 0.1
    assert after["eval_em"] == after["eval_f1"] == after["eval_cover"] == 1

    events = event_accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    written = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    names = ["loss", "mfu", "tokens_per_second", "peak_memory_gib", "grad_norm_compressor", "grad_norm_generator"]
    for name in names:
        logged = {e["step"]: e[name] for e in trainer.state.log_history if name in e}
        assert logged.keys() == set(range(1, 41))
        assert all(value > 0 for value in logged.values())
        assert written[f"train/{name}"] == pytest.approx(logged, rel=1e-6)
    for name in ("em", "f1", "cover", *(f"loss_{control}" for control in CONTROLS)):
        logged = {e["step"]: e[f"eval_{name}"] for e in trainer.state.log_history if f"eval_{name}" in e}
        assert {20, 40} == logged.keys()
        # The Trainer's own log starts anew with the training; TensorBoard's has the evaluation before it too.
        assert written[f"eval/{name}"] == pytest.approx({0: before[f"eval_{name}"], **logged}, rel=1e-6)


def test_accumulated_steps_equal_one_large_batch(base, tmp_path):
    """Losses are averaged over answer tokens of the whole step, however it is cut into batches."""
    uneven = [
        ScpSample(f"u{i}", f"The {w} is here.", ["a " * (3 * i + 1) + "b"], ["Which?"])
        for i, w in enumerate(COLOURS[:4])
    ]
    results = []
    for batch, accumulate in ((4, 1), (1, 4)):
        model = new_model(base)
        options = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": batch}
        trainer = ScpTrainer(model, arguments(tmp_path / str(batch), max_steps=2, **options), uneven)
        trainer.train()
        results.append(adapters_of(model))
    for name, tensor in results[0].items():
        assert torch.allclose(tensor, results[1][name], rtol=0, atol=2e-4), name


def test_what_trains_and_at_which_rate(base, tmp_path):
    model = new_model(base)
    model.add_role("query_reasoner")
    frozen = ScpTrainer(model, arguments(tmp_path, memory_learning_rate=0.0), SAMPLES)
    assert 0.0 in {group["lr"] for group in frozen.create_optimizer().param_groups}
    trainer = ScpTrainer(model, arguments(tmp_path, memory_learning_rate=0.5), SAMPLES)
    rates = {group["lr"]: group["params"] for group in trainer.create_optimizer().param_groups}
    assert rates[0.5] == [model.memory_embeddings] or rates[0.5][0] is model.memory_embeddings
    assert sum(len(group) for group in rates.values()) == 1 + 2 * (2 * 7 * 2)
    assert not any("query_reasoner" in n for n, p in model.named_parameters() if p.requires_grad)


def test_collator_targets(base):
    model = new_model(base)
    sample = ScpSample("x", "The door is red and the boat is blue.", ["red", "blue"], ["Door?", "Boat?"])
    plain = ScpCollator(model)([sample])
    answers = model.tokenizer.decode(plain["labels"][plain["labels"] != -100])
    assert answers == "red<|im_end|>\nblue<|im_end|>\n"
    sequence = ScpCollator(model, questions="sequence")([sample])
    answers = model.tokenizer.decode(sequence["labels"][sequence["labels"] != -100])
    assert answers == "Question: Door?\nAnswer: red\nQuestion: Boat?\nAnswer: blue<|im_end|>\n"
    whole = ScpCollator(model, reconstruction=1.0)([sample])
    answers = model.tokenizer.decode(whole["labels"][whole["labels"] != -100])
    assert answers == f"{sample.document}<|im_end|>\n"
    paraphrase = ScpCollator(model)([ScpSample("p", "The door is red.", ["A red door."])])
    answers = model.tokenizer.decode(paraphrase["labels"][paraphrase["labels"] != -100])
    assert answers == "A red door.<|im_end|>\n"


def test_controls_are_what_they_say(base):
    """Each control's loss equals the loss of its prompt computed alone, without packing."""
    model = new_model(base)
    model.memory_embeddings.data.normal_(generator=torch.Generator().manual_seed(0))
    samples = SAMPLES[:3]
    losses = answer_losses(model, samples, batch_size=2)
    with torch.no_grad():
        total, count = {"full_text": 0.0, "no_context": 0.0}, 0
        for sample in samples:
            for name, documents in (("full_text", [sample.document]), ("no_context", [])):
                group = question_branches(model, sample.pairs, documents=documents)
                prompt, answer = group.branches[0]
                ids = torch.tensor([[*group.context, *prompt, *answer]])
                logits = model.lm(ids).logits[0, -len(answer) - 1 : -1].float()
                total[name] += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
            count += len(answer)
    # The generator is untrained, so with and without its adapter are the same numbers here.
    assert losses["full_text"] == pytest.approx(total["full_text"] / count, rel=1e-4)
    assert losses["no_context"] == pytest.approx(total["no_context"] / count, rel=1e-4)
    assert losses["memory"] != losses["other_memory"]
    with pytest.raises(ValueError, match="at least two samples"):
        answer_losses(model, samples[:1])


GOOD = {"data_type": "qa", "docs": ["Text."], "question": ["Q?"], "answers": ["A"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: must be a JSON object"),
        (json.dumps({**GOOD, "docs": []}), "line 2: docs must hold exactly one passage"),
        (json.dumps({**GOOD, "docs": [" "]}), "line 2: docs must hold exactly one passage"),
        (json.dumps({**GOOD, "answers": []}), "line 2: answers must hold at least one answer"),
        (json.dumps({**GOOD, "question": ["Q?", "R?"]}), "line 2: 2 questions and 1 answers"),
        (json.dumps({**GOOD, "data_type": "poem"}), "line 2: data_type .'poem'."),
    ],
)
def test_bad_rows_are_named(tmp_path, line, message):
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"train.jsonl, {message}"):
        read_scp(file)


def test_missing_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl does not exist"):
        read_scp(tmp_path / "nowhere.jsonl")


class StopAfter(TrainerCallback):
    """What Ctrl-C does, at a known step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_that_is_done_stays_as_it_is(base, tmp_path):
    """Three steps of an epoch of six: transformers alone would take a fourth, and save another model."""
    done = ScpTrainer(new_model(base), arguments(tmp_path, max_steps=3), SAMPLES)
    done.train()
    again = ScpTrainer(new_model(base), arguments(tmp_path, max_steps=3), SAMPLES)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    expected = adapters_of(done.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapters_of(again.model).items())


def test_several_sets_to_evaluate_on_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match="eval_dataset must be one sequence"):
        ScpTrainer(new_model(base), arguments(tmp_path), SAMPLES, {"a": SAMPLES})
