"""The model's work, ours beside the straightforward baseline: compress, train, answer, and the memory each takes.

    python benchmarks/model.py [--only compress] [--base FOLDER] [--device cuda] [--quick] [--json FILE]

Both compute the same thing with the same weights, which is checked before anything is timed. Without ``--base`` the
model is a random Llama, and the output says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from clara_fast import Clara, ops
from clara_fast.benchmarks import inputs, machine
from clara_fast.benchmarks.baseline import Baseline
from clara_fast.benchmarks.harness import (
    OURS,
    Bar,
    Case,
    Contest,
    Disagreement,
    Options,
    Result,
    judge,
    require_close,
    wanted,
)
from clara_fast.benchmarks.report import Report
from clara_fast.benchmarks.setting import LIMITS, Setting, check, options_of, parser_of, prepared
from clara_fast.benchmarks.timing import clock_for
from clara_fast.modeling import roles
from clara_fast.modeling.packing import group_prompts
from clara_fast.training.collation import ScpCollator, pack_groups

BASELINE = "baseline"
BARS = {"compress a corpus": 3.0, "SCP step": 2.0, "joint step": 10.0, "answer": 5.0}
MEMORY_BAR = 2.0


@dataclass(frozen=True)
class Size:
    """How much work is done; on both sides as many tokens go through at once as ``batch`` full documents have."""

    documents: int = 24
    full_documents: int = 8
    passages: int = 2
    questions: int = 4
    candidates: int = 20
    top_k: int = 5
    new_tokens: int = 64
    doc_max_length: int = 256
    batch: int = 8


QUICK = Size(documents=6, full_documents=2, questions=3, candidates=6, top_k=2, new_tokens=8, batch=4)


class Work:
    """The inputs that both sides get."""

    def __init__(self, size: Size, memory: Tensor) -> None:
        self.size = size
        self.documents = inputs.documents(size.documents)
        self.full_documents = inputs.full_documents(size.full_documents)
        self.samples = inputs.samples(size.passages, size.questions)
        self.candidates = inputs.documents(size.candidates)
        # The candidates' memories, as a store would hold them.
        self.memory = memory
        self.question, self.reply = self.samples[0].questions[0], self.samples[0].answers[0]
        self.generation = {"max_new_tokens": size.new_tokens, "min_new_tokens": size.new_tokens}


class Ours:
    """clara_fast doing the work."""

    def __init__(self, model: Clara, work: Work) -> None:
        self.model, self.work = model, work
        self.max_tokens = work.size.batch * (model.text.max_length + model.config.num_memory)
        batch = ScpCollator(model)(work.samples)
        self.scp_batch = {part: batch[part].to(model.device) for part in ("documents", "prompts")}
        self.query = model.pack([work.question]).to(model.device)
        turn = model.prompts.answer(model.text.defuse(work.question), work.size.top_k)
        exchange = model.text.exchange(model.prompts, turn, work.reply)
        self.joint_prompts = pack_groups(model, [group_prompts([exchange])]).to(model.device)

    def compress(self) -> Tensor:
        return self.model.compress(self.work.documents, max_tokens=self.max_tokens)

    def compress_full(self) -> Tensor:
        return self.model.compress(self.work.full_documents, max_tokens=self.max_tokens)

    def scp_step(self) -> Tensor:
        self.model.train_only("compressor", "generator", "memory_tokens")
        self.model.zero_grad()
        output = self.model(self.scp_batch["documents"], self.scp_batch["prompts"])
        loss = output.lm_loss + 0.1 * output.mse_loss
        loss.backward()
        return loss.detach()

    def joint_step(self) -> tuple[Tensor, list[int]]:
        self.model.train_only("query_reasoner", "generator")
        self.model.zero_grad()
        query, _ = self.model.encode(self.query, "query_reasoner")
        memory = self.work.memory[None]
        selected, indices, _ = ops.select_memory(query.flatten(1), memory.flatten(2), memory, self.work.size.top_k)
        loss = self.model.answer_loss(self.joint_prompts, selected.flatten(0, 2))
        loss.backward()
        return loss.detach(), indices[0].tolist()

    def answer(self) -> tuple[str, list[int]]:
        query = self.model.encode_queries(self.work.question)
        _, rows = ops.cosine_topk(query.flatten(1), self.work.memory.flatten(1), self.work.size.top_k)
        found = self.work.memory[rows[0]]
        return self.model.answer(self.work.question, memory=found, **self.work.generation).text, rows[0].tolist()

    def gradients(self) -> dict[str, Tensor]:
        """By role and name, of what was trained in the last step."""
        return _gradients(lambda role: roles.role_parameters(self.model.lm, role), self.model.memory_embeddings)


class Theirs:
    """The baseline doing the same work."""

    def __init__(self, model: Clara, work: Work) -> None:
        self.model, self.work = Baseline(model), work
        exchanges = [pair for s in work.samples for pair in zip(s.questions, s.answers, strict=True)]
        self.passage_of = [i for i, s in enumerate(work.samples) for _ in s.questions]
        self.passages = self.model.pad_texts([s.document for s in work.samples])
        self.scp_prompts = self.model.pad_exchanges(exchanges, 1)
        self.query = self.model.pad_texts([work.question])
        self.candidates = self.model.pad_texts(work.candidates)
        self.joint_prompts = self.model.pad_exchanges([(work.question, work.reply)], work.size.top_k)

    def compress(self) -> Tensor:
        return self.model.compress(self.work.documents, self.work.size.batch)

    def compress_full(self) -> Tensor:
        return self.model.compress(self.work.full_documents, self.work.size.batch)

    def scp_step(self) -> Tensor:
        self.model.train_only("compressor", "generator", "memory_tokens")
        self.model.zero_grad()
        loss = self.model.scp_loss(self.passages, *self.scp_prompts, self.passage_of)
        loss.backward()
        return loss.detach()

    def joint_step(self) -> tuple[Tensor, list[int]]:
        self.model.train_only("query_reasoner", "generator")
        self.model.zero_grad()
        loss, chosen = self.model.joint_loss(self.query, self.candidates, *self.joint_prompts, self.work.size.top_k)
        loss.backward()
        return loss.detach(), chosen.tolist()

    def answer(self) -> tuple[str, list[int]]:
        size = self.work.size
        return self.model.answer(
            self.work.question, self.work.candidates, size.top_k, size.batch, **self.work.generation
        )

    def gradients(self) -> dict[str, Tensor]:
        return _gradients(self.model.parameters, self.model.memory_tokens)


def _gradients(parameters_of: Callable[[str], dict[str, Any]], memory_tokens: Tensor) -> dict[str, Tensor]:
    found = {
        f"{role}/{name}": parameter.grad
        for role in roles.ROLES
        for name, parameter in parameters_of(role).items()
        if parameter.grad is not None
    }
    return found if memory_tokens.grad is None else {**found, "memory_tokens": memory_tokens.grad}


@dataclass(frozen=True)
class Task:
    """A method that both sides have, what it works on, how results are compared, documents per call if any."""

    name: str
    what: str
    method: str
    check: Callable[[Task, Ours, Theirs, torch.dtype], str]
    documents: int = 0

    def case(self, ours: Ours, theirs: Theirs, dtype: torch.dtype) -> Case:
        return Case(self.name, self.what, partial(self.contest, ours, theirs, dtype))

    def contest(self, ours: Ours, theirs: Theirs, dtype: torch.dtype) -> Contest:
        notes: dict[str, Any] = {"documents": self.documents} if self.documents else {}

        def check(side: str) -> None:
            # One comparison speaks for both.
            if side == OURS:
                notes["agreement"] = self.check(self, ours, theirs, dtype)

        bar = BARS.get(self.name)
        bars = [Bar(f"{bar:g}x the baseline", "ratio", bar)] if bar else []
        calls = {OURS: getattr(ours, self.method), BASELINE: getattr(theirs, self.method)}
        return Contest(calls, check, bars=bars, notes=notes)


def tasks(model: Clara, work: Work) -> list[Task]:
    size = work.size
    lengths = [min(n, size.doc_max_length) for n in model.count_tokens(work.documents)]
    spread = f"{min(lengths)} to {max(lengths)} tokens, {sum(lengths) / len(lengths):.0f} on average"
    many, full = f"{size.documents} documents of {spread}", f"{size.full_documents} documents of {size.doc_max_length}"
    asked = f"{size.passages} passages, {size.questions} questions each, forward and backward"
    joint = f"1 question, {size.candidates} candidates, {size.top_k} selected, forward and backward"
    reply = f"{size.new_tokens} new tokens from {size.top_k} of {size.candidates} documents"
    return [
        Task("compress a corpus", many, "compress", check_memories, size.documents),
        Task("compress full documents", f"{full} tokens", "compress_full", check_memories, size.full_documents),
        Task("SCP step", asked, "scp_step", check_step),
        Task("joint step", joint, "joint_step", check_step),
        Task("answer", reply, "answer", check_answer),
    ]


# Agreement


def check_memories(task: Task, ours: Ours, theirs: Theirs, dtype: torch.dtype) -> str:
    mine, other = (getattr(side, task.method)() for side in (ours, theirs))
    return f"memories differ by {require_close(task.name, mine, other, LIMITS[dtype]['memory']):.0e}"


def check_step(task: Task, ours: Ours, theirs: Theirs, dtype: torch.dtype) -> str:
    """Equal losses, choices of documents, and gradients (of the same parameters, by role)."""
    name = task.name
    if task.method == "scp_step":
        loss, other_loss = ours.scp_step(), theirs.scp_step()
    else:
        (loss, chosen), (other_loss, other_chosen) = ours.joint_step(), theirs.joint_step()
        if chosen != other_chosen:
            raise Disagreement(f"{name}: documents {chosen} and {other_chosen} were selected")
    loss_error = require_close(f"{name}, loss", loss, other_loss, LIMITS[dtype]["loss"])
    mine, other = ours.gradients(), theirs.gradients()
    if mine.keys() != other.keys():
        raise Disagreement(f"{name}: gradients of different parameters: {sorted(mine.keys() ^ other.keys())[:3]}")
    errors = []
    for role in {key.partition("/")[0] for key in mine}:
        keys = [key for key in mine if key.partition("/")[0] == role]
        flat, other_flat = (torch.cat([side[key].flatten() for key in keys]) for side in (mine, other))
        errors.append(require_close(f"{name}, gradient of {role}", flat, other_flat, LIMITS[dtype]["gradient"]))
    return f"loss {float(loss):.5f} by {loss_error:.0e}, gradients by {max(errors):.0e}"


def check_answer(task: Task, ours: Ours, theirs: Theirs, dtype: torch.dtype) -> str:
    """Equal documents; equal texts too in float32 (in bfloat16 greedy decoding parts where logits nearly tie)."""
    (text, rows), (other_text, other_rows) = ours.answer(), theirs.answer()
    if rows != other_rows:
        raise Disagreement(f"{task.name}: documents {rows} and {other_rows} were read")
    if text == other_text:
        return "same text from the same documents"
    if dtype == torch.float32:
        raise Disagreement(f"{task.name}: texts differ: {text!r} and {other_text!r}")
    return "same documents, texts part"


# Memory, each in a process of its own

MEMORY_TASKS = {"compress a corpus": "compress", "SCP step": "scp_step", "joint step": "joint_step", "answer": "answer"}


def memory_result(setting: ModelSetting, name: str) -> Result:
    """What the task itself takes on both sides: its peak less what is there before, weights and libraries.

    Peak and what was there are noted too: on a CPU of the resident set, on a GPU of the allocated memory.
    """
    arguments = [*setting.again(), "--memory-file", setting.memory_file]
    peaks = {side: machine.alone("model", "--alone", side, MEMORY_TASKS[name], *arguments) for side in (OURS, BASELINE)}
    result = Result("peak memory", name, unit="bytes")
    result.measured = {side: float(p["peak"] - p["before"]) for side, p in peaks.items()}
    result.notes["before"] = {side: p["before"] for side, p in peaks.items()}
    result.notes["peak"] = {side: p["peak"] for side, p in peaks.items()}
    shown = [f"{side} {p['peak'] / 1e6:.0f} MB over {p['before'] / 1e6:.0f} MB" for side, p in peaks.items()]
    result.notes["peak over what was there before"] = ", ".join(shown)
    bar = Bar("half the baseline's", "ratio", MEMORY_BAR)
    result.verdicts = [judge(bar, result, quick=setting.options.quick)]
    return result


def run_alone(setting: ModelSetting, side: str, method: str) -> None:
    """The task once, in this process, after one document; prints its peak and what was there before."""
    machine.return_freed_memory()  # from now on: what loading leaves behind would serve the work for nothing
    model = setting.load_model()
    work = Work(setting.size, load_file(setting.memory_file)["memory"].to(model.device))
    one = Ours(model, work) if side == OURS else Theirs(model, work)
    del model
    # What libraries load in their first call is not the work's.
    first = work.documents[:1]
    _ = one.model.compress(first) if isinstance(one, Ours) else one.model.compress(first, batch=1)
    print(json.dumps(machine.peak_of(getattr(one, method), setting.options.device)))


# The run


@dataclass(frozen=True)
class ModelSetting(Setting):
    """With the file of the candidates' memories."""

    memory_file: Path

    @property
    def size(self) -> Size:
        return QUICK if self.options.quick else Size()

    def load_model(self) -> Clara:
        return inputs.load_model(
            self.base, doc_max_length=self.size.doc_max_length, dtype=self.dtype, device=self.options.device
        )


