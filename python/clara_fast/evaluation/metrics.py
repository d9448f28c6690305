"""What answers and rankings are worth: EM, F1, cover match, Recall@k, MRR, and how sure one may be of their means.

Two rules say which gold answer counts:

- ``"best"`` (ours): the maximum over all gold answers, with SQuAD's definitions.
- ``"reference"`` (ml-clara's, for comparison with published figures): the first gold answer alone; an answer that is
  exactly ``True`` or ``False`` counts as yes or no; F1 as HotpotQA has it, where yes, no and noanswer share tokens with
  nothing but themselves.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

RULES = ("best", "reference")
ANSWER_METRICS = ("em", "f1", "cover")
# Resampled indices that are held at once.
BOOTSTRAP_CHUNK = 1 << 20

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_CLOSED = frozenset({"yes", "no", "noanswer"})
_BOOLEANS = {"True": "yes", "False": "no"}


# Answers


def normalize_answer(text: str) -> str:
    """SQuAD's: lower case, without ASCII punctuation and English articles, words with one space between them."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str], *, rule: str = "best") -> float:
    """1 if the normalised answer is a gold one, else 0.

    Args:
        answer: what the model wrote.
        golds: accepted answers, the main one first.
        rule: ``"best"`` or ``"reference"``, see the module.

    Raises:
        ValueError: there is no gold answer, or another ``rule``.
    """
    return _judge(lambda a, g: float(a == g), answer, golds, rule)


def f1(answer: str, golds: Sequence[str], *, rule: str = "best") -> float:
    """Harmonic mean of precision and recall over normalised tokens, each counted as often as it occurs.

    Where either has no token left, 1 if both have none, else 0 (SQuAD 2's rule; HotpotQA's, and so ``"reference"``,
    always 0). Arguments and errors as of :func:`exact_match`.
    """
    return _judge(_f1_hotpotqa if rule == "reference" else _f1, answer, golds, rule)


def cover_match(answer: str, golds: Sequence[str], *, rule: str = "best") -> float:
    """1 if every normalised gold token occurs in the answer, in whatever order and number, else 0.

    A gold answer without tokens is covered by an answer without tokens alone (by any, after ``"reference"``).
    Arguments and errors as of :func:`exact_match`.
    """

    def covers(answer: str, gold: str) -> float:
        if not gold and rule == "best":
            return float(not answer)
        return float(set(gold.split()) <= set(answer.split()))

    return _judge(covers, answer, golds, rule)


def answer_scores(
    answers: Sequence[str], golds: Sequence[Sequence[str]], *, rule: str = "best"
) -> dict[str, NDArray[np.float64]]:
    """``em``, ``f1`` and ``cover`` of each answer, ``[n]`` each.

    Raises:
        ValueError: answers and lists of gold answers are not as many, or one of the lists is empty.
    """
    if len(answers) != len(golds):
        raise ValueError(f"answers ({len(answers)}) must be as many as the lists of gold answers ({len(golds)})")
    functions = zip(ANSWER_METRICS, (exact_match, f1, cover_match), strict=True)
    return {
        name: np.array([score(a, g, rule=rule) for a, g in zip(answers, golds, strict=True)], dtype=np.float64)
        for name, score in functions
    }


def answer_metrics(answers: Sequence[str], golds: Sequence[Sequence[str]], *, rule: str = "best") -> dict[str, float]:
    """Means of :func:`answer_scores`; at least one answer must be there."""
    return _means(answer_scores(answers, golds, rule=rule))


def _judge(score: Callable[[str, str], float], answer: str, golds: Sequence[str], rule: str) -> float:
    if rule not in RULES:
        raise ValueError(f"rule ({rule!r}) must be one of {RULES}")
    if isinstance(golds, str) or not golds:
        raise ValueError(f"golds ({golds!r}) must be a list of at least one gold answer")
    if rule == "best":
        answer = normalize_answer(answer)
        return max(score(answer, normalize_answer(gold)) for gold in golds)
    answer, gold = (normalize_answer(_BOOLEANS.get(text, text)) for text in (answer, golds[0]))
    return score(answer, gold)


