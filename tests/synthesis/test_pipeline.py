"""The pipeline against a server that fails in every way: nothing lost, nothing unverified, nothing asked twice."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from clara_fast.data import read_multidoc, read_scp
from clara_fast.synthesis import (
    BadEndpoint,
    Endpoint,
    Items,
    Prices,
    Run,
    ScpTask,
    ServerGone,
    TeacherTask,
    passages_of,
    question_of,
)
from clara_fast.synthesis.pace import Pace
from tests.synthesis.server import PASSING, UNUSABLE, ModelServer, name_of, passage, write_passages


@pytest.fixture
def server():
    with ModelServer() as server:
        yield server


@pytest.fixture
def run(tmp_path, server):
    """Runs on so many passages; returns the report, and whatever the files beside ``out`` hold."""

    def call(passages=3, out="scp", task=None, **options):
        file = tmp_path / f"passages-{passages}.jsonl"
        write_passages(file, passages)
        endpoint = Endpoint(server.url, **{"backoff": 0.01, "timeout": 30.0, **options})
        return Run(task or ScpTask(), Items(file, passages_of), tmp_path / f"{out}.jsonl", endpoint, "tiny")()

    return call


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def content(tmp_path, out):
    return [(tmp_path / f"{out}.{kind}").read_bytes() for kind in ("jsonl", "rejected.jsonl")]


def assert_verified(server, path):
    """Every row of the file was accepted by the judge in an answer that arrived whole."""
    yes = [same for name, same, said in server.answered if name.startswith("judge") and json.loads(said)["accept"]]
    found = rows(path)
    for row in found:
        for question, answer in zip(row["question"], row["answers"]):
            assert any(json.dumps(f"Question: {question}\nAnswer: {answer}\n")[1:-1] in same for same in yes)
        if row["data_type"] == "paraphrase":
            assert any(json.dumps(f"Paraphrase:\n{row['answers'][0]}\n")[1:-1] in same for same in yes)
    return found


def test_what_comes_of_passages(run, server, tmp_path):
    report = run(2)
    found = assert_verified(server, tmp_path / "scp.jsonl")
    assert [row["id"] for row in found] == ["p0", "p0-paraphrase", "p1", "p1-paraphrase"]
    assert Counter(found[0]["kinds"]) == {"simple": 5, "complex": 2}
    assert dict(zip(found[0]["question"], found[0]["answers"]))["What is in the red box0?"] == "item0red"
    samples = read_scp(tmp_path / "scp.jsonl")
    assert [len(sample.questions) for sample in samples] == [7, 0, 7, 0]
    # The wrong answer, and two "complex" questions on one fact.
    refused = rows(tmp_path / "scp.rejected.jsonl")
    assert Counter((r["id"], r["reason"]) for r in refused) == {
        (f"p{n}", reason): count
        for n in range(2)
        for reason, count in (("judge: it is not so", 1), ("names fewer than two facts", 2))
    }
    assert report["accepted"] == {"simple": 10, "complex": 4, "paraphrase": 2}
    assert report["rounds"] == {"2": 2}
    assert report["stopped"] == {"covered": 2}
    assert report["acceptance"] == {"simple": 10 / 12, "complex": 4 / 8, "paraphrase": 1.0}
    assert report["requests"] == len(server.asked) == report["prompt_tokens"] / 100


def test_every_failure_that_passes_changes_nothing(run, server, tmp_path):
    run(3, "calm", concurrency=1)
    failed = Counter()

    def fail(body, before):
        # Every request fails up to three times, each time in another way.
        kind = PASSING[(body["seed"] + before) % len(PASSING)]
        if before < body["seed"] % 4:
            failed[kind] += 1
            return kind
        return None

    server.fail = fail
    server.asked.clear()
    report = run(3, "storm", concurrency=8, timeout=1.0)
    assert set(failed) == set(PASSING)
    assert content(tmp_path, "storm") == content(tmp_path, "calm")
    assert report["unfinished"] == 0
    assert sum(report["this_run"]["retried"].values()) >= failed.total()
    assert {"timeout", "connection", "broken", "429", "500", "503"} <= set(report["this_run"]["retried"])


def test_answers_that_cannot_be_used_are_asked_for_again(run, server, tmp_path):
    run(2, "calm")
    wrong = Counter()

    def fail(body, before):
        # By the prompt's text alone: the first attempt at each prompt fails, the second (another seed) does not.
        text = body["messages"][-1]["content"]
        wrong[text] += 1
        return UNUSABLE[len(text) % len(UNUSABLE)] if wrong[text] == 1 else None

    server.fail = fail
    report = run(2, "odd")
    assert content(tmp_path, "odd")[0] == content(tmp_path, "calm")[0]
    assert report["unfinished"] == 0


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_judge_that_never_decides_lets_nothing_through(run, server, tmp_path, kind):
    server.fail = lambda body, before: kind if "judge" in body["response_format"]["json_schema"]["name"] else None
    report = run(1, task=ScpTask(rounds=2))
    assert rows(tmp_path / "scp.jsonl") == []
    assert report["finished"] == 1
    assert all(
        "no usable answer in 3 attempts" in r["reason"] for r in rows(tmp_path / "scp.rejected.jsonl") if "answer" in r
    )


def test_a_server_that_repeats_itself_is_left_after_a_round_without_anything_new(run, server, tmp_path):
    def repeat(body, before):
        if "box" in body["messages"][-1]["content"] and "questions" in str(body["response_format"]):
            return json.dumps([{"facts": ["a", "b"], "question": "What is in the red box0?"}] * 90)
        return '{"missing": ["everything else"]}' if "missing" in str(body["response_format"]) else None

    server.fail = repeat
    report = run(1)
    assert report["rounds"] == {"2": 1}
    assert report["stopped"] == {"no new question": 1}
    assert [row["question"] for row in rows(tmp_path / "scp.jsonl")] == [["What is in the red box0?"], []]


def test_never_more_than_ten_rounds(run, server, tmp_path):
    server.fail = lambda body, before: (
        '{"missing": ["one more"]}'
        if "missing" in str(body["response_format"])
        else json.dumps([f"What is {len(server.asked)} in the red box0?"])
        if "questions" in str(body["response_format"])
        else None
    )
    report = run(1)
    assert report["rounds"] == {"10": 1}
    assert report["stopped"] == {"rounds used up": 1}
    assert Counter(name for name, _ in server.asked)["missing"] == 10
    assert len(assert_verified(server, tmp_path / "scp.jsonl")[0]["question"]) == 10
    with pytest.raises(ValueError, match=r"rounds \(11\) must be 1 to 10"):
        ScpTask(rounds=11)


def test_concurrency_is_kept_and_changes_nothing(run, server, tmp_path):
    server.delay = 0.03
    run(2, "one", concurrency=1)
    assert server.most_under_way == 1
    run(2, "five", concurrency=5)
    assert 1 < server.most_under_way <= 5
    assert content(tmp_path, "one") == content(tmp_path, "five")


def test_an_example_that_is_repeated_is_no_answer(run, server, tmp_path):
    """A judge that copies the prompt's example would accept everything."""
    copies = {
        "complex": '{"questions": [{"facts": ["first fact", "second fact"], "question": "The question?"}]}',
        "judge_simple": '{"reason": "In one short sentence.", "accept": true}',
        "paraphrase": '{"paraphrase": "the new text"}',
    }
    server.fail = lambda body, before: copies.get(name_of(body))
    report = run(1, task=ScpTask(rounds=1))
    assert report["accepted"] == {}
    assert rows(tmp_path / "scp.jsonl") == []
    rejected = rows(tmp_path / "scp.rejected.jsonl")
    assert {row["step"] for row in rejected} >= {"simple", "complex", "paraphrase"}
    assert {row["reason"] for row in rejected} == {"no usable answer in 3 attempts: repeats the prompt's example"}


