"""What is asked, and which documents may be read."""

from __future__ import annotations

import json

import pytest

from clara_fast.data import QuestionSample
from clara_fast.evaluation.protocol import EvalProtocol, another, read_eval_set

SAMPLE = QuestionSample("s", "q?", ["a", "b", "a", "c", "d"], ["x"], positives=[1, 4])
MULTIDOC = {"question": "q?", "docs": ["a", "b"], "answers": ["x"], "pos_index": [1]}


@pytest.mark.parametrize(
    ("name", "selection", "documents", "positives", "absent"),
    [
        ("normal", "retriever", ["a", "b"], [1], 1),
        ("oracle", "retriever", ["a", "b", "d"], [1, 2], 0),
        ("normal", "gold", ["a", "b", "d"], [1, 2], 0),
    ],
)
def test_candidates(name, selection, documents, positives, absent):
    found = EvalProtocol(name, selection, num_candidates=3).candidates(SAMPLE)
    assert (found.documents, found.positives, found.absent) == (documents, positives, absent)


@pytest.mark.parametrize(
    ("name", "selection", "read"),
    [
        ("normal", "retriever", None),
        ("normal", "given", ["a", "b"]),
        ("oracle", "given", ["b", "d"]),
        ("normal", "gold", ["b", "d"]),
    ],
)
def test_what_is_read_whatever_a_retriever_says(name, selection, read):
    protocol = EvalProtocol(name, selection)
    sample = protocol.candidates(SAMPLE)
    unranked = protocol.unranked(sample, 2)
    assert (None if unranked is None else [sample.documents[i] for i in unranked]) == read


def test_passages_become_a_question_each(scp):
    questions = read_eval_set(str(scp), EvalProtocol(), limit=3)
    assert (questions.name, questions.single, len(questions.samples)) == ("scp", True, 3)
    assert [s.id for s in questions.samples] == ["0/0", "1/0", "2/0"]
    assert all(s.positives == [0] for s in questions.samples)


def test_questions_without_ids_of_their_own_differ(write):
    file = write("q.jsonl", [{**MULTIDOC, "id": "same"}, {**MULTIDOC, "id": "same"}])
    assert [s.id for s in read_eval_set(str(file), EvalProtocol()).samples] == ["same", "same#2"]


def test_data_sets_by_name(tmp_path, monkeypatch):
    (tmp_path / "musique").mkdir()
    for name, question in (("no_pos", "normal?"), ("with_pos", "oracle?")):
        row = {"question": question, "docs": ["a"], "golden_answers": ["x", "y"], "pos_index": []}
        (tmp_path / "musique" / f"eval_processed_{name}.jsonl").write_text(json.dumps(row))
    for name in ("normal", "oracle"):
        questions = read_eval_set("musique", EvalProtocol(name), folder=tmp_path)
        assert (questions.name, questions.samples[0].question) == ("musique", f"{name}?")
        assert questions.samples[0].answers == ["x", "y"]
    (tmp_path / "multidoc_dev_nq.jsonl").write_text(json.dumps(MULTIDOC))
    monkeypatch.setenv("CLARA_FAST_DATA", str(tmp_path))
    assert read_eval_set("nq", EvalProtocol()).samples[0].documents == ["a", "b"]


def test_another_question_shares_no_document(multidoc):
    samples = read_eval_set(str(multidoc), EvalProtocol()).samples
    assert another(samples, 4) is samples[0]
    samples[1].documents[2] = samples[0].documents[0]
    assert another(samples, 0) is samples[2]
    with pytest.raises(ValueError, match="method 'other' needs another question"):
        another(samples[:2], 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1, "title": "t", "text": "x"}, "line 1: holds no question, but id, title, text"),
        ({**MULTIDOC, "answers": []}, "line 1: there is no answer"),
        ({**MULTIDOC, "answers": [" "]}, "line 1: answers must hold answers with text"),
        ({**MULTIDOC, "docs": []}, "line 1: docs must hold at least one candidate"),
        ({**MULTIDOC, "question": ["q?", "r?"]}, "line 1: docs must hold exactly one passage"),
        ({"data_type": "paraphrase", "docs": ["a"], "answers": ["b"]}, "holds passages, but no question"),
        ({"data_type": "qa", "docs": ["a"], "question": ["q"], "answers": [""]}, "none may be empty"),
    ],
)
def test_files_of_another_form(write, row, message):
    with pytest.raises(ValueError, match=message):
        read_eval_set(str(write("rows.jsonl", [row])), EvalProtocol())


def test_other_errors(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'wikihop' is neither a file nor a data set: those are nq, hotpotqa"):
        read_eval_set("wikihop", EvalProtocol())
    with pytest.raises(FileNotFoundError, match=r"missing.jsonl does not exist"):
        read_eval_set("missing.jsonl", EvalProtocol())
    with pytest.raises(FileNotFoundError, match=r"data set 'nq' is not in .*: none of multidoc_dev_nq.jsonl"):
        read_eval_set("nq", EvalProtocol(), folder=tmp_path)
    with pytest.raises(ValueError, match=r"select \('gold'\) needs pos_index, which sample .*line 1 lacks"):
        read_eval_set(str(write("q.jsonl", [{**MULTIDOC, "pos_index": []}])), EvalProtocol(selection="gold"))
    for options, message in (
        ({"name": "best"}, r"protocol \('best'\) must be one of normal, oracle"),
        ({"selection": "all"}, r"select \('all'\) must be one of retriever, given, gold"),
        ({"top_k": 0}, r"top_k \(0\) must be at least 1"),
        ({"num_candidates": 0}, r"candidates \(0\) must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            EvalProtocol(**options)
