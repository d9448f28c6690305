"""Pictures of results: how good, at how many tokens, in what time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from clara_fast.evaluation.methods import METHODS
from clara_fast.evaluation.summary import Result


def available() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    try:
        return find_spec("matplotlib") is not None
    except ValueError:
        return False


def draw(results: Sequence[Result], file: Path) -> None:
    """Three pictures of one data set side by side: F1 and cover match, F1 against context tokens, seconds by part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 1.6 + 0.42 * max(6, len(results))), layout="constrained")
    quality, tokens, time = figure.subplots(1, 3)
    labels = _labels(results)
    _draw_quality(quality, results, labels)
    _draw_tokens(tokens, results, labels)
    _draw_seconds(time, results, labels)
    figure.suptitle(f"{results[0].dataset}, {results[0].questions} questions")
    figure.savefig(file, dpi=120)


def _labels(results: Sequence[Result]) -> list[str]:
    several = len({result.model for result in results}) > 1
    return [METHODS[r.method].title + (f"\n{r.model}" if several else "") for r in results]


def _draw_quality(axes: Any, results: Sequence[Result], labels: list[str]) -> None:
    places = list(range(len(results)))
    for shift, name, title in ((-0.2, "f1", "F1"), (0.2, "cover", "cover match")):
        found = [result.scores[name] for result in results]
        means = [100 * one.mean for one in found]
        spread = [
            [max(0.0, 100 * (one.mean - one.low)) for one in found],
            [max(0.0, 100 * (one.high - one.mean)) for one in found],
        ]
        axes.barh([p + shift for p in places], means, height=0.38, xerr=spread, label=title, capsize=2)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, max(5.0, axes.get_xlim()[1]))
    axes.set_xlabel("percent, with 95 % intervals")
    axes.legend()


def _draw_tokens(axes: Any, results: Sequence[Result], labels: list[str]) -> None:
    for result, label, marker in zip(results, labels, cycle("osD^v<>pP*Xhd"), strict=False):
        point = (result.context_tokens, 100 * result.scores["f1"].mean)
        axes.scatter(*point, marker=marker, s=60, label=label.replace("\n", ", "))
    axes.set_xlabel("tokens of context in the prompt")
    axes.set_ylabel("F1, percent")
    axes.set_ylim(bottom=0, top=max(5.0, 1.15 * axes.get_ylim()[1]))
    axes.legend(fontsize=8)


def _draw_seconds(axes: Any, results: Sequence[Result], labels: list[str]) -> None:
    places, left = list(range(len(results))), [0.0] * len(results)
    for part in dict.fromkeys(part for result in results for part in result.seconds):
        widths = [result.seconds[part] for result in results]
        axes.barh(places, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel("seconds a question, in batches")
    axes.legend()
