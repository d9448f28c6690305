"""Full text beside memories at several rates: compress, search, answer, train, and the memory each takes.

    python benchmarks/end_to_end.py [--rates 4,16,64] [--only answer] [--base FOLDER] [--quick] [--json F] [--plot F]

Both sides are clara_fast on the same base model and the same documents, which are read as text or as memories; so the
ratio is what compression is worth, and not what kernels are. What is timed is checked first: packed against one by one,
cached decoding against whole sequences, search against float64. Without ``--base`` the model is a random Llama.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from clara_fast.benchmarks import inputs, machine, report, roofline
from clara_fast.benchmarks.harness import (
    OURS,
    Case,
    Contest,
    Options,
    Result,
    dtype_name,
)
from clara_fast.benchmarks.model import LIMITS, REPETITIONS, wanted
from clara_fast.benchmarks.ops import add_options
from clara_fast.benchmarks.report import Report
from clara_fast.benchmarks.text_or_memory import QUICK, TEXT, Scene, Size
from clara_fast.benchmarks.timing import clock_for

RATES = (4, 16, 64)
# How far below the largest logit a generated token's may lie: two ways to compute it round differently.
SLACK = {torch.float32: 1e-3, torch.bfloat16: 0.5}


# The run

MEMORY_METHODS = {"answer": "answer", "joint step": "joint_step"}
WORKS = ("compress", "search", "SCP step", "joint step", "answer")


@dataclass(frozen=True)
class Setting:
    """The base model's folder and what it is, and what was asked for."""

    options: Options
    base: Path

    @property
    def size(self) -> Size:
        return QUICK if self.options.quick else Size()

    @property
    def dtype(self) -> torch.dtype:
        return self.options.dtype or torch.float32

    def scene(self, rate: int) -> Scene:
        model = inputs.load_model(
            self.base,
            doc_max_length=self.size.doc_max_length,
            compression_rate=rate,
            dtype=self.dtype,
            device=self.options.device,
        )
        return Scene(model, self.size)


def cases(scene: Scene, rate: int, dtype: torch.dtype) -> Iterator[Case]:
    """What is measured at one rate."""
    size, limits = scene.size, LIMITS[dtype]
    slots = scene.model.config.num_memory

    def case(work: str, what: str, calls: dict[str, Callable[[], Any]], check: Any, **notes: Any) -> Case:
        return Case(work, f"{rate}x: {what}", lambda: Contest(calls, check, notes={"rate": rate, **notes}))

    def sides(method: str) -> dict[str, Callable[[], Any]]:
        return {OURS: lambda: getattr(scene, method)(OURS), TEXT: lambda: getattr(scene, method)(TEXT)}

    lengths = [min(n, size.doc_max_length) for n in scene.model.count_tokens(scene.documents)]
    yield case(
        "compress",
        f"{size.documents} documents of {min(lengths)} to {max(lengths)} tokens, {slots} memory tokens each",
        {OURS: scene.compress},
        lambda _: scene.check_compress(limits["memory"]),
        documents=size.documents,
    )
    yield case(
        "search",
        f"1 question, encoded and compared with {size.stored} memories, top {size.top_k}",
        {OURS: scene.search},
        lambda _: scene.check_search(1e-3),
    )
    for work, method, what in (
        ("SCP step", "scp_step", f"{size.passages} passages, {size.questions} questions each"),
        ("joint step", "joint_step", f"1 question, {size.top_k} of {size.candidates} stored memories"),
    ):
        yield case(
            work,
            f"{what}, forward and backward",
            sides(method),
            lambda side, method=method: scene.check_step(method, side, limits["loss"]),
        )
    counts = {side: len(scene.prompt(side)[0]) for side in (OURS, TEXT)}
    yield case(
        "answer",
        f"{size.new_tokens} new tokens from {size.top_k} documents",
        sides("answer"),
        lambda side: scene.check_answer(side, SLACK[dtype]),
        prompt_tokens=counts,
    )


def results(setting: Setting, rates: Sequence[int], only: str | None, found: Report) -> Iterator[Result]:
    """Every rate's cases, then the memory of each side in a process of its own."""
    clock = clock_for(setting.options.device, shortest=0.0, capture=False)
    for rate in rates:
        scene = setting.scene(rate)
        for case in cases(scene, rate, setting.dtype):
            if wanted(only, f"{case.work} {case.name.split()[0]}"):
                yield case.run(setting.options, clock, found.ceilings)
        del scene
    quick = setting.options.quick
    for rate in rates[:1] if quick else rates:
        for name, method in MEMORY_METHODS.items():
            if wanted(only, f"peak memory {rate}x: {name}") and (name == "joint step" or not quick):
                peaks = {side: measured_alone(setting, rate, side, method) for side in (OURS, TEXT)}
                result = Result("peak memory", f"{rate}x: {name}", unit="bytes")
                result.measured = {side: float(p["peak"] - p["before"]) for side, p in peaks.items()}
                result.notes = {"rate": rate, "above": {side: p["before"] for side, p in peaks.items()}}
                yield result


def measured_alone(setting: Setting, rate: int, side: str, method: str) -> dict[str, int]:
    """Peak memory of one call, and what was in use before it, in bytes."""
    command = [sys.executable, "-m", "clara_fast.benchmarks.end_to_end", "--alone", str(rate), side, method]
    command += ["--base", str(setting.base), "--dtype", dtype_name(setting.dtype)]
    command += ["--device", str(setting.options.device), "--threads", str(torch.get_num_threads())]
    done = subprocess.run([*command, *(["--quick"] if setting.options.quick else [])], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} did not finish {method} alone:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_alone(setting: Setting, rate: int, side: str, method: str) -> None:
    """The work once, in this process; prints its peak and what was in use before."""
    scene, device = setting.scene(rate), setting.options.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        getattr(scene, method)(side)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        machine.return_freed_memory()
        before = machine.reset_peak_memory()
        getattr(scene, method)(side)
        peak = machine.peak_memory()
    print(json.dumps({"peak": peak, "before": before}))


