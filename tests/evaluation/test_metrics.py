"""Metrics by their definitions, on what breaks them, and by what must hold of any text."""

from __future__ import annotations

import re
import string
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clara_fast.evaluation import metrics
from clara_fast.evaluation.metrics import (
    answer_metrics,
    answer_scores,
    bootstrap_interval,
    cover_match,
    exact_match,
    f1,
    normalize_answer,
    recall_at,
    reciprocal_rank,
    retrieval_metrics,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Orrin Bridge.", "orrin bridge"),
        ("  a\tcat, an ant\n& the hat ", "cat ant hat"),
        ("theatre banana Ann", "theatre banana ann"),  # articles are words, not parts of words
        ("the-end", "theend"),  # punctuation goes first, so no word boundary is left
        ("U.S.A.", "usa"),
        ("a.", ""),
        ("The A an", ""),
        ("", ""),
        ("Straße «Zürich» – №5", "straße «zürich» – №5"),  # only ASCII punctuation goes
        ("İstanbul", "i̇stanbul"),  # lower case of a dotted capital I is two code points
        ("x the y", "x y"),  # a no-break space is white space
        ("the’s", "’s"),  # a typographic apostrophe ends a word
        ("1,000.50", "100050"),
    ],
)
def test_normalization(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("answer", "golds", "em", "f", "cover"),
    [
        ("The Orrin Bridge", ["orrin bridge!"], 1, 1, 1),
        ("It is the Orrin bridge", ["Orrin Bridge"], 0, 2 * 2 / (4 + 2), 1),
        ("bridge Orrin", ["Orrin Bridge"], 0, 1, 1),  # order is no matter to F1 and cover
        ("to be", ["to be or not to be"], 0, 2 * 2 / (2 + 6), 0),
        ("to be or not", ["to be or not to be"], 0, 2 * 4 / (4 + 6), 1),  # repeated tokens count for F1 only
        ("Paris", ["London", "paris, France", "PARIS"], 1, 1, 1),
        ("yes, of course", ["yes"], 0, 2 * 1 / (3 + 1), 1),
        ("no", ["yes"], 0, 0, 0),
        ("", ["Paris"], 0, 0, 0),
        ("Paris", ["The"], 0, 0, 0),  # a gold answer without tokens
        ("", ["a"], 1, 1, 1),
        ("the", ["An", "Paris"], 1, 1, 1),
        ("五 月", ["五月"], 0, 0, 0),  # words are what white space separates
        ("Café", ["Cafe"], 0, 0, 0),
    ],
)
def test_best_over_gold_answers(answer, golds, em, f, cover):
    assert exact_match(answer, golds) == em
    assert f1(answer, golds) == pytest.approx(f)
    assert cover_match(answer, golds) == cover


@pytest.mark.parametrize(
    ("answer", "golds", "em", "f", "cover"),
    [
        ("Paris", ["London", "Paris"], 0, 0, 0),  # the first alone
        ("yes, of course", ["yes"], 0, 0, 1),  # the guard is F1's only
        ("Yes.", ["yes"], 1, 1, 1),
        ("noanswer", ["noanswer here"], 0, 0, 0),
        ("True", ["yes"], 1, 1, 1),
        ("true", ["yes"], 0, 0, 0),
        ("no", ["False"], 1, 1, 1),
        ("nobody", ["nobody knows"], 0, 2 / 3, 0),
        ("", ["The"], 1, 0, 1),
        ("Paris", ["The"], 0, 0, 1),
    ],
)
def test_the_references_rule(answer, golds, em, f, cover):
    assert exact_match(answer, golds, rule="reference") == em
    assert f1(answer, golds, rule="reference") == pytest.approx(f)
    assert cover_match(answer, golds, rule="reference") == cover


# Texts where everything that normalisation does matters.
words = st.sampled_from(
    ["a", "The", "an", "yes", "no", "cat", "Cat", "hat.", "x-y", "é", "İ", "\u00a0", "ß", ",", "noanswer"]
)
texts = st.one_of(st.lists(words, max_size=6).map(" ".join), st.text(max_size=12))


