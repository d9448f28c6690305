"""Training runs of one process or several on tiny models, and what each process leaves of them."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
from accelerate.state import AcceleratorState, DistributedType, PartialState

import clara_fast.training as training
from clara_fast import Clara, MemoryStore
from clara_fast.data import QuestionSample, ScpSample
from clara_fast.modeling import roles
from clara_fast.modeling.sharding import is_sharded, plain_name, whole
from tests.modeling.tiny import DOCUMENTS
from tests.ranks import run_ranks

TEXTS = [document[: 30 + 5 * i] for i, document in enumerate(DOCUMENTS)]
ANSWERS = [
    "red",
    "a long way from here",
    "wood",
    "it was not said by whom",
    "1890",
    "nobody knows",
    "up",
    "two of them",
]
SCP = [
    ScpSample(f"s{i}", TEXTS[i], [answer, ANSWERS[i - 1]][: 1 + i % 2], ["Which colour?", "Who?"][: 1 + i % 2])
    for i, answer in enumerate(ANSWERS)
]
QUESTIONS = [
    QuestionSample(f"q{i}", f"What is {i}?", TEXTS[i : i + 1 + i % 4], [answer], positives=[0])
    for i, answer in enumerate(ANSWERS)
]
# What shards the model in FSDP2; the version is the only one that transformers has.
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["MistralDecoderLayer"]}}


@dataclass
class Run:
    """One training run.

    Attributes:
        name: of its folder.
        stage: scp, instruct, joint (from a store), search, fly (joint without a store) or retriever.
        world: processes.
        dtype: of the model.
        options: training arguments.
        resume: go on from the last checkpoint of the folder.
        poison: id of a sample whose loss is made NaN.
        dies: a checkpoint; the first process is killed when all have written it, before it is in its place.
    """

    name: str
    stage: str
    world: int = 1
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    resume: bool = False
    poison: str | None = None
    dies: str | None = None


def run_all(folder: Path, runs: list[Run]) -> None:
    """Run them, each in processes of its own, that leave ``FOLDER/NAME/RANK.pt``: losses, weights, and its error."""
    for run in runs:
        (folder / run.name).mkdir(exist_ok=True)
        survived = run_ranks(run.world, leave_result, folder, run, log=folder / run.name / "log.txt")
        assert survived == (run.dies is None)


def leave_result(folder: Path, run: Run) -> None:
    let_processors_shard()
    found = train(folder, run)
    torch.save(found, folder / run.name / f"{os.environ.get('RANK', '0')}.pt")


def result(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    """What a process left."""
    return torch.load(folder / name / f"{rank}.pt", weights_only=True)


def make_trainer(folder: Path, run: Run) -> Any:
    """The run's trainer on the model in ``folder/model`` and the store in ``folder/store``."""
    model = Clara.from_pretrained(folder / "model", dtype=run.dtype, device="cpu")
    settings = {
        "output_dir": str(folder / run.name / "out"),
        "max_steps": 3,
        "per_device_train_batch_size": 4 // run.world,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "lr_scheduler_kwargs": None,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **run.options,
    }
    store = MemoryStore.open(folder / "store", model) if run.stage in ("joint", "search", "retriever") else None
    if run.stage == "scp":
        return training.ScpTrainer(model, training.ScpTrainingArguments(**settings), SCP, SCP)
    if run.stage == "instruct":
        settings["fresh_generator"] = False
        return training.InstructionTrainer(
            model, training.InstructionTrainingArguments(**settings), QUESTIONS, QUESTIONS
        )
    if run.stage == "retriever":
        samples = [training.RetrieverSample(f"r{i}", s.question, [i]) for i, s in enumerate(QUESTIONS)]
        # As many negatives as the store has: then a question's loss is the same in every batch.
        settings["negatives"] = len(TEXTS)
        return training.RetrieverTrainer(
            model, store, training.RetrieverTrainingArguments(**settings), samples, samples
        )
    settings |= {"top_k": 2, "num_candidates": 3, "candidates": "search" if run.stage == "search" else "data"}
    settings |= {"search_every": 2, "eval_answers": 2 if run.stage == "joint" else 0}
    arguments = training.JointTrainingArguments(**settings)
    return training.JointTrainer(model, arguments, QUESTIONS, QUESTIONS, store=store)


def make_model(folder: Path, base: Path, dropout: float = 0.0) -> None:
    """A model whose adapters do something, with a connector, in ``folder/model``; its store in ``folder/store``."""
    torch.manual_seed(0)
    lora = {"r": 4, "alpha": 8, "dropout": dropout}
    model = Clara.from_base(
        base, doc_max_length=64, compression_rate=32, lora=lora, device="cpu", dtype="float32", connector=True
    )
    for role in sorted(model.roles):
        for parameter in roles.role_parameters(model.lm, role).values():
            parameter.data.normal_(std=0.05)
    model.add_role("query_reasoner", copy_of="compressor")
    model.save_pretrained(folder / "model", adapter_dtype=torch.float32)
    with MemoryStore.create(folder / "store", model, dtype="float32") as store:
        store.add([str(i) for i in range(len(TEXTS))], TEXTS, model.compress(TEXTS))


def train(folder: Path, run: Run) -> dict[str, Any]:
    trainer = make_trainer(folder, run)
    if run.poison is not None:
        poison(trainer, run.poison)
    if run.dies is not None:
        die_at(run.dies)
    found: dict[str, Any] = {"error": None}
    out = Path(trainer.args.output_dir)
    last = training.checkpoints.last_checkpoint(out) if run.resume else None
    found["from"] = last.name if last else None
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        found["eval"] = trainer.evaluate()
        trainer.save_model(str(out / "final"))
    except ArithmeticError as error:
        found["error"] = str(error)
        found["ids"] = error.ids
    found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    found["losses"] = [entry["loss"] for entry in logged]
    found["norms"] = [entry["grad_norm"] for entry in logged]
    found["work"] = [entry[name] for entry in logged for name in ("tokens_per_second", "mfu", "peak_memory_gib")]
    trained = [(n, p) for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters() if p.requires_grad]
    found["sharded"] = all(is_sharded(parameter) for _, parameter in trained)
    found["weights"] = {plain_name(name): whole(parameter.detach()).clone() for name, parameter in trained}
    return found


def poison(trainer: Any, name: str) -> None:
    """Make the loss of batches with the sample ``name`` NaN."""
    compute = trainer.compute_loss

    def poisoned(model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = compute(model, inputs, num_items_in_batch=num_items_in_batch)
        bad = trainer.state.global_step == 1 and any(sample.id == name for sample in inputs["samples"])
        return loss * float("nan") if bad else loss

    trainer.compute_loss = poisoned


def die_at(checkpoint: str) -> None:
    publish = training.checkpoints.publish

    def dying(out: Path, name: str) -> None:
        if name == checkpoint:
            os.kill(os.getpid(), signal.SIGKILL)
        publish(out, name)

    training.checkpoints.publish = dying


def let_processors_shard() -> None:
    """accelerate turns FSDP on for accelerators only: let it do for CPUs what it does for those.

    torch itself shards on CPUs, over gloo.
    """
    init = AcceleratorState.__init__

    def initialised(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = initialised