def test_schemas_are_given_up_once(run, server, tmp_path):
    run(2, "with")
    server.asked.clear()
    server.fail = lambda body, before: "no schema" if "response_format" in body else None
    report = run(2, "without")
    assert content(tmp_path, "with") == content(tmp_path, "without")
    assert len(server.asked) == report["requests"] + 2  # json_schema and json_object, once each


def test_a_passage_that_is_too_long_is_rejected_alone(run, server, tmp_path):
    server.fail = lambda body, before: "too long" if "box0" in body["messages"][0]["content"] else None
    report = run(2)
    assert report["unfinished"] == 0
    assert {row["id"] for row in rows(tmp_path / "scp.jsonl")} == {"p1", "p1-paraphrase"}
    reasons = {r["reason"] for r in rows(tmp_path / "scp.rejected.jsonl") if r["id"] == "p0"}
    assert reasons == {"the server refuses: maximum context length is 4096 tokens (HTTP 400)"}


def test_429_holds_everybody_back(run, server):
    server.fail = lambda body, before: "429" if len(server.asked) == 5 else None
    run(2, concurrency=4)
    # Those under way still end; after that nobody asks for the 0.05 s that the server wants.
    pauses = [b - a for a, b in zip(server.times[4:], server.times[5:])]
    assert max(pauses[:5]) > 0.03


