"""What models write instead of the JSON that they were asked for."""

from __future__ import annotations

import contextlib
import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clara_fast.synthesis.parsing import (
    Question,
    UnusableAnswer,
    json_values,
    normalized,
    read_list,
    read_questions,
    read_text,
    read_verdict,
)

ONE = '{"facts": ["f"], "question": "Who?"}'


@pytest.mark.parametrize(
    "content",
    [
        f'{{"questions": [{ONE}]}}',
        f"[{ONE}]",
        ONE,
        f"Sure, here it is:\n```json\n{ONE}\n```\nDo you want more?",
        f'<think>maybe {{"question": "What?"}}</think>{ONE}',
        f'maybe {{"question": "What?"}}</think>{ONE}',
        '{"questions": [{"facts": ["f",], "question": "Who?",},],}',
        f'{{"questions": [{ONE}, {{"facts": ["g"], "quest',
        f"As asked [see above] {{so}}: {ONE}",
        '{"fact": "f", "question": " Who?\n"}',
    ],
)
def test_one_question_however_it_is_wrapped(content):
    assert read_questions(content) == [Question("Who?", ["f"])]


@pytest.mark.parametrize(
    "content", ["", "Who?", "[]", '{"questions": []}', '{"question": 5}', '{"question": " "}', "[" * 9999]
)
def test_no_question(content):
    with pytest.raises(UnusableAnswer):
        read_questions(content)


def test_several_questions_in_their_order():
    assert [q.text for q in read_questions(f'["A?", {{"question": "B?"}}] {ONE}')] == ["A?", "B?", "Who?"]


@pytest.mark.parametrize(
    ("content", "accept"),
    [
        ('{"reason": "r", "accept": true}', True),
        ('{"accept": "Yes", "reason": "r"}', True),
        ('[{"reason": "r", "accept": false}]', False),
        ('Accept? No: {"reason": "r", "accept": "reject"}', False),
        ('{"reason": "r", "accept": true,}', True),
    ],
)
def test_a_verdict(content, accept):
    assert (read_verdict(content).accept, read_verdict(content).reason) == (accept, "r")


@pytest.mark.parametrize(
    "content",
    [
        "I accept.",
        '{"accept": null}',
        '{"accept": 1}',
        '{"accept": "true or false"}',
        '{"accept": true or false}',
        '{"accept": true} {"accept": false}',
        '{"reason": "{"accept": true} would be wrong", "accept": false}',  # quotation in a broken object
        '{"reason": "it is not", {"accept": true}',
        '{"verdict": true}',
    ],
)
def test_a_verdict_is_never_guessed(content):
    with pytest.raises(UnusableAnswer):
        read_verdict(content)


def test_texts_and_lists():
    assert read_text('{"answer": 1889}', "answer") == "1889"
    assert read_text('{"answer": ""}', "answer") == ""
    assert read_list('{"missing": []}', "missing") == []
    assert read_list('["a", " "]', "missing") == ["a"]
    for content in (
        "[1]",
        '{"question": "x"}',
        '{"answer": true}',
        '{"answer": ["x"]}',
        '{"answer": "a"} {"answer": "b"}',
        '{"answer": "a',
    ):
        with pytest.raises(UnusableAnswer):
            read_text(content, "answer")
    with pytest.raises(UnusableAnswer):
        read_list('{"missing": "all"}', "missing")


def test_a_comma_inside_a_string_stays():
    assert json_values('{"a": "x,]", "b": [1,],}') == [{"a": "x,]", "b": [1]}]


def test_equal_questions():
    assert normalized(" Who was  Élise?! ") == normalized("who was ÉLISE")
    assert normalized("Who was he") != normalized("Who was she")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
)
prose = st.text(alphabet=string.ascii_letters + " .,:;\"'\n]}")


@given(st.lists(values) | st.dictionaries(st.text(), values), prose, prose)
def test_any_json_is_found_in_any_prose(value, before, after):
    assert json_values(before + json.dumps(value) + after) == [value]


@given(st.text())
def test_any_text_is_usable_or_refused(text):
    for read in (read_questions, read_verdict, lambda t: read_text(t, "a"), lambda t: read_list(t, "a")):
        with contextlib.suppress(UnusableAnswer):
            read(text)
