"""Reading corpora: the three forms, and what is said of their faults."""

from __future__ import annotations

import datetime
import gzip
import json
import pickle
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clara_fast.store import Corpus, CorpusError
from clara_fast.store.documents import document_text

LINES = [
    {"id": "a", "title": "First", "text": "Text one.", "url": "u", "metadata": {"year": 1999}},
    {"id": 7, "text": "Text two."},
    {"title": None, "text": "Text three."},
]


def write_lines(path, lines, opener=open):
    with opener(path, "wb") as stream:
        for line in lines:
            stream.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
    return path


@pytest.mark.parametrize(("name", "opener"), [("c.jsonl", open), ("c.jsonl.gz", gzip.open)])
def test_json_lines(tmp_path, name, opener):
    path = write_lines(tmp_path / name, [LINES[0], b"", LINES[1], LINES[2]], opener)
    corpus = Corpus.open(path)
    records = list(corpus)
    assert [(r.id, r.title, r.text) for r in records] == [
        ("a", "First", "Text one."),
        ("7", "", "Text two."),
        ("4", "", "Text three."),
    ]
    assert records[0].metadata == {"url": "u", "year": 1999}
    assert records[2].where == f"{path}, line 4"
    assert corpus.count() == 4
    assert list(corpus) == records
    assert [r.id for r in Corpus.open(path, limit=2)] == ["a", "7"]
    assert Corpus.open(path, limit=2).count() == 2


def test_other_field_names(tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [{"key": "k", "head": "H", "body": "B", "text": 5}])
    (record,) = Corpus.open(path, text_field="body", id_field="key", title_field="head")
    assert (record.id, record.title, record.text, record.metadata) == ("k", "H", "B", {"text": 5})


def test_the_last_line_needs_no_line_break(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b"}')
    assert Corpus.open(tmp_path / "c.jsonl").count() == len(list(Corpus.open(tmp_path / "c.jsonl"))) == 2
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert Corpus.open(tmp_path / "empty.jsonl").count() == len(list(Corpus.open(tmp_path / "empty.jsonl"))) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "line 2 is not JSON .column"),
        (b'\xff{"text": "x"}', "line 2 is not UTF-8 text"),
        (b"[1]", "line 2 must be a JSON object, not list"),
        (
            b'{"body": "x", "id": "b"}',
            "line 2: no field 'text' with the text .there are: 'body', 'id'.*--text-field",
        ),
        (b'{"text": null}', "line 2: no field 'text'"),
        (b'{"text": ["x"]}', "line 2: field 'text' must be a string, not list"),
        (b'{"text": "x", "title": 3}', "line 2: field 'title' must be a string, not int"),
        (b'{"text": " \\n", "id": "b"}', "line 2: document 'b' is empty"),
        (b'{"text": "x", "id": 1.5}', "line 2: field 'id' must be a string or an integer"),
        (b'{"text": "x", "id": true}', "line 2: field 'id' must be a string or an integer"),
        (b'{"text": "x", "id": ""}', "line 2: field 'id' must be a string or an integer that is not empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "c.jsonl", [LINES[0], line])
    reader = iter(Corpus.open(path))
    assert next(reader).id == "a"
    with pytest.raises(CorpusError, match=f"c.jsonl, {message}"):
        next(reader)


def test_parquet(tmp_path):
    table = pa.table(
        {"id": ["a", "b"], "text": ["One.", "Two."], "n": [1, None], "day": [datetime.date(2020, 1, 2), None]}
    )
    pq.write_table(table, tmp_path / "c.parquet")
    corpus = Corpus.open(tmp_path / "c.parquet")
    assert [(r.id, r.title, r.text) for r in corpus] == [("a", "", "One."), ("b", "", "Two.")]
    assert next(iter(corpus)).metadata == {"n": 1, "day": "2020-01-02"}
    assert corpus.count() == 2
    pq.write_table(table.drop_columns("id").slice(1), tmp_path / "d.parquet")
    assert [r.id for r in Corpus.open(tmp_path / "d.parquet")] == ["1"]
    with pytest.raises(CorpusError, match="row 1: no field 'body'"):
        list(Corpus.open(tmp_path / "c.parquet", text_field="body"))


def test_folder(tmp_path):
    folder = tmp_path / "notes"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "x.txt").write_text("hidden")
    (folder / "b.txt").write_text("\ufeffA title\n\nThe text.\n", encoding="utf-8")
    (folder / "a.md").write_text("# Heading\nBody\nmore")
    (folder / "sub" / "long.TXT").write_text("A long first line, " * 10 + "\nand the rest.")
    (folder / "sub" / "one.txt").write_text("Only one line.")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    corpus = Corpus.open(folder)
    assert [(r.id, r.title) for r in corpus] == [
        ("a.md", "Heading"),
        ("b.txt", "A title"),
        ("sub/long.TXT", "long"),
        ("sub/one.txt", "one"),
    ]
    assert [r.text for r in corpus][:2] == ["Body\nmore", "The text."]
    assert corpus.count() == 4
    (folder / "c.txt").write_bytes(b"abc\xe4")
    with pytest.raises(CorpusError, match=r"c.txt is not UTF-8 text \(byte 3\)"):
        list(corpus)
    (folder / "c.txt").write_text(" \n")
    with pytest.raises(CorpusError, match=r"c.txt: document 'c.txt' is empty"):
        list(corpus)