def test_a_passage_whose_requests_keep_failing_is_left_open_and_taken_up_again(run, server, tmp_path):
    run(3, "calm")
    server.fail = lambda body, before: "500" if "box1 " in body["messages"][0]["content"] else None
    report = run(3, retries=1, concurrency=8)
    assert (report["finished"], report["unfinished"]) == (2, 1)
    assert {row["id"].partition("-")[0] for row in rows(tmp_path / "scp.jsonl")} == {"p0", "p2"}
    server.fail = lambda body, before: None
    server.asked.clear()
    assert run(3)["unfinished"] == 0
    assert all("box1" in same for _, same in server.asked)
    assert content(tmp_path, "scp") == content(tmp_path, "calm")


@pytest.mark.parametrize(
    ("failure", "asked_in_vain", "error", "message"),
    [
        ("hangs up", 20, ServerGone, "does not answer"),
        ("no quota", 2, BadEndpoint, r"You exceeded your current quota \(HTTP 429\)"),
    ],
)
def test_a_server_that_goes_away_ends_the_run_and_what_was_accepted_is_written(
    run, server, tmp_path, failure, asked_in_vain, error, message
):
    run(4, "calm")
    gone = len(server.asked) + 60
    server.fail = lambda body, before: failure if len(server.asked) > gone else None
    with pytest.raises(error, match=message):
        run(4, retries=1, concurrency=2)
    assert len(server.asked) <= gone + asked_in_vain
    before = assert_verified(server, tmp_path / "scp.jsonl")
    assert 0 < len(before) < 8
    server.fail = lambda body, before: None
    run(4)
    assert rows(tmp_path / "scp.jsonl")[: len(before)] == before
    assert content(tmp_path, "scp") == content(tmp_path, "calm")


def test_a_server_that_is_restarted(tmp_path):
    write_passages(tmp_path / "passages.jsonl", 2)
    after: list[ModelServer] = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ModelServer())

        def restart():
            server.shutdown()
            server.server_close()
            time.sleep(0.2)  # connections are refused
            after.append(stack.enter_context(ModelServer(server.server_address[1])))

        def fail(body, before):
            if len(server.asked) < 20:
                return None
            if len(server.asked) == 20:
                threading.Thread(target=restart).start()
            return "hangs up"

        server.fail = fail
        items = Items(tmp_path / "passages.jsonl", passages_of)
        report = Run(ScpTask(), items, tmp_path / "scp.jsonl", Endpoint(server.url, backoff=0.05, timeout=1), "tiny")()
    assert report["unfinished"] == 0
    assert report["accepted"] == {"simple": 10, "complex": 4, "paraphrase": 2}
    assert after[0].answered


def test_limits_per_minute():
    async def times(count, amount):
        pace = Pace(5, window=0.2)
        found = []

        async def one():
            await pace.take(amount)
            found.append(time.monotonic())

        await asyncio.gather(*(one() for _ in range(count)))
        return found

    found = asyncio.run(times(12, 1))
    assert all(found[i + 5] - found[i] >= 0.199 for i in range(7))
    assert found[-1] - found[0] < 5
    found = asyncio.run(times(3, 9))  # more than the limit: one at a time
    assert all(b - a >= 0.199 for a, b in itertools.pairwise(found))


