"""Results as a table for people and as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clara_fast.benchmarks.harness import OURS, Result, operations, size
from clara_fast.benchmarks.machine import Ceilings
from clara_fast.benchmarks.timing import Timing, duration

FORMAT = 1


class Report:
    """Rows of results. Progress goes to ``console`` as they come, the table at the end."""

    def __init__(self, title: str, facts: dict[str, Any], ceilings: Ceilings, console: Console) -> None:
        self.title, self.facts, self.ceilings, self.console = title, facts, ceilings, console
        self.results: list[Result] = []
        self._started = time.perf_counter()
        self.say(", ".join(f"{name} {_plain(value)}" for name, value in facts.items() if value is not None))
        self.say(f"ceilings in this run: {ceilings_text(ceilings)}")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def add(self, result: Result) -> None:
        self.results.append(result)
        outcome = result.refused or "; ".join(verdict.text for verdict in result.verdicts)
        elapsed = time.perf_counter() - self._started
        self.say(f"{elapsed:4.0f} s  {result.work}: {result.case}{'  ' + outcome if outcome else ''}")

    @property
    def refused(self) -> list[Result]:
        return [result for result in self.results if result.refused]

    def show(self, console: Console) -> None:
        table = Table(title=self.title, show_lines=True)
        table.add_column("case", ratio=5)
        table.add_column(f"{OURS}: median (p20 to p80)", ratio=3)
        table.add_column("others, and how many times ours", ratio=5)
        table.add_column("floor, and its share of ours", ratio=3)
        table.add_column("bars", ratio=4)
        for result in self.results:
            table.add_row(*row(result))
        console.print(table)
        console.print(self.summary(), markup=False, soft_wrap=True)

    def finish(self, console: Console, path: Path | None) -> int:
        """Shows the table and saves it if a path is given; returns the exit code."""
        self.show(console)
        if path:
            save([self], path)
        return 1 if self.refused else 0

    def summary(self) -> str:
        """Every bar that was missed or not judged, and every case that was refused: nothing is left out silently."""
        verdicts = [(result, verdict) for result in self.results for verdict in result.verdicts]
        if self.facts.get("quick"):
            verdicts = []
        met = sum(verdict.met is True for _, verdict in verdicts)
        lines = [f"{met} of {len(verdicts)} bars met" if verdicts else "no bar was judged"]
        lines += [f"  {r.work}: {r.case}: {v.text}" for r, v in verdicts if not v.met]
        lines += [f"  refused: {result.work}: {result.case}: {result.refused}" for result in self.refused]
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "title": self.title,
            "facts": self.facts,
            "ceilings": asdict(self.ceilings),
            "results": [as_json(result) for result in self.results],
        }


def save(reports: Iterable[Report], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    documents = [report.document() for report in reports]
    path.write_text(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2) + "\n")


def as_json(result: Result) -> dict[str, Any]:
    contestants = {
        name: {
            **(asdict(value) if isinstance(value, Timing) else {"value": value}),
            "times_ours": None if name == OURS or not result.value(OURS) else result.ratio(name),
            "error": result.errors.get(name),
            "clock": result.clocks.get(name),
        }
        for name, value in result.measured.items()
    }
    floor = None
    if result.floor is not None:
        floor = {**asdict(result.floor), "limit": result.limit, "of_ceiling": result.of_ceiling}
    best = result.best_peer() if result.measured else None
    return {
        "work": result.work,
        "case": result.case,
        "unit": result.unit,
        "contestants": contestants,
        "best_peer": best,
        "ratio": result.ratio(best) if best and result.value(OURS) else None,
        "absent": result.absent,
        "refused": result.refused,
        "floor": floor,
        "bars": [asdict(verdict) for verdict in result.verdicts],
        "notes": result.notes,
    }


def row(result: Result) -> list[str]:
    """The cells of a table."""
    case = f"{result.work}: {result.case}"
    if result.refused:
        return [case, "REFUSED", "", "", result.refused]
    others = [
        f"{name} {amount(result, name)}" + (f" ({result.ratio(name):.2f}x)" if result.value(OURS) > 0 else "")
        for name in sorted((n for n in result.measured if n != OURS), key=result.value)
    ]
    others += [f"{name}: {why}" for name, why in result.absent.items()]
    mine = amount(result, OURS, spread=True) if result.measured else ""
    notes = [f"{name}: {_plain(value)}" for name, value in result.notes.items() if isinstance(value, str)]
    verdicts = [verdict.text for verdict in result.verdicts]
    return [case, "\n".join([mine, *notes]), "\n".join(others), _floor(result), "\n".join(verdicts)]


def amount(result: Result, name: str, *, spread: bool = False) -> str:
    value = result.measured[name]
    if not isinstance(value, Timing):
        return size(value) if result.unit == "bytes" else duration(value)
    text = duration(value.median)
    if documents := result.notes.get("documents"):
        text += f", {documents / value.median:.3g} docs/s"
    return f"{text} ({duration(value.p20)} to {duration(value.p80)})" if spread else text


def _floor(result: Result) -> str:
    if result.floor is None or result.of_ceiling is None:
        return ""
    return f"{size(result.floor.bytes)}, {operations(result.floor.flops)}\n{result.of_ceiling:.0%} of {result.limit}"


def ceilings_text(ceilings: Ceilings) -> str:
    matmul = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in ceilings.matmul.items())
    return f"read {ceilings.read / 1e9:.3g} GB/s, copy {ceilings.copy / 1e9:.3g} GB/s (read + written), matmul {matmul}"


def _plain(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