def squad_f1(answer, gold):
    """SQuAD's definition, spelled out by precision and recall."""

    def tokens(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    ours, theirs = tokens(answer), tokens(gold)
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_properties(answer, golds):
    em, f, cover = exact_match(answer, golds), f1(answer, golds), cover_match(answer, golds)
    assert em in (0, 1)
    assert 0 <= f <= 1
    assert cover in (0, 1)
    if em:
        assert f == cover == 1
    assert f == pytest.approx(max(squad_f1(answer, gold) for gold in golds))
    assert f >= max(f1(answer, [gold]) for gold in golds) - 1e-12
    for gold in golds:
        assert f1(answer, [gold]) == f1(gold, [answer])
        assert exact_match(answer, [gold]) == exact_match(gold, [answer])
        assert exact_match(gold, golds) == 1
        assert f1(answer, [gold], rule="reference") <= f1(answer, [gold]) or {answer, gold} & {"True", "False"}
    assert normalize_answer(normalize_answer(answer)).split() == [
        word for word in normalize_answer(answer).split() if word not in ("a", "an", "the")
    ]


def test_means():
    answers, golds = ["The cat", "dog", "a big hat"], [["cat"], ["cat"], ["hat", "cap"]]
    scores = answer_scores(answers, golds)
    assert {name: list(values) for name, values in scores.items()} == {
        "em": [1, 0, 0],
        "f1": [1, 0, pytest.approx(2 / 3)],
        "cover": [1, 0, 1],
    }
    assert answer_metrics(answers, golds) == pytest.approx({"em": 1 / 3, "f1": 5 / 9, "cover": 2 / 3})


def test_retrieval():
    measured = retrieval_metrics([[3, 1, 2], [0, 4, 5], [7, 8, 9]], [[1, 3], [5], [0]])
    assert measured == pytest.approx({"recall@1": 0.5 / 3, "recall@5": 2 / 3, "mrr@10": (1 + 1 / 3) / 3})
    assert recall_at(["b", "a", "c"], ["a", "c", "z"], 2) == pytest.approx(1 / 3)
    assert recall_at([1, 2], [2, 2], 2) == 1  # positives named twice are one
    assert reciprocal_rank(list(range(20)), [10]) == pytest.approx(1 / 11)
    assert reciprocal_rank(list(range(20)), [10], depth=10) == 0
    assert recall_at([], [1], 5) == reciprocal_rank([], [1]) == 0


@given(st.permutations(range(8)), st.sets(st.integers(0, 11), min_size=1), st.integers(1, 9))
def test_recall_grows_with_k(ranked, positives, k):
    here, further = recall_at(ranked, list(positives), k), recall_at(ranked, list(positives), k + 1)
    assert 0 <= here <= further <= 1
    assert (recall_at(ranked, list(positives), 1) > 0) == (reciprocal_rank(ranked, list(positives)) == 1)


def test_bootstrap_equals_the_normal_interval_of_many_questions():
    scores = (np.arange(2000) % 4 == 0).astype(float)
    low, high = bootstrap_interval(scores, resamples=4000)
    half = 1.96 * scores.std() / len(scores) ** 0.5
    # The ends come from 4000 draws: their own standard error is about a twentieth of the half width.
    assert abs(low - (0.25 - half)) < half / 5
    assert abs(high - (0.25 + half)) < half / 5


def test_bootstrap_covers_the_true_mean_as_often_as_it_says():
    draw = np.random.default_rng(1)
    samples = (draw.random((400, 120)) < 0.3).astype(float)
    low, high = bootstrap_interval(samples, confidence=0.9, resamples=400)
    held = ((low <= 0.3) & (high >= 0.3)).mean()
    assert 0.84 < held < 0.96  # four standard errors of 400 trials


def test_bootstrap_of_several_rows_pairs_them(monkeypatch):
    draw = np.random.default_rng(0)
    a = draw.random(50)
    rows = np.stack([a, a + 0.1, np.ones(50)])
    low, high = bootstrap_interval(rows, resamples=200, seed=3)
    assert low.shape == high.shape == (3,)
    assert (low <= rows.mean(1) + 1e-12).all()
    assert (rows.mean(1) <= high + 1e-12).all()
    assert low[1] - low[0] == pytest.approx(0.1)  # the same questions were drawn
    assert low[2] == high[2] == 1
    again = bootstrap_interval(a, resamples=200, seed=3)
    assert again[0] == low[0]
    assert again[1] == high[0]
    assert bootstrap_interval(a, resamples=200, seed=4)[0] != low[0]
    monkeypatch.setattr(metrics, "BOOTSTRAP_CHUNK", 64)  # one resample at a time draws the same
    assert bootstrap_interval(a, resamples=200, seed=3) == again


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact_match("a", []), r"golds \(\[\]\) must be a list of at least one gold answer"),
        (lambda: f1("a", "abc"), r"golds \('abc'\) must be a list"),
        (lambda: cover_match("a", ["a"], rule="mean"), r"rule \('mean'\) must be one of"),
        (lambda: answer_scores(["a"], []), r"answers \(1\) must be as many as the lists of gold answers \(0\)"),
        (lambda: answer_metrics([], []), "nothing to average"),
        (lambda: recall_at([1], [1], 0), r"k \(0\) must be at least 1"),
        (lambda: recall_at([1], [], 1), r"positives \(0\) must be at least one"),
        (lambda: retrieval_metrics([[1]], []), r"ranked \(1\) must be as many as positives \(0\)"),
        (lambda: retrieval_metrics([], []), "nothing to average"),
        (lambda: bootstrap_interval([]), r"scores \(0,\) must hold at least one question"),
        (lambda: bootstrap_interval([1.0, np.nan]), "scores must be finite"),
        (lambda: bootstrap_interval([1.0], confidence=1), r"confidence \(1\) must lie between 0 and 1"),
        (lambda: bootstrap_interval([1.0], resamples=0), r"resamples \(0\) must be at least 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
