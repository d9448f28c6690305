"""Instruction tuning: what trains and on what; and how every trainer stops when numbers go wrong."""

from __future__ import annotations

import pytest
import torch

from clara_fast import Clara, InstructionTrainer, ScpTrainer
from clara_fast.data import QuestionSample
from clara_fast.evaluation.controls import CONTROLS
from clara_fast.modeling import roles
from clara_fast.training import InstructionTrainingArguments, NonFiniteError
from tests.modeling.tiny import make_base
from tests.training import test_scp
from tests.training.test_scp import SAMPLES, StopAfter, adapters_of, losses_of

THINGS = ["door", "boat", "lamp", "coat", "tree", "bell"]
DOCUMENTS = [f"The {thing} is near the {other}." for thing in THINGS for other in THINGS if thing != other]
QUESTIONS = [
    QuestionSample(f"i{i}", f"Where is the {thing}?", DOCUMENTS[i : i + 1 + i % 3], ["near"], "It is near.", [0])
    for i, thing in enumerate(THINGS)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), "mistral")


def new_model(base, dropout=0.0):
    torch.manual_seed(0)
    lora = {"r": 4, "alpha": 8, "dropout": dropout}
    model = Clara.from_base(base, doc_max_length=32, compression_rate=16, lora=lora, device="cpu")
    for role in sorted(model.roles):
        for parameter in roles.role_parameters(model.lm, role).values():
            parameter.data.normal_(std=0.05)
    return model


def arguments(folder, **options):
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "num_documents": 2,
    }
    return InstructionTrainingArguments(**{**settings, **options})


def test_compressor_and_a_fresh_generator_train(base, tmp_path):
    model = new_model(base, dropout=0.1)
    old = adapters_of(model)
    trainer = InstructionTrainer(model, arguments(tmp_path), QUESTIONS)
    fresh = adapters_of(model)
    for name, tensor in fresh.items():
        assert torch.equal(tensor, old[name]) == (".generator." not in name), name
        assert ".lora_B.generator." not in name or not tensor.any()
    trainer.train()
    changed = {n for n, tensor in adapters_of(model).items() if not torch.equal(tensor, fresh[n])}
    assert {name.split(".")[-2] for name in changed} == {"compressor", "generator"}
    assert "memory_embeddings" not in changed
    kept = new_model(base)
    InstructionTrainer(kept, arguments(tmp_path, fresh_generator=False), QUESTIONS)
    assert all(torch.equal(tensor, old[n]) for n, tensor in adapters_of(kept).items())


def test_a_batch_is_all_documents_with_the_teacher_s_answer(base, tmp_path):
    model = new_model(base)
    trainer = InstructionTrainer(model, arguments(tmp_path, fresh_generator=False), QUESTIONS)
    batch = trainer.data_collator(QUESTIONS[1:3])
    assert len(batch["documents"]) == 2 + 2, "three documents are cut to num_documents"
    answers = model.tokenizer.decode(batch["labels"][batch["labels"] != -100])
    assert answers == "It is near.<|im_end|>\n" * 2
    with model.inference():
        loss = trainer.compute_loss(model, batch)
        output = model(model.pack([*DOCUMENTS[1:3], *DOCUMENTS[2:4]]), batch["prompts"])
    assert torch.equal(loss, output.lm_loss + 0.1 * output.mse_loss)
    metrics = InstructionTrainer(model, arguments(tmp_path), QUESTIONS, QUESTIONS).evaluate()
    assert {f"eval_loss_{name}" for name in CONTROLS} <= metrics.keys()


def test_resumed_with_checkpointing_equals_the_unbroken_run_without(base, tmp_path):
    def trainer(name, **options):
        return InstructionTrainer(new_model(base, dropout=0.1), arguments(tmp_path / name, **options), QUESTIONS)

    unbroken = trainer("a")
    unbroken.train()
    broken = trainer("b", gradient_checkpointing=True)
    broken.add_callback(StopAfter(3))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer("b", gradient_checkpointing=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert losses_of(resumed) == pytest.approx(losses_of(unbroken), rel=1e-4)


def test_no_document(base, tmp_path):
    with pytest.raises(ValueError, match="sample e has no document"):
        InstructionTrainer(new_model(base), arguments(tmp_path), [QuestionSample("e", "Who?", [], ["Ann"])])
    with pytest.raises(ValueError, match=r"num_documents \(0\)"):
        InstructionTrainer(new_model(base), arguments(tmp_path, num_documents=0), QUESTIONS)


class TestNonFinite:
    """A loss or gradient that is not finite changes no weight and names where it came from."""

    def broken(self, base, tmp_path, **options):
        trainer = ScpTrainer(new_model(base), test_scp.arguments(tmp_path, save_steps=2, **options), SAMPLES)
        self.before: dict = {}
        forward = trainer.model.forward

        def poisoned(documents, prompts, **kwargs):
            output = forward(documents, prompts, **kwargs)
            # The memory of one document only, however it is packed.
            bad = trainer.model.pack([SAMPLES[5].document]).input_ids
            if trainer.state.global_step == 3 and self.holds(documents.input_ids, bad):
                self.before = adapters_of(trainer.model)
                self.poison(output)
            return output

        trainer.model.forward = poisoned
        return trainer

    @staticmethod
    def holds(tokens, part):
        return (
            any(torch.equal(window, part) for window in tokens.unfold(0, len(part), 1))
            if len(tokens) >= len(part)
            else False
        )

    def test_loss(self, base, tmp_path):
        self.poison = lambda output: setattr(output, "lm_loss", output.lm_loss * float("nan"))
        trainer = self.broken(base, tmp_path, per_device_train_batch_size=24)
        with pytest.raises(NonFiniteError, match=r"step 4: the loss is nan \(samples s5\); .* is .*checkpoint-2") as e:
            trainer.train()
        assert e.value.ids == ["s5"]
        self.check(trainer, tmp_path)

    def test_gradient(self, base, tmp_path):
        self.poison = lambda output: output.memory.register_hook(lambda g: g * float("inf"))
        trainer = self.broken(base, tmp_path, per_device_train_batch_size=12, gradient_accumulation_steps=2)
        with pytest.raises(NonFiniteError, match="step 4: a gradient is not finite") as error:
            trainer.train()
        assert sorted(error.value.ids) == sorted(sample.id for sample in SAMPLES)
        self.check(trainer, tmp_path)

    def check(self, trainer, folder):
        assert all(torch.equal(tensor, self.before[n]) for n, tensor in adapters_of(trainer.model).items())
        assert {file.name for file in folder.glob("checkpoint-*")} == {"checkpoint-2"}
        assert all(tensor.isfinite().all() for tensor in adapters_of(trainer.model).values())

    def test_no_answer_token(self, base, tmp_path):
        trainer = ScpTrainer(new_model(base), test_scp.arguments(tmp_path), SAMPLES)
        batch = trainer.data_collator(SAMPLES[:2])
        batch["prompts"].labels[:] = -100
        with pytest.raises(ValueError, match="holds no answer token"):
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=0)
