"""Wrong use of ``clara-fast synthesize``: one clear line, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import socket

import pytest

from clara_fast.cli import main
from clara_fast.synthesis import Items, Prompts, copy_prompts, question_of
from clara_fast.synthesis.journal import Journal
from tests.synthesis.server import ModelServer, write_passages


@pytest.fixture
def server():
    with ModelServer() as server:
        yield server


@pytest.fixture
def refused(tmp_path, server, capsys, monkeypatch):
    """Runs the command with some options changed; asserts that it ends with code 2 and returns its one line."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    passages = tmp_path / "passages.jsonl"

    def call(*more, code=2, **changed):
        if not passages.exists():
            write_passages(passages, 1)
        options = {"endpoint": server.url, "model": "tiny", "out": tmp_path / "scp.jsonl", "backoff": 0, "retries": 1}
        arguments = ["synthesize", str(changed.pop("passages", passages)), *map(str, more)]
        for key, value in {**options, **changed}.items():
            arguments += [f"--{key.replace('_', '-')}", str(value)]
        before = set(tmp_path.rglob("*"))
        assert main(arguments) == code
        said = capsys.readouterr().err.strip()
        assert "\n" not in said
        assert set(tmp_path.rglob("*")) == before
        return said

    return call


def test_an_endpoint_that_is_not_there(refused):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert f"cannot reach http://127.0.0.1:{port}/v1: " in refused(endpoint=f"http://127.0.0.1:{port}")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert "/v1: no answer within 0.3 s" in refused(endpoint=f"http://127.0.0.1:{port}", timeout=0.3)
    assert "endpoint (localhost:8000) must be a URL" in refused(endpoint="localhost:8000")


def test_what_the_server_refuses_for_good(refused, server):
    server.fail = lambda body, before: "no model"
    said = refused(model="none")
    assert "refuses model 'none': The model `none` does not exist. (HTTP 404). Its models: tiny, large" in said
    server.fail = lambda body, before: "no good"
    assert "refuses model 'tiny': I do not like it (HTTP 400)" in refused()
    server.fail = lambda body, before: "no key"
    assert "refuses the key: Incorrect API key provided (HTTP 401); no key was given" in refused()
    assert "the environment variable NOT_SET (--api-key-env) is not set" in refused(api_key_env="NOT_SET")
    server.fail = lambda body, before: "no quota"
    server.asked.clear()
    assert refused(retries=8) == f"error: {server.url}: You exceeded your current quota (HTTP 429)"
    assert len(server.asked) == 1  # a 429 that no waiting mends
    server.fail = lambda body, before: "500"
    server.asked.clear()
    assert "does not answer: oh (HTTP 500), after 2 attempts" in refused(code=1)
    assert len(server.asked) == 2  # it is told once, not by everyone


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no item"),
        ("[1]\n", "line 1: must be a JSON object"),
        ("{\n", "line 1: not JSON"),
        ('{"question": "q", "docs": ["d"]}\n', "line 1: no field 'text' with the passage (there are: docs, question)"),
        ('{"text": " "}\n', "line 1: text must hold text, not ' '"),
        ('{"text": ["a", 5]}\n', "line 1: text[1] must hold text, not 5"),
        ('{"text": "a", "title": 5}\n', "line 1: title must be a string, not 5"),
        ('{"text": "a", "id": 1.5}\n', "line 1: id must be a string or an integer, not 1.5"),
        ('{"text": "a", "id": 1}\n{"text": "b", "id": 1}\n', "id '1' is given to two different items"),
    ],
)
def test_passages_of_the_wrong_format(refused, server, tmp_path, content, message):
    (tmp_path / "passages.jsonl").write_text(content)
    assert message in refused()
    assert server.asked == []