def benchmark(
    options: Options,
    only: str | None,
    console: Console,
    *,
    rates: Sequence[int] = RATES,
    base: Path | None = None,
    layers: int = 6,
) -> Report:
    """Run the cases on the base model in ``base`` or a random one of so many layers; progress goes to ``console``.

    Raises:
        ValueError: no case is called so, or a dtype or rate that cannot be.
    """
    names = [f"{work} {rate}x:" for work in WORKS for rate in rates]
    names += [f"peak memory {rate}x: {work}" for work in MEMORY_METHODS for rate in rates]
    if not any(wanted(only, name) for name in names):
        raise ValueError(f"--only ({only}) leaves no case; there are {', '.join(names)}")
    if options.dtype not in (None, *LIMITS):
        raise ValueError(f"--dtype ({dtype_name(options.dtype)}) must be float32 or bfloat16 for the model")
    # Documents that fill the compressor's length are meant to be cut.
    warnings.filterwarnings("ignore", message=".*were cut to doc_max_length")
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        description = str(base)
        if base is None:
            base = Path(folder) / "base"
            description = inputs.write_random_base(base, layers, tiny=options.quick)
        setting = Setting(options, base)
        facts = {**machine.facts(options.device), "base": description, "dtype": dtype_name(setting.dtype)}
        facts |= {"quick": options.quick, "dropout": 0, "rates": list(rates), "size": asdict(setting.size)}
        clock = clock_for(options.device, shortest=0.0)
        ceilings = machine.measure_ceilings(options.device, clock, quick=options.quick)
        found = Report(f"Memories on {options.device.type}, beside full text", facts, ceilings, console)
        for result in results(setting, rates, only, found):
            found.add(result)
    return found


def draw(document: dict[str, Any], path: Path) -> None:
    """What an answer, a training step and their memory cost, from full text and from memories: one panel each."""
    from matplotlib.figure import Figure

    panels = {
        "answer": ("seconds for an answer", 1.0),
        "joint step": ("seconds for a joint step", 1.0),
        "peak memory": ("MB that a joint step takes", 1e6),
    }
    found = [r for r in document["results"] if r["work"] in panels and not r["refused"]]
    found = [r for r in found if r["work"] != "peak memory" or r["case"].endswith("joint step")]
    shown = [work for work in panels if any(r["work"] == work for r in found)]
    if not shown:
        raise roofline.NoPicture("no case here is beside full text")
    figure = Figure(figsize=(4.2 * len(shown), 3.2), layout="constrained")
    for axes, work in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        title, unit = panels[work]
        rows = sorted((r for r in found if r["work"] == work), key=lambda r: r["notes"]["rate"])
        texts = [amount(r, TEXT) for r in rows]
        heights = [sum(texts) / len(texts), *(amount(r, OURS) for r in rows)]
        labels = ["full text", *(f"{r['notes']['rate']}x" for r in rows)]
        bars = axes.bar(labels, [h / unit for h in heights], color=["tab:gray", *["tab:blue"] * len(rows)])
        axes.bar_label(bars, fmt="%.3g", fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.margins(y=0.15)
    figure.savefig(path, dpi=120)


def amount(result: dict[str, Any], name: str) -> float:
    """A contestant's median seconds, or its bytes."""
    one = result["contestants"][name]
    return float(one.get("median", one.get("value")))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--only", help="cases whose name holds these words: answer, 'joint 16x', 'peak memory'")
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="compression rates, with commas")
    parser.add_argument("--base", type=Path, help="folder of a causal language model (default: a random Llama)")
    parser.add_argument("--layers", type=int, default=6, help="of the random Llama; 30 is SmolLM2-135M's shape")
    parser.add_argument("--plot", type=Path, help="also draw the comparison here (.png or .svg)")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    others = {"quick": parsed.quick, "repetitions": parsed.repetitions or (1 if parsed.quick else REPETITIONS)}
    console = Console(width=max(Console().width, 160), highlight=False)
    try:
        options = Options.of(parsed.device, parsed.dtype, threads=parsed.threads, **others)
        if parsed.alone:
            rate, side, method = parsed.alone
            run_alone(Setting(options, parsed.base), int(rate), side, method)
            return 0
        rates = rates_of(parsed.rates, QUICK if parsed.quick else Size())
        if parsed.plot:
            roofline.require(parsed.plot)
        found = benchmark(options, parsed.only, console, rates=rates, base=parsed.base, layers=parsed.layers)
    except ValueError as error:
        parser.error(str(error))
    found.show(console)
    if parsed.json:
        report.save([found], parsed.json)
    if parsed.plot:
        draw(found.document(), parsed.plot)
    return 1 if found.refused else 0


def rates_of(text: str, size: Size) -> list[int]:
    """The rates of ``--rates``. Raises ``ValueError`` unless each leaves a memory token."""
    try:
        rates = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--rates ({text}) must be whole numbers with commas") from None
    for rate in rates:
        if not 1 <= rate <= size.doc_max_length:
            raise ValueError(f"--rates ({rate}) must be at least 1 and at most {size.doc_max_length} tokens a document")
    return rates


if __name__ == "__main__":
    sys.exit(main())