def results(setting: ModelSetting, only: str | None, found: Report) -> Iterator[Result]:
    """Every task on both sides, once to compare the results and then for the clock; then the memory of each."""
    model = setting.load_model()
    memory = model.compress(inputs.documents(setting.size.candidates))
    save_file({"memory": memory.cpu().contiguous()}, setting.memory_file)
    work = Work(setting.size, memory)
    ours, theirs = Ours(model, work), Theirs(model, work)
    # Graphs cannot hold what reads back from the GPU.
    clock = clock_for(setting.options.device, shortest=0.0, capture=False)
    for task in tasks(model, work):
        if wanted(only, task.name):
            yield task.case(ours, theirs, setting.dtype).run(setting.options, clock, found.ceilings)
    for name in MEMORY_TASKS if not setting.options.quick else ("SCP step",):
        if wanted(only, f"peak memory: {name}"):
            yield memory_result(setting, name)


def benchmark(
    options: Options, only: str | None, console: Console, *, base: Path | None = None, layers: int = 6
) -> Report:
    """Run the tasks on the base model in ``base`` or a random one of so many layers; progress goes to ``console``.

    Raises:
        ValueError: no task is called so, or the dtype cannot be.
    """
    check(options, only, [*BARS, "compress full documents", *(f"peak memory: {name}" for name in MEMORY_TASKS)])
    size = QUICK if options.quick else Size()
    with prepared("The model beside the baseline", options, base, layers, size, console) as (found, folder, scratch):
        for result in results(ModelSetting(options, folder, scratch / "memory.safetensors"), only, found):
            found.add(result)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of((__doc__ or "").splitlines()[0])
    parser.add_argument("--memory-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    console = Console(width=max(Console().width, 160), highlight=False)
    try:
        options = options_of(parsed)
        if parsed.alone:
            run_alone(ModelSetting(options, parsed.base, parsed.memory_file), *parsed.alone)
            return 0
        found = benchmark(options, parsed.only, console, base=parsed.base, layers=parsed.layers)
    except ValueError as error:
        parser.error(str(error))
    return found.finish(console, parsed.json)


if __name__ == "__main__":
    sys.exit(main())
