"""The model's work, ours beside the straightforward baseline: compress, train, answer, and the memory each takes.

    python benchmarks/model.py [--base FOLDER] [--quick] [--json FILE]

Both compute the same thing with the same weights, which is checked before anything is timed. Without ``--base`` the
model is a random Llama, and the output says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
import inputs
from baseline import Baseline
from harness import OURS, Disagreement, Report, require_close

from clara_fast import Clara, ops
from clara_fast.modeling import roles
from clara_fast.modeling.packing import group_prompts
from clara_fast.training.collation import ScpCollator, pack_groups

BASELINE = "baseline"
BARS = {"compress a corpus": 3.0, "SCP step": 2.0, "joint step": 10.0, "answer": 5.0, "peak memory": 2.0}
# Relative errors up to which both count as equal. Gradients pass the softmax at temperature 0.02, which enlarges
# rounding; bfloat16 rounds in different places on the two sides.
LIMITS = {
    torch.float32: {"memory": 1e-4, "loss": 1e-5, "gradient": 2e-3},
    torch.bfloat16: {"memory": 5e-2, "loss": 2e-2, "gradient": 3e-1},
}


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
        self.scp_batch = ScpCollator(model)(work.samples)
        self.query = model.pack([work.question])
        turn = model.prompts.answer(model.text.defuse(work.question), work.size.top_k)
        exchange = model.text.exchange(model.prompts, turn, work.reply)
        self.joint_prompts = pack_groups(model, [group_prompts([exchange])])

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
    """One row of the table: a method that both sides have, how results are compared, documents per call if any."""

    name: str
    what: str
    method: str
    check: Callable[[Task, Ours, Theirs, torch.dtype], str]
    documents: int = 0


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


def measured_alone(arguments: argparse.Namespace, side: str, task: str) -> dict[str, int]:
    """Peak of the resident set while ``side`` does ``task`` once, and what was resident before."""
    command = [sys.executable, __file__, "--base", str(arguments.base), "--dtype", arguments.dtype]
    command += ["--threads", str(arguments.threads), "--memory-file", str(arguments.memory_file)]
    command += ["--alone", side, task, *(["--quick"] if arguments.quick else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} did not finish {task} alone:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_alone(arguments: argparse.Namespace, side: str, task: str) -> None:
    size, dtype = sizes(arguments)
    model = inputs.load_model(arguments.base, doc_max_length=size.doc_max_length, dtype=dtype)
    work = Work(size, load_file(arguments.memory_file)["memory"])
    one = Ours(model, work) if side == OURS else Theirs(model, work)
    del model
    before = harness.reset_peak_memory()
    getattr(one, task)()
    print(json.dumps({"peak": harness.peak_memory(), "before": before}))


# The run


def sizes(arguments: argparse.Namespace) -> tuple[Size, torch.dtype]:
    return QUICK if arguments.quick else Size(), getattr(torch, arguments.dtype)


def measure_time(arguments: argparse.Namespace, base: str) -> Report:
    """Every task on both sides, once to compare the results and then for the clock."""
    size, dtype = sizes(arguments)
    model = inputs.load_model(arguments.base, doc_max_length=size.doc_max_length, dtype=dtype)
    memory = model.compress(inputs.documents(size.candidates))
    save_file({"memory": memory}, arguments.memory_file)
    work = Work(size, memory)
    ours, theirs = Ours(model, work), Theirs(model, work)
    facts = {**harness.machine_facts(), "base": base, "dtype": arguments.dtype, "dropout": 0, **asdict(size)}
    columns = ["work", OURS, BASELINE, "ratio", "ratio of CPU time", "bar", "agreement"]
    report = Report("clara_fast beside the straightforward baseline: median (p20 to p80)", columns, facts)
    report.say_facts()
    for task in tasks(model, work):
        agreement = task.check(task, ours, theirs, dtype)
        calls = {OURS: getattr(ours, task.method), BASELINE: getattr(theirs, task.method)}
        timings = harness.interleaved(calls, arguments.repetitions)
        ratio = timings[BASELINE].median / timings[OURS].median
        cpu_ratio = timings[BASELINE].cpu / timings[OURS].cpu
        rates = [f"; {task.documents / t.median:.3g} docs/s" if task.documents else "" for t in timings.values()]
        cells = [f"{t}{rate}" for t, rate in zip(timings.values(), rates, strict=True)]
        ratios = [f"{ratio:.2f}x", f"{cpu_ratio:.2f}x", _bar(task.name, ratio, arguments.quick)]
        report.add(
            [f"{task.name}: {task.what}", *cells, *ratios, agreement],
            {
                "work": task.name,
                "what": task.what,
                "seconds": {side: asdict(t) for side, t in timings.items()},
                "ratio": ratio,
                "cpu_ratio": cpu_ratio,
                "bar": BARS.get(task.name),
                "agreement": agreement,
            },
        )
    return report


def measure_memory(arguments: argparse.Namespace, report: Report) -> None:
    """Every task on both sides once more, each in a process of its own; one pair of them with ``--quick``."""
    for name, method in MEMORY_TASKS.items() if not arguments.quick else [("SCP step", "scp_step")]:
        alone = {side: measured_alone(arguments, side, method) for side in (OURS, BASELINE)}
        ratio = alone[BASELINE]["peak"] / alone[OURS]["peak"]
        cells = [f"{_mb(a['peak'])} ({_mb(a['peak'] - a['before'])} above rest)" for a in alone.values()]
        report.add(
            [f"peak memory: {name}", *cells, f"{ratio:.2f}x", "", _bar("peak memory", ratio, arguments.quick), ""],
            {"work": f"peak memory: {name}", "bytes": alone, "ratio": ratio, "bar": BARS["peak memory"]},
        )


def _bar(name: str, ratio: float, quick: bool) -> str:
    bar = BARS.get(name)
    # What is overhead on tiny inputs says nothing about a bar.
    return "" if bar is None or quick else f"{bar:g}x {'met' if ratio >= bar else 'missed'}"


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, help="folder of a causal language model (default: a random Llama)")
    parser.add_argument("--layers", type=int, default=6, help="of the random Llama; 30 is SmolLM2-135M's shape")
    parser.add_argument("--quick", action="store_true", help="tiny work, to see that everything runs")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, help="default 3, or 1 with --quick")
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory, which takes eight processes")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--memory-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    parsed.repetitions = parsed.repetitions or (1 if parsed.quick else 3)
    return parsed


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(arguments)
    torch.set_num_threads(parsed.threads)
    # Documents that fill the compressor's length are meant to be cut.
    warnings.filterwarnings("ignore", message=".*were cut to doc_max_length")
    transformers.utils.logging.disable_progress_bar()
    if parsed.alone:
        run_alone(parsed, *parsed.alone)
        return
    with tempfile.TemporaryDirectory() as folder:
        parsed.memory_file = Path(folder) / "memory.safetensors"
        if parsed.base is None:
            parsed.base = Path(folder) / "base"
            base = inputs.write_random_base(parsed.base, parsed.layers, tiny=parsed.quick)
        else:
            base = str(parsed.base)
        report = measure_time(parsed, base)
        if not parsed.no_memory:
            measure_memory(parsed, report)
    report.show()
    report.save(parsed.json)


if __name__ == "__main__":
    main()