def test_what_is_not_a_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Corpus.open(tmp_path / "nothing.jsonl")
    with pytest.raises(CorpusError, match=r"holds no .txt, .md, .jsonl or .parquet file"):
        Corpus.open(tmp_path)
    (tmp_path / "c.csv").write_text("a,b")
    with pytest.raises(CorpusError, match=r"must be a .jsonl"):
        Corpus.open(tmp_path / "c.csv")
    (tmp_path / "c.parquet").write_text("PAR1 but no")
    with pytest.raises(CorpusError, match=r"c.parquet is damaged or of another format"):
        list(Corpus.open(tmp_path / "c.parquet"))
    (tmp_path / "c.jsonl.gz").write_text("not gzip")
    with pytest.raises(CorpusError, match=r"c.jsonl.gz is damaged or of another format"):
        list(Corpus.open(tmp_path / "c.jsonl.gz"))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    with pytest.raises(CorpusError, match=r"d.jsonl.gz is damaged"):
        list(Corpus.open(tmp_path / "d.jsonl.gz"))
    with pytest.raises(ValueError, match=r"limit \(0\) must be at least 1"):
        Corpus.open(tmp_path / "c.csv", limit=0)


def test_lists_of_documents(tmp_path):
    """Question files: candidates of many questions, each of them once."""
    file = tmp_path / "questions.jsonl"
    rows = [["Ann\nAnn came.", "Bob left."], ["Bob left.", "x" * 200 + "\nlong", " \nText"]]
    file.write_text("".join(json.dumps({"id": str(i), "docs": docs}) + "\n" for i, docs in enumerate(rows)))
    corpus = Corpus.open(file, text_field="docs")
    records = list(corpus)
    assert corpus.count() == len(records) == len({record.id for record in records}) == 4
    assert (records[0].title, records[0].text) == ("Ann", "Ann came.")
    # The model reads what the file says, to the letter.
    assert [document_text(r.title, r.text) for r in records] == list(dict.fromkeys([*rows[0], *rows[1]]))
    file.write_text(json.dumps({"docs": ["Ann came.", ""]}))
    with pytest.raises(CorpusError, match=r"line 1: docs\[1\]: document .* is empty"):
        list(Corpus.open(file, text_field="docs"))
    file.write_text(json.dumps({"docs": ["Ann came.", 3]}))
    with pytest.raises(CorpusError, match=r"line 1: docs\[1\] must be a string, not int"):
        list(Corpus.open(file, text_field="docs"))
    file.write_text(json.dumps({"docs": ["Ann came."]}) + "\n" + json.dumps({"docs": "Bob left."}))
    with pytest.raises(CorpusError, match="line 2: field 'docs' must be a list of documents, as on the first line"):
        list(Corpus.open(file, text_field="docs"))


def test_a_folder_of_data_files(tmp_path):
    write_lines(tmp_path / "b.jsonl", [{"text": "B one."}, {"id": "own", "text": "B two."}])
    (tmp_path / "a").mkdir()
    pq.write_table(pa.table({"text": ["A one.", "A two."]}), tmp_path / "a" / "x.parquet")
    (tmp_path / "README.md").write_text("About this data.")
    corpus = Corpus.open(tmp_path)
    assert [(r.id, r.text) for r in corpus] == [
        ("a/x.parquet:1", "A one."),
        ("a/x.parquet:2", "A two."),
        ("b.jsonl:1", "B one."),
        ("own", "B two."),
    ]
    assert corpus.count() == 4
    (tmp_path / "notes.md").write_text("A document?")
    with pytest.raises(CorpusError, match=r"holds data files .* and text files .'notes.md'.*folders of their own"):
        Corpus.open(tmp_path)
    (tmp_path / "notes.md").unlink()
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a" / "x.parquet").read_bytes()[:-9])
    with pytest.raises(CorpusError, match=r"c.parquet is damaged or of another format"):
        list(Corpus.open(tmp_path))