def _f1(answer: str, gold: str) -> float:
    ours, theirs = answer.split(), gold.split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def _f1_hotpotqa(answer: str, gold: str) -> float:
    closed = answer in _CLOSED or gold in _CLOSED
    return 0.0 if not answer or not gold or (closed and answer != gold) else _f1(answer, gold)


# Rankings


def recall_at(ranked: Sequence[Hashable], positives: Sequence[Hashable], k: int) -> float:
    """Share of the positives that are among the first ``k`` ranked.

    Raises:
        ValueError: ``k`` is below 1, or there is no positive.
    """
    if k < 1:
        raise ValueError(f"k ({k}) must be at least 1")
    wanted = _wanted(positives)
    return len(wanted.intersection(ranked[:k])) / len(wanted)


def reciprocal_rank(ranked: Sequence[Hashable], positives: Sequence[Hashable], depth: int | None = None) -> float:
    """One over the rank of the first positive; 0 where none is among the first ``depth`` (all)."""
    wanted = _wanted(positives)
    return next((1 / rank for rank, item in enumerate(ranked[:depth], 1) if item in wanted), 0.0)


def retrieval_scores(
    ranked: Sequence[Sequence[Hashable]],
    positives: Sequence[Sequence[Hashable]],
    *,
    ks: Sequence[int] = (1, 5),
    depth: int = 10,
) -> dict[str, NDArray[np.float64]]:
    """``recall@k`` for each of ``ks`` and ``mrr@depth`` of each question, ``[n]`` each.

    Args:
        ranked: what was found for each question, best first.
        positives: what should have been found, at least one for each question.
        ks: how far down Recall looks.
        depth: how far down MRR looks.

    Raises:
        ValueError: both are not as many, or a question has no positive (leave out those whose positives are unknown).
    """
    if len(ranked) != len(positives):
        raise ValueError(f"ranked ({len(ranked)}) must be as many as positives ({len(positives)})")
    pairs = list(zip(ranked, positives, strict=True))
    scores = {f"recall@{k}": np.array([recall_at(r, p, k) for r, p in pairs], dtype=np.float64) for k in ks}
    scores[f"mrr@{depth}"] = np.array([reciprocal_rank(r, p, depth) for r, p in pairs], dtype=np.float64)
    return scores


def retrieval_metrics(
    ranked: Sequence[Sequence[Hashable]],
    positives: Sequence[Sequence[Hashable]],
    *,
    ks: Sequence[int] = (1, 5),
    depth: int = 10,
) -> dict[str, float]:
    """Means of :func:`retrieval_scores`; at least one question must be there."""
    return _means(retrieval_scores(ranked, positives, ks=ks, depth=depth))


def _wanted(positives: Sequence[Hashable]) -> set[Hashable]:
    if not len(positives):
        raise ValueError("positives (0) must be at least one: without any, Recall and MRR are undefined")
    return set(positives)


def _means(scores: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    if any(not len(values) for values in scores.values()):
        raise ValueError("there is nothing to average: no question was scored")
    return {name: float(values.mean()) for name, values in scores.items()}


# How sure


def bootstrap_interval(
    scores: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile bootstrap interval of the mean over questions.

    All rows are resampled alike, so that the difference of two systems on the same questions has the interval of
    ``a - b``: give that as ``scores``.

    Args:
        scores: ``[..., n]``, one of each question.
        confidence: probability that the interval is to hold.
        resamples: how often ``n`` questions are drawn with replacement.
        seed: of the draws; the same numbers give the same interval.

    Returns:
        Lower and upper ends, ``[...]`` float64 each.

    Raises:
        ValueError: there are no questions, a score is not finite, or an argument is out of range.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"scores {values.shape} must hold at least one question")
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence ({confidence}) must lie between 0 and 1")
    if resamples < 1:
        raise ValueError(f"resamples ({resamples}) must be at least 1")
    n = values.shape[-1]
    draw = np.random.default_rng(seed)
    means = np.empty((*values.shape[:-1], resamples))
    step = max(1, BOOTSTRAP_CHUNK // n)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = draw.integers(n, size=(count, n))
        for row in np.ndindex(values.shape[:-1]):
            means[(*row, slice(start, start + count))] = values[row][drawn].mean(-1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=-1)
    return low, high
