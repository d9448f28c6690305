"""Results as Markdown, as JSON, and as pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clara_fast.evaluation.methods import METHODS
from clara_fast.evaluation.summary import Estimate, Result

FORMAT = 1
MAIN = {
    "loss": "answer loss",
    "em": "EM",
    "f1": "F1",
    "cover": "cover",
    "recall@1": "Recall@1",
    "recall@5": "Recall@5",
}
REFERENCE = {"reference_em": "EM", "reference_f1": "F1", "reference_cover": "cover (ACC)"}


def markdown_table(results: Sequence[Result], *, intervals: bool = True) -> str:
    """The main table of one data set: a line for each model and method.

    Answer loss in nats a token; the rest in percent, with 95 % bootstrap intervals over the questions.
    """
    several = len({result.model for result in results}) > 1
    header = [*(["model"] if several else []), "context", *MAIN.values()]
    rows = []
    for result in results:
        cells = [_cell(result.scores.get(name), percent=name != "loss", interval=intervals) for name in MAIN]
        rows.append([*([result.model] if several else []), METHODS[result.method].title, *cells])
    return _table(header, rows)


def cost_table(results: Sequence[Result]) -> str:
    """Tokens and seconds: a line for each model and method."""
    several = len({result.model for result in results}) > 1
    parts = list(dict.fromkeys(part for result in results for part in result.seconds))
    header = [*(["model"] if several else []), "context", "tokens read", "tokens saved", *(f"{p}, s" for p in parts)]
    rows = []
    for result in results:
        saved = "–" if result.saved is None or result.method == "other" else f"{100 * result.saved:.0f} %"
        row = [METHODS[result.method].title, f"{result.context_tokens:.0f}", saved]
        rows.append([*([result.model] if several else []), *row, *(f"{result.seconds[p]:.3f}" for p in parts)])
    return _table(header, rows)


def reference_table(results: Sequence[Result]) -> str:
    """EM, F1 and cover match by ml-clara's rule, and MRR."""
    several = len({result.model for result in results}) > 1
    header = [*(["model"] if several else []), "context", *REFERENCE.values(), "MRR@10"]
    rows = []
    for result in results:
        cells = [_cell(result.scores.get(name), percent=True, interval=True) for name in (*REFERENCE, "mrr@10")]
        rows.append([*([result.model] if several else []), METHODS[result.method].title, *cells])
    return _table(header, rows)


def by_dataset(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each data set."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.dataset, []).append(result)
    return groups


def markdown(results: Sequence[Result], settings: dict[str, Any], pictures: dict[str, str]) -> str:
    """The whole report; ``pictures`` are file names by data set."""
    lines = ["# Evaluation", ""]
    lines += [f"- {name}: {_plain(value)}" for name, value in settings.items()]
    for dataset, group in by_dataset(results).items():
        ranked = max(result.ranked for result in group)
        judged = f", {ranked} of them with known positives" if ranked else ""
        lines += [
            "",
            f"## {dataset}: {group[0].questions} questions{judged}",
            "",
            "Answer loss in nats a token; the rest in percent, the best over all gold answers; "
            "in brackets 95 % bootstrap intervals over the questions.",
            "",
            markdown_table(group),
        ]
        if dataset in pictures:
            lines += ["", f"![{dataset}]({pictures[dataset]})"]
        lines += [
            "",
            "By ml-clara's rule (the first gold answer alone):",
            "",
            reference_table(group),
            "",
            "What it took: tokens of context in the prompt, share saved against the same documents as text, and "
            "seconds a question at this batch size.",
            "",
            cost_table(group),
        ]
    return "\n".join(lines) + "\n"


def document(results: Sequence[Result], settings: dict[str, Any]) -> dict[str, Any]:
    """The same as JSON."""
    return {"format": FORMAT, "settings": settings, "results": [asdict(result) for result in results]}


def save(results: Sequence[Result], settings: dict[str, Any], folder: Path, *, draw: bool = True) -> list[Path]:
    """Write ``results.json``, ``report.md`` and, if matplotlib is there, a picture for each data set."""
    pictures: dict[str, str] = {}
    if draw:
        from clara_fast.evaluation import plots

        for dataset, group in by_dataset(results).items():
            pictures[dataset] = f"{dataset}.png"
            plots.draw(group, folder / pictures[dataset])
    content = json.dumps(document(results, settings), indent=2, ensure_ascii=False) + "\n"
    (folder / "results.json").write_text(content, encoding="utf-8")
    (folder / "report.md").write_text(markdown(results, settings, pictures), encoding="utf-8")
    return [folder / name for name in ("results.json", "report.md", *pictures.values())]


def _cell(estimate: Estimate | None, *, percent: bool, interval: bool) -> str:
    if estimate is None:
        return "–"
    factor, digits = (100, 1) if percent else (1, 2)
    mean, low, high = (f"{factor * value:.{digits}f}" for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean} ({low} to {high})" if interval else mean


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_plain(one)}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