def test_files(refused, tmp_path):
    assert "does not exist" in refused(passages=tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    assert "line 1: not UTF-8" in refused(passages=tmp_path / "latin.jsonl")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    assert "damaged gzip file" in refused(passages=tmp_path / "broken.jsonl.gz")
    (tmp_path / "file").write_text("")
    assert f"cannot write {tmp_path}/file/scp.journal.jsonl: " in refused(out=tmp_path / "file" / "scp.jsonl")
    assert "must be a .jsonl file" in refused(out=tmp_path / "scp.json")
    (tmp_path / "mine.jsonl").write_text("mine")
    assert "mine.jsonl exists, and no journal beside it" in refused(out=tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("task", "x", "task (x) must be scp or teacher"),
        ("rounds", 11, "rounds (11) must be 1 to 10"),
        ("limit", 0, "limit (0) must be at least 1"),
        ("concurrency", 0, "concurrency (0) must be at least 1"),
        ("requests_per_minute", 0, "a limit per minute (0.0) must be above 0"),
        ("structured", "xml", "structured (xml) must be auto, json_schema, json_object, off"),
        ("extra_body", "{", "extra_body is not JSON"),
        ("extra_body", "1", "extra_body (1) must be a JSON object"),
        ("price_in", -1, "prices (-1 and 0) must be at least 0"),
        ("prompts", "/nowhere", "prompts /nowhere is not a folder"),
    ],
)
def test_options(refused, option, value, message):
    assert message in refused(**{option: value})


def test_questions_of_the_wrong_format(tmp_path):
    for row, message in (
        ({"text": "a"}, "question must hold one question"),
        ({"question": "q"}, "docs must be a list of documents"),
        ({"question": "q", "docs": ["a"], "pos_index": [1]}, "pos_index must hold indices of the 1 docs"),
    ):
        (tmp_path / "q.jsonl").write_text(json.dumps(row))
        with pytest.raises(ValueError, match=message):
            Items(tmp_path / "q.jsonl", question_of).count()
    (item,) = question_of({"question": "q", "docs": list("abcdef"), "pos_index": [5]}, "here", max_documents=3)
    assert item.documents == ["a", "b", "f"]


def test_prompts_can_be_changed_and_are_checked(tmp_path, capsys):
    assert main(["synthesize", "--copy-prompts", str(tmp_path / "own")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 12
    assert Prompts(tmp_path / "own").fingerprint() == Prompts().fingerprint()
    with pytest.raises(FileExistsError, match=r"answer\.yaml exists already"):
        copy_prompts(tmp_path / "own")
    file = tmp_path / "own" / "answer.yaml"
    file.write_text("user: '$$5 for $passage and $question'")
    own = Prompts(tmp_path / "own")
    assert own["answer"].fill({"passage": "$p", "question": "q"}) == [{"role": "user", "content": "$5 for $p and q"}]
    assert own.fingerprint() != Prompts().fingerprint()
    for text, message in (
        ("user: '$passage $quest'", r"no placeholder \$quest .* only \$passage, \$question"),
        ("user: 'Q: $question'", r"\$passage is missing"),
        ("user: '$passage costs $5'", r"write \$\$ for the sign itself"),
        ("user: '$passage'\nmax_token: 5", "no other"),
        ("user: '$passage'\nmax_tokens: 0", r"max_tokens \(0\) must be an integer of at least 1"),
        ("user: '$passage'\ntemperature: hot", r"temperature \('hot'\) must be a number"),
        ("user: [", "is not YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            Prompts(tmp_path / "own")
    file.rename(tmp_path / "own" / "reply.yaml")
    with pytest.raises(ValueError, match=r"reply\.yaml: there is no prompt of this name"):
        Prompts(tmp_path / "own")


def test_a_journal_of_another_run_is_refused(tmp_path, server, refused):
    path = tmp_path / "scp.journal.jsonl"
    Journal.open(path, {"task": "scp", "model": "large"}).close()
    content = path.read_bytes()
    assert "was begun with model 'large', and this run has 'tiny'" in refused()
    journal = Journal.open(path, {"task": "scp", "model": "large"})
    assert "is in use: another run writes it" in refused(code=1)
    journal.close()
    assert path.read_bytes() == content
    path.write_bytes(content + b"{}\n")
    with pytest.raises(ValueError, match="line 2: damaged"):
        Journal.open(path, {"task": "scp", "model": "large"})
    for damaged in (b"\x00\n", b'{"id": 1}\n'):
        path.write_bytes(damaged)
        assert "damaged, or not the journal of a run" in refused()
        assert path.read_bytes() == damaged
    assert server.asked == []
