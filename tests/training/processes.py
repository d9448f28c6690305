"""Training runs of one process or several: ``python -m tests.training.processes FOLDER`` runs ``FOLDER/runs.json``.

The processes of a run are forked from one that has imported everything. Each leaves ``FOLDER/NAME/RANK.pt``: losses,
weights, and the error that ended it, if there was one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState

import clara_fast.training as training
from clara_fast import Clara, MemoryStore
from clara_fast.data import QuestionSample, ScpSample
from clara_fast.modeling import roles
from clara_fast.modeling.sharding import is_sharded, plain_name, whole
from tests.modeling.tiny import DOCUMENTS

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
    """

    name: str
    stage: str
    world: int = 1
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    resume: bool = False
    poison: str | None = None


def run_all(folder: Path, runs: list[Run], timeout: int = 240) -> None:
    """Run them in a fresh process, which may fork."""
    (folder / "runs.json").write_text(json.dumps([vars(run) for run in runs]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.training.processes", str(folder)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # with what it forked
            raise
    assert process.returncode == 0, printed[-6000:]


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
    settings |= {"search_every": 2}
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
    found: dict[str, Any] = {"error": None}
    out = Path(trainer.args.output_dir)
    last = training.checkpoints.last_checkpoint(out) if run.resume else None
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        found["eval"] = trainer.evaluate()
        trainer.save_model(str(out / "final"))
    except ArithmeticError as error:
        found["error"] = str(error)
        found["ids"] = error.ids
    found["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found["norms"] = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
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


def main(folder: Path) -> None:
    for content in json.loads((folder / "runs.json").read_text()):
        run = Run(**content)
        (folder / run.name).mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = {}
        for rank in range(run.world):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    start(folder, run, rank, port)
                    code = 0
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            children[pid] = rank
        failed = 0
        for _ in range(run.world):
            pid, status = os.wait()
            del children[pid]
            if status and not failed:
                failed = 1
                for other in children:  # it may wait for the one that failed
                    os.kill(other, 9)
        if failed:
            sys.exit(f"run {run.name} failed")


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


def start(folder: Path, run: Run, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    let_processors_shard()
    if run.world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run.world, "LOCAL_WORLD_SIZE": run.world}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        torch.save(train(folder, run), folder / run.name / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
