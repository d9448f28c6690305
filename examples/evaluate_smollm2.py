"""The evaluation of the model of `make demo`, beside its controls: the table in README.md.

    python examples/evaluate_smollm2.py --data ../shared/data              # prints the table
    python examples/evaluate_smollm2.py --data ../shared/data --check      # and compares it with the recorded one
    python examples/evaluate_smollm2.py --data ../shared/data --record     # records it, in README.md too

All of it is one `clara-fast eval`, whose command is printed; an interrupted run goes on in `--out`. With `--check` the
exit code is 1 if a number lies outside the recorded 95 % interval.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from clara_fast.cli.demo import base_model

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "python/clara_fast/assets/demo/model"
RECORD, README = ROOT / "benchmarks/results/demo_model.json", ROOT / "README.md"
MARK = re.compile(r"(<!-- demo model -->\n).*?(<!-- end -->)", re.DOTALL)
SETS = {
    "scp_dev": "one passage",
    "multidoc_dev_nq": "NQ",
    "multidoc_dev_hotpotqa": "HotpotQA",
    "multidoc_dev_musique": "MuSiQue",
    "multidoc_dev_2wiki": "2Wiki",
}
PROTOCOL = ["--protocol", "oracle", "--candidates", "10", "--top-k", "3", "--max-new-tokens", "16"]
METHODS = {
    "none": "no context",
    "other": "another passage's memory",
    "memory": "memory",
    "text": "full text, base model",
}
ROWS = [
    *(("loss", method) for method in METHODS),
    *(("f1", method) for method in METHODS),
    ("recall@1", "memory"),
    ("recall@5", "memory"),
]
NAMES = {"loss": "answer loss", "f1": "F1", "recall@1": "Recall@1", "recall@5": "Recall@5"}


def main(
    data: Annotated[Path, typer.Option(help="Folder with scp_dev.jsonl.gz and multidoc_dev_*.jsonl.gz.")],
    base: Annotated[Path | None, typer.Option(help="SmolLM2-135M-Instruct; default: as make demo makes it.")] = None,
    limit: Annotated[int, typer.Option(help="Questions of each file.")] = 40,
    out: Annotated[Path, typer.Option(help="Folder for predictions and report.")] = Path("demo-evaluation"),
    check: Annotated[bool, typer.Option("--check", help="Compare with the recorded numbers.")] = False,
    record: Annotated[bool, typer.Option("--record", help="Record the numbers, here and in README.md.")] = False,
) -> None:
    """Evaluate the shipped model."""
    files = [data / f"{name}.jsonl.gz" for name in SETS]
    model = ["--model", MODEL, "--base-model", base or base_model(None)]
    options = ["--limit", str(limit), "--methods", ",".join(METHODS), *PROTOCOL]
    command = ["eval", *files, *model, *options, "--out", out]
    line = [str(part) for part in command]
    print(f"clara-fast {shlex.join(line)}", file=sys.stderr)
    if code := subprocess.run([sys.executable, "-m", "clara_fast", *line], stdout=sys.stderr).returncode:
        raise typer.Exit(code)
    document = json.loads((out / "results.json").read_text())
    print(table(document))
    if check:
        lines = outside(document, json.loads(RECORD.read_text()))
        print("\n".join(lines) or f"every number lies in its interval in {RECORD.name}")
        raise typer.Exit(bool(lines))
    if record:
        RECORD.write_text(json.dumps(document, indent=2) + "\n")
        text, count = MARK.subn(lambda found: f"{found[1]}{table(document)}\n{found[2]}", README.read_text())
        assert count == 1, f"{README} has lost the marks of the table"
        README.write_text(text)


def table(document: dict[str, Any]) -> str:
    """Data sets in columns; means with their 95 % intervals over the questions."""
    scores = {(one["dataset"], one["method"]): one["scores"] for one in document["results"]}
    counts = {one["dataset"]: one["questions"] for one in document["results"]}
    lines = [
        "| | " + " | ".join(f"{title}, {counts[name]} questions" for name, title in SETS.items()) + " |",
        "|---" * (1 + len(SETS)) + "|",
    ]
    for score, method in ROWS:
        found = (scores[name, method].get(score) for name in SETS)
        cells = [number(one, 1 if score == "loss" else 100) if one else "" for one in found]
        title = NAMES[score] + (f", {METHODS[method]}" if score in ("loss", "f1") else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def number(one: dict[str, float], unit: int) -> str:
    mean, low, high = (f"{one[part] * unit:.{2 if unit == 1 else 1}f}" for part in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def outside(found: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """What is not in its recorded interval, a line each.

    Raises:
        ValueError: other questions or options were recorded.
    """
    for name in sorted({*found["settings"], *recorded["settings"]} - {"models"}):
        ours, theirs = found["settings"].get(name), recorded["settings"].get(name)
        if ours != theirs:
            raise ValueError(f"{RECORD} was recorded with {name} {theirs}, not {ours}")
    scores = {(one["dataset"], one["method"]): one["scores"] for one in found["results"]}
    return [
        f"{one['dataset']}, {one['method']}: {name} {now:.4f} is not in {was['low']:.4f} to {was['high']:.4f}"
        for one in recorded["results"]
        for name, was in one["scores"].items()
        if not was["low"] - 1e-9 <= (now := scores[one["dataset"], one["method"]][name]["mean"]) <= was["high"] + 1e-9
    ]


if __name__ == "__main__":
    typer.run(main)
