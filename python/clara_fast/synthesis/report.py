"""What a run has brought: rounds, acceptance, coverage, lengths, cost; as numbers and as a picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clara_fast.synthesis.items import Item


@dataclass(frozen=True)
class Prices:
    """What a million tokens cost, in any currency."""

    prompt: float = 0.0
    completion: float = 0.0

    def __post_init__(self) -> None:
        if self.prompt < 0 or self.completion < 0:
            raise ValueError(f"prices ({self.prompt:g} and {self.completion:g}) must be at least 0")


class Report:
    """Takes the outcome of one item after the other; equal items with equal outcomes make equal reports."""

    def __init__(self, task: str, duplicates: int, prices: Prices) -> None:
        self._task, self._duplicates, self._prices = task, duplicates, prices
        self._items = self._finished = 0
        self._spent: Counter[str] = Counter()
        self._rounds: Counter[int] = Counter()
        self._stopped: Counter[str] = Counter()
        self._accepted: Counter[str] = Counter()
        self._rejected: dict[str, Counter[str]] = {}
        self._missing: list[int] = []
        self._lengths: dict[str, list[float]] = {}

    def add(self, item: Item, outcome: dict[str, Any] | None) -> None:
        """Count ``item``; None is the outcome of one that is not finished."""
        self._items += 1
        if outcome is None:
            return
        self._finished += 1
        for key in ("requests", "prompt_tokens", "completion_tokens"):
            self._spent[key] += outcome[key]
        self._rounds[outcome["rounds"]] += 1
        self._stopped[outcome["stopped"]] += 1
        for record in outcome["rejected"]:
            # The judge's and the server's words differ each time: what counts is who said no.
            reason = record["reason"].partition(":")[0]
            self._rejected.setdefault(record["step"], Counter())[reason] += 1
        if self._task == "scp":
            self._add_scp(item, outcome)
        elif outcome["answer"]:
            self._accepted["teacher"] += 1
            self._measure("answer_words", outcome["answer"])

    def _add_scp(self, item: Item, outcome: dict[str, Any]) -> None:
        self._measure("passage_words", item.documents[0])
        self._missing.append(len(outcome["missing"]))
        self._lengths.setdefault("pairs_per_passage", []).append(len(outcome["pairs"]))
        for pair in outcome["pairs"]:
            self._accepted[pair["kind"]] += 1
            self._measure("question_words", pair["question"])
            self._measure("answer_words", pair["answer"])
        if outcome["paraphrase"]:
            self._accepted["paraphrase"] += 1
            self._measure("paraphrase_words", outcome["paraphrase"])

    def _measure(self, what: str, text: str) -> None:
        self._lengths.setdefault(what, []).append(len(text.split()))

    def result(self) -> dict[str, Any]:
        """The report as one JSON object."""
        cost = self._spent["prompt_tokens"] * self._prices.prompt
        cost += self._spent["completion_tokens"] * self._prices.completion
        result: dict[str, Any] = {
            "task": self._task,
            "items": self._items,
            "duplicates": self._duplicates,
            "finished": self._finished,
            "unfinished": self._items - self._finished,
            "accepted": dict(sorted(self._accepted.items())),
            "rejected": {step: dict(reasons.most_common()) for step, reasons in sorted(self._rejected.items())},
            "acceptance": self._acceptance(),
            "rounds": {str(number): count for number, count in sorted(self._rounds.items())},
            "stopped": dict(sorted(self._stopped.items())),
            "lengths": {what: _summary(values) for what, values in sorted(self._lengths.items())},
            **{key: self._spent[key] for key in ("requests", "prompt_tokens", "completion_tokens")},
            "cost": round(cost / 1e6, 6),
        }
        if self._missing:
            covered = self._stopped["covered"] / len(self._missing)
            result["coverage"] = {"passages_covered": covered, "facts_missing": _summary([*map(float, self._missing)])}
        return result

    def _acceptance(self) -> dict[str, float]:
        """Of what was proposed in each step, the share that was accepted."""
        shares = {}
        for step in sorted({*self._accepted, *self._rejected} - {"missing"}):
            accepted, rejected = self._accepted[step], self._rejected.get(step, Counter()).total()
            shares[step] = accepted / (accepted + rejected)
        return shares


def _summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.05, 0.5, 0.95)]
    return {"mean": sum(values) / len(values), "p5": at[0], "median": at[1], "p95": at[2]}


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw rounds, acceptance, reasons of rejection and lengths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    reasons: Counter[str] = Counter()
    for counts in report["rejected"].values():
        reasons.update({_short(reason): count for reason, count in counts.items()})
    panels = (
        ("rounds needed", report["rounds"]),
        ("share accepted", report["acceptance"]),
        ("rejected, by reason", dict(reasons.most_common(8))),
        ("median words", {k.removesuffix("_words"): v["median"] for k, v in report["lengths"].items() if "words" in k}),
    )
    for axis, (title, bars) in zip(axes.flat, panels, strict=True):
        axis.set_title(title, loc="left")
        axis.barh(list(bars), list(bars.values()), color="#4477aa")
        axis.invert_yaxis()
        for label, value in bars.items():
            axis.text(value, label, f" {value:.3g}", va="center")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, 1.15 * max(bars.values(), default=0) or 1)
    figure.suptitle(f"{report['task']}: {report['finished']} of {report['items']} items", x=0.01, ha="left")
    figure.savefig(path, dpi=120)


def _short(text: str) -> str:
    return text if len(text) <= 32 else text[:31] + "…"