def test_bad_rows_can_be_left_out(tmp_path):
    lines = [LINES[0], b"{", b"[1]", {"text": " "}, {"text": "half \ud800"}, {"id": 1.5, "text": "x"}, LINES[1]]
    errors = []
    corpus = Corpus.open(write_lines(tmp_path / "c.jsonl", lines), on_bad=lambda error: errors.append(str(error)))
    assert [r.id for r in corpus] == ["a", "7"]
    assert [error.split("line ")[1][0] for error in errors] == ["2", "3", "4", "5", "6"]
    assert "line 5: the text holds half of a surrogate pair" in errors[3]
    errors.clear()
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "f" / "b.txt").write_text("Text.")
    assert [r.id for r in Corpus.open(tmp_path / "f", on_bad=lambda error: errors.append(str(error)))] == ["b.txt"]
    assert "a.txt is not UTF-8" in errors[0]


def test_rows_at_hand():
    rows = [{"text": "One.", "n": 1}, {"text": "Two."}, "no"]
    corpus = Corpus.of_rows(rows, name="mine")
    assert corpus.count() == 3
    reader = iter(corpus)
    assert [(r.id, r.text, r.metadata) for r in (next(reader), next(reader))] == [
        ("1", "One.", {"n": 1}),
        ("2", "Two.", {}),
    ]
    with pytest.raises(CorpusError, match="mine, row 3 must be a mapping of fields, not str"):
        next(reader)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return pytest.importorskip("datasets", reason="needs the extra 'datasets'")


def test_data_sets_are_streamed(tmp_path, datasets):
    folder = tmp_path / "set"
    folder.mkdir()
    table = pa.table({"body": [f"Text {i}." for i in range(5)], "day": [datetime.date(2020, 1, 2)] * 5})
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    pq.write_table(table.slice(0, 2), folder / "test-00000-of-00001.parquet")
    corpus = Corpus.open(folder, split="train", text_field="body")
    expected = [(f"{i + 1}", f"Text {i}.", {"day": "2020-01-02"}) for i in range(5)]
    assert [(r.id, r.text, r.metadata) for r in corpus] == expected
    assert list(corpus) == list(corpus)
    assert corpus.count() in (None, 5)
    assert [r.text for r in Corpus.open(folder, split="test", text_field="body")] == ["Text 0.", "Text 1."]
    with pytest.raises(CorpusError, match=r"set, row 1: no field 'text' .*there are: 'body', 'day'"):
        next(iter(Corpus.open(folder, split="train")))
    with pytest.raises(CorpusError, match=r"cannot read data set .*set: .*nothing"):
        Corpus.open(folder, split="nothing")
    (tmp_path / "c.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="split and subset are for data sets"):
        Corpus.open(tmp_path / "c.jsonl", split="train")


def test_data_sets_at_hand_and_on_disk(tmp_path, datasets):
    try:
        made = datasets.Dataset.from_dict({"body": [f"Text {i}." for i in range(5)]})
    except pickle.PicklingError as error:
        pytest.skip(f"this datasets cannot hash tables of this pyarrow: {error}")
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"a": made, "b": made.select(range(2))}).save_to_disk(str(tmp_path / "both"))
    for corpus in (
        Corpus.of_rows(made, text_field="body"),
        Corpus.open(tmp_path / "saved", text_field="body"),
        Corpus.open(tmp_path / "both", text_field="body", split="a"),
    ):
        assert [(r.id, r.text) for r in corpus] == [(f"{i + 1}", f"Text {i}.") for i in range(5)]
        assert corpus.count() == 5
    with pytest.raises(CorpusError, match=r"both has the splits 'a', 'b': choose one \(--split\)"):
        Corpus.open(tmp_path / "both")


def test_the_hub_needs_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install clara-fast\[datasets\]"):
        Corpus.open("hf://datasets/owner/name", split="train")
