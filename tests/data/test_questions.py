"""Reading questions with candidates: the formats of both stages, and bad rows by file, line and rule."""

from __future__ import annotations

import gzip
import json

import pytest

from clara_fast.data import read_multidoc, read_scp

GOOD = {"id": "g", "question": "Who?", "docs": ["Ann came.", "Bob left."], "gold_answer": "Ann"}


def write(file, *rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    return file


def test_the_formats_of_both_stages(tmp_path):
    instruct = {"question": "Who?", "docs": ["Ann came."], "gold_answer": "Ann", "answer": "It was Ann who came."}
    joint = {**GOOD, "answers": ["Ann", "Anna"], "pos_index": [1, 0], "source": "nq"}
    corpus = {"question": ["Who?"], "answers": ["Ann"], "gold_ids": ["p7", 8]}
    first, second = read_multidoc(write(tmp_path / "a.jsonl.gz", instruct, joint))
    assert first.exchange(teacher=True) == ("Who?", "It was Ann who came.")
    assert first.exchange() == ("Who?", "Ann")
    assert first.id.endswith("a.jsonl.gz, line 1")
    assert (second.id, second.answers, second.positives) == ("g", ["Ann", "Anna"], [1, 0])
    assert second.exchange(teacher=True) == ("Who?", "Ann")
    third = read_multidoc(write(tmp_path / "b.jsonl", corpus), need_documents=False)[0]
    assert (third.documents, third.gold_ids) == ([], ["p7", "8"])
    assert len(read_multidoc([tmp_path / "a.jsonl.gz", tmp_path / "a.jsonl.gz"], limit=3)) == 3


def test_the_references_other_names(tmp_path):
    """Its loader takes documents and answers under several names; its evaluation files have golden_answers."""
    rows = {"question": "Who?", "context": ["Ann came."], "golden_answers": ["Ann", "Anna"], "pos_index": 0}
    asked = read_multidoc(write(tmp_path / "dev.jsonl", rows))[0]
    assert (asked.documents, asked.answers, asked.positives) == (["Ann came."], ["Ann", "Anna"], [0])
    qa = {"content": ["Ann came."], "question": "Who?", "answer": "Ann"}
    paraphrase = {"data_type": "paraphrase", "docs": ["Ann came."], "question": "", "answers": ["It was Ann who came."]}
    first, second = read_scp(write(tmp_path / "scp.jsonl", qa, "", paraphrase))
    assert (first.document, first.pairs) == ("Ann came.", [("Who?", "Ann")])
    assert (second.questions, second.answers) == ([], ["It was Ann who came."])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", json.dumps(GOOD).encode() + b'\n{"question": "caf\xe9"}\n', "a.jsonl, line 2: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(json.dumps(GOOD).encode() * 99)[:-20], "a.jsonl.gz: damaged gzip file"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz: damaged gzip file"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_multidoc(tmp_path / name)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_multidoc(tmp_path / "a.jsonl")[0].id == "g"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ({**GOOD, "question": " "}, "question must hold one question with text"),
        ({**GOOD, "question": ["A?", "B?"]}, "question must hold one question with text"),
        ({**GOOD, "docs": []}, "docs must hold at least one candidate document"),
        ({**GOOD, "docs": "Ann came."}, "docs must be a list of documents, not str"),
        ({**GOOD, "docs": None, "context": "Ann came."}, "context must be a list of documents, not str"),
        ({**GOOD, "docs": ["Ann came.", " "]}, r"docs\[1\] must hold text"),
        ({**GOOD, "gold_answer": None}, "there is no answer"),
        ({**GOOD, "answers": ["Ann", ""]}, "answers must hold answers with text"),
        ({**GOOD, "gold_answer": ""}, "gold_answer must hold answers with text"),
        ({**GOOD, "pos_index": [2]}, r"pos_index \(2\) must be at least 0 and below the 2 docs"),
        ({**GOOD, "pos_index": [-1]}, r"pos_index \(-1\) must be at least 0"),
        ({**GOOD, "pos_index": ["0"]}, "pos_index must hold integers, not '0'"),
        ({**GOOD, "gold_ids": "p7"}, "gold_ids must be a list of ids, not str"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    file = write(tmp_path / "train.jsonl", GOOD, row)
    with pytest.raises(ValueError, match=f"train.jsonl, line 2: {message}"):
        read_multidoc(file)


def test_no_rows(tmp_path):
    with pytest.raises(ValueError, match=r"no sample in .*empty\.jsonl"):
        read_multidoc(write(tmp_path / "empty.jsonl"))