def test_kill_and_resume_asks_nothing_twice(tmp_path, server, run):
    """Ctrl-C, kill -9 in the middle, torn lines, and then to the end: as if nothing had been."""
    run(6, "calm")
    server.asked.clear()
    server.delay = 0.02
    out, journal = tmp_path / "killed.jsonl", tmp_path / "killed.journal.jsonl"
    command = ["synthesize", tmp_path / "passages-6.jsonl", "--endpoint", server.url, "--model", "tiny", "--out", out]
    command = [sys.executable, "-m", "tests.synthesis.killing", journal, *command, "--concurrency", "4", "--no-plots"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[:2] == ["130 True", "-9 True"], done.stderr
    assert "killed.journal.jsonl keeps every answer; the same command does the rest" in done.stderr
    assert done.stdout.splitlines()[-1] == "0 True"
    answers = [json.loads(line) for line in journal.read_text().splitlines()]
    answers = [record for record in answers if record["kind"] == "answer"]
    assert len({(record["item"], record["request"]) for record in answers}) == len(answers)  # nothing that was kept
    again = {same for same, count in server.counts().items() if count > 1}
    assert len(again) <= 2 * 4  # only what was under way when a kill came
    assert content(tmp_path, "killed") == content(tmp_path, "calm")


def test_an_output_that_is_done_asks_nothing(run, server, tmp_path):
    first = run(2)
    before = content(tmp_path, "scp")
    server.asked.clear()
    again = run(2)
    assert server.asked == []
    assert content(tmp_path, "scp") == before
    assert {**first, "this_run": 0} == {**again, "this_run": 0}
    # More passages: only the new one is asked about.
    run(3)
    assert all("box2" in same for _, same in server.asked)


def test_duplicates_and_names(server, tmp_path):
    file = tmp_path / "passages.jsonl"
    texts = [passage(0), passage(0).upper() + " ", passage(1)]
    file.write_text("".join(json.dumps({"text": text, "title": "Boxes"}) + "\n" for text in texts))
    run = Run(ScpTask(), Items(file, passages_of), tmp_path / "a.jsonl", Endpoint(server.url), "tiny")
    report = run()
    assert (report["items"], report["duplicates"]) == (2, 1)
    found = rows(tmp_path / "a.jsonl")
    assert found[0]["docs"] == [f"Boxes\n{passage(0)}"]
    names = [row["id"] for row in found]
    file.write_text("".join(json.dumps({"text": text, "title": "Boxes"}) + "\n" for text in reversed(texts[::2])))
    run()
    assert [row["id"] for row in rows(tmp_path / "a.jsonl")] == [*names[2:], *names[:2]]  # of what they say


def test_teacher_answers(server, tmp_path):
    file, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    lines = [
        {"question": f"What holds {n}?", "docs": [passage(n), passage(9)], "gold_answer": "x", "pos_index": [0]}
        for n in range(3)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    server.fail = lambda body, before: (
        '{"answer": "Perhaps."}'
        if "holds 1?" in str(body["messages"]) and body["response_format"]["json_schema"]["name"] == "teacher"
        else None
    )
    report = Run(
        TeacherTask(rounds=2), Items(file, question_of), out, Endpoint(server.url), "tiny", prices=Prices(1, 10)
    )()
    samples = read_multidoc(out)
    assert [(s.question, s.teacher_answer, s.answers) for s in samples] == [
        (f"What holds {n}?", f"It is item{n}red.", ["x"]) for n in (0, 2)
    ]
    assert samples[0].documents == [passage(0), passage(9)]
    assert samples[0].positives == [0]
    refused = rows(tmp_path / "answers.rejected.jsonl")
    assert [(r["answer"], r["round"], r["reason"]) for r in refused] == [
        ("Perhaps.", n, "judge: it agrees") for n in (1, 2)
    ]
    assert report["accepted"] == {"teacher": 2}
    assert report["cost"] == pytest.approx((report["prompt_tokens"] + 10 * report["completion_tokens"]) / 1e6)
    assert "Correct answers: x" in str(server.asked)
