"""Full text beside memories at several rates: compress, search, answer, train, and the memory each takes.

    python benchmarks/end_to_end.py [--rates 4,16,64] [--only answer] [--base FOLDER] [--quick] [--json F] [--plot F]

Both sides are clara_fast on the same base model and the same documents, which are read as text or as memories; so the
ratio is what compression is worth, and not what kernels are. What is timed is checked first: packed against one by one,
cached decoding against whole sequences, search against float64. Without ``--base`` the model is a random Llama.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from clara_fast.benchmarks import inputs, machine, roofline
from clara_fast.benchmarks.harness import (
    OURS,
    Case,
    Contest,
    Options,
    Result,
    wanted,
)
from clara_fast.benchmarks.report import Report
from clara_fast.benchmarks.setting import LIMITS, Setting, check, options_of, parser_of, prepared
from clara_fast.benchmarks.text_or_memory import QUICK, TEXT, Scene, Size
from clara_fast.benchmarks.timing import clock_for

RATES = (4, 16, 64)
# How far below the largest logit a generated token's may lie: two ways to compute it round differently.
SLACK = {torch.float32: 1e-3, torch.bfloat16: 0.5}


# The run

MEMORY_METHODS = {"answer": "answer", "joint step": "joint_step"}
WORKS = ("compress", "search", "SCP step", "joint step", "answer")


class SceneSetting(Setting):
    """Makes the work at any rate."""

    @property
    def size(self) -> Size:
        return QUICK if self.options.quick else Size()

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


def results(setting: SceneSetting, rates: Sequence[int], only: str | None, found: Report) -> Iterator[Result]:
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
                peaks = {
                    side: machine.alone("end_to_end", "--alone", rate, side, method, *setting.again())
                    for side in (OURS, TEXT)
                }
                result = Result("peak memory", f"{rate}x: {name}", unit="bytes")
                result.measured = {side: float(p["peak"] - p["before"]) for side, p in peaks.items()}
                result.notes = {"rate": rate, "above": {side: p["before"] for side, p in peaks.items()}}
                yield result


def run_alone(setting: SceneSetting, rate: int, side: str, method: str) -> None:
    """The work once, in this process; prints its peak and what was in use before."""
    machine.return_freed_memory()  # from now on: what making the scene leaves behind would serve the work for nothing
    scene = setting.scene(rate)
    print(json.dumps(machine.peak_of(partial(getattr(scene, method), side), setting.options.device)))


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
        ValueError: no case is called so, or the dtype cannot be.
    """
    names = [f"{work} {rate}x:" for work in WORKS for rate in rates]
    check(options, only, [*names, *(f"peak memory {rate}x: {work}" for work in MEMORY_METHODS for rate in rates)])
    size = QUICK if options.quick else Size()
    facts = {"rates": list(rates)}
    with prepared("Memories beside full text", options, base, layers, size, console, **facts) as (found, folder, _):
        for result in results(SceneSetting(options, folder), rates, only, found):
            found.add(result)
    return found


# The comparison as a table and as a picture


@dataclass(frozen=True)
class Line:
    """One kind of result over all rates: ``scale`` is multiplied by what was measured, or by its inverse."""

    title: str
    work: str
    case: str = ""
    scale: float = 1.0
    per_second: bool = False

    def amount(self, result: dict[str, Any], side: str) -> float:
        one = result["contestants"][side]
        value = float(one.get("median", one.get("value")))
        return result["notes"]["documents"] / value if self.per_second else value * self.scale

    def results(self, document: dict[str, Any]) -> list[dict[str, Any]]:
        """Those that were not refused, by rate."""
        of_work = [r for r in document["results"] if r["work"] == self.work and not r["refused"]]
        return sorted((r for r in of_work if r["case"].endswith(self.case)), key=lambda r: r["notes"]["rate"])

    def row(self, document: dict[str, Any]) -> dict[str, float]:
        """Its amounts, by ``full text`` (if that is beside it; its mean, as every rate has it beside) and rates."""
        found = self.results(document)
        texts = [self.amount(r, TEXT) for r in found if TEXT in r["contestants"]]
        row = {TEXT: sum(texts) / len(texts)} if texts else {}
        return row | {f"{r['notes']['rate']}x": self.amount(r, OURS) for r in found}


LINES = (
    Line("compress, documents a second", "compress", per_second=True),
    Line("search, question encoded, ms", "search", scale=1e3),
    Line("answer, s", "answer"),
    Line("SCP step, s", "SCP step"),
    Line("joint step, s", "joint step"),
    Line("memory that an answer takes, MB", "peak memory", ": answer", 1e-6),
    Line("memory that a joint step takes, MB", "peak memory", ": joint step", 1e-6),
)
PANELS = [LINES[i] for i in (2, 4, 6)]


def markdown(document: dict[str, Any]) -> str:
    """A row for each kind of work, a column for full text and each rate."""
    columns = [TEXT, *(f"{rate}x" for rate in sorted(document["facts"]["rates"]))]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for line in LINES:
        if row := line.row(document):
            cells = (f"{row[column]:.3g}" if column in row else "" for column in columns)
            lines.append(f"| {line.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(document: dict[str, Any], path: Path) -> None:
    """What an answer, a training step and its memory cost, from full text and from memories: one panel each."""
    from matplotlib.figure import Figure

    shown = [(line, row) for line in PANELS if (row := line.row(document))]
    if not shown:
        raise roofline.NoPicture("no case here is beside full text")
    figure = Figure(figsize=(4.2 * len(shown), 3.2), layout="constrained")
    for axes, (line, row) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        bars = axes.bar(list(row), list(row.values()), color=["tab:gray", *["tab:blue"] * (len(row) - 1)])
        axes.bar_label(bars, fmt="%.3g", fontsize=8)
        axes.set_title(line.title, fontsize=10)
        axes.margins(y=0.15)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of((__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="compression rates, with commas")
    parser.add_argument("--plot", type=Path, help="also draw the comparison here (.png or .svg)")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    console = Console(width=max(Console().width, 160), highlight=False)
    try:
        options = options_of(parsed)
        if parsed.alone:
            rate, side, method = parsed.alone
            run_alone(SceneSetting(options, parsed.base), int(rate), side, method)
            return 0
        rates = rates_of(parsed.rates, QUICK if parsed.quick else Size())
        if parsed.plot:
            roofline.require(parsed.plot)
        found = benchmark(options, parsed.only, console, rates=rates, base=parsed.base, layers=parsed.layers)
    except ValueError as error:
        parser.error(str(error))
    code = found.finish(console, parsed.json)
    console.print(f"\n{markdown(found.document())}", markup=False, soft_wrap=True)
    if parsed.plot:
        draw(found.document(), parsed.plot)
    return code


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
