"""Predictions to numbers: means with bootstrap intervals, for each model, data set and method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clara_fast.evaluation.journal import Prediction
from clara_fast.evaluation.metrics import answer_scores, bootstrap_interval, retrieval_scores

Scores = NDArray[np.float64]
RESAMPLES = 2000
PARTS = ("compress", "query", "select", "generate")


@dataclass(frozen=True)
class Estimate:
    """A mean over questions, and the ends of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass
class Result:
    """What one method of one model is worth on one data set.

    Attributes:
        model, dataset, method: of whom.
        questions: how many.
        ranked: of how many the ranking could be judged.
        scores: ``loss`` (nats a token); ``em``, ``f1``, ``cover`` and the same with ``reference_`` before them (shares
            of 1); ``recall@1``, ``recall@5``, ``mrr@10`` where the method ranked candidates.
        context_tokens: in the prompt, on average.
        saved: share of the tokens of the same documents as text that the prompt did without.
        seconds: of each part for a question, on average, at the run's batch size.
    """

    model: str
    dataset: str
    method: str
    questions: int
    ranked: int
    scores: dict[str, Estimate]
    context_tokens: float
    saved: float | None
    seconds: dict[str, float] = field(default_factory=dict)


def summarize(predictions: Sequence[Prediction]) -> list[Result]:
    """A result for every model, data set and method, in the order in which they come."""
    groups: dict[tuple[str, str, str], list[Prediction]] = {}
    for one in predictions:
        groups.setdefault((one.dataset, one.model, one.method), []).append(one)
    return [_result(group) for group in groups.values()]


def scores_of(predictions: Sequence[Prediction]) -> dict[str, Scores]:
    """Every score of every question, ``[n]`` each; their means are the results."""
    texts, golds = [one.text for one in predictions], [one.answers for one in predictions]
    scores = {"loss": _per_token(predictions), **answer_scores(texts, golds)}
    reference = answer_scores(texts, golds, rule="reference")
    return scores | {f"reference_{name}": values for name, values in reference.items()}


def _result(group: Sequence[Prediction]) -> Result:
    scores = _estimates(scores_of(group))
    ranked = [one for one in group if one.ranking is not None and len(one.positives) + one.absent]
    if ranked:
        # Positives that are not among the candidates cannot be found, but count as missed.
        wanted = [[*one.positives, *(-1 - i for i in range(one.absent))] for one in ranked]
        scores |= _estimates(retrieval_scores([one.ranking or [] for one in ranked], wanted))
    first = group[0]
    context, text = (sum(getattr(one, name) for one in group) for name in ("context_tokens", "text_tokens"))
    parts = [*PARTS, *sorted({part for one in group for part in one.seconds} - {*PARTS})]
    return Result(
        first.model,
        first.dataset,
        first.method,
        questions=len(group),
        ranked=len(ranked),
        scores=scores,
        context_tokens=context / len(group),
        saved=1 - context / text if text else None,
        seconds={part: _mean(one.seconds.get(part, 0.0) for one in group) for part in parts},
    )


def _per_token(predictions: Sequence[Prediction]) -> Scores:
    """Losses whose mean is the loss a token, ``sum(loss) / sum(tokens)``, and whose spread is that of the ratio."""
    losses = np.array([one.loss for one in predictions])
    tokens = np.array([one.loss_tokens for one in predictions], dtype=np.float64)
    ratio = losses.sum() / tokens.sum()
    return ratio + (losses - ratio * tokens) / tokens.mean()


def _estimates(scores: dict[str, Scores]) -> dict[str, Estimate]:
    table = np.stack(list(scores.values()))
    low, high = bootstrap_interval(table, resamples=RESAMPLES)
    means = table.mean(-1)
    return {
        name: Estimate(float(mean), float(a), float(b))
        for name, mean, a, b in zip(scores, means, low, high, strict=True)
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
