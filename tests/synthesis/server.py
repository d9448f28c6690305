"""A server of OpenAI's protocol that does what a test tells it: answers, or fails in a chosen way.

Its model knows passages of sentences "The COLOUR NAME holds VALUE." and answers everything asked of them sensibly: in
the first round half of the facts, then the rest; one answer is wrong each time, and its judge says so.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FACT = re.compile(r"The (\w+ \w+) holds (\w+)\.")
COLOURS = ("red", "white", "green", "grey", "blue", "black")


def passage(number: int) -> str:
    return " ".join(f"The {colour} box{number} holds item{number}{colour}." for colour in COLOURS)


def write_passages(path, count: int) -> None:
    path.write_text("".join(json.dumps({"id": f"p{n}", "text": passage(n)}) + "\n" for n in range(count)))


class ModelServer(ThreadingHTTPServer):
    """``with ModelServer() as server``: listens on ``server.url`` from then on.

    Attributes:
        fail: called with the body and how often the same was asked before; returns an action of :data:`FAILURES`,
            a text to answer with, or None to answer sensibly.
        asked: every completion that was asked for, as (prompt's name, what identifies it).
        answered: those that got a whole and sensible answer, with it.
        delay: seconds before each answer.
    """

    daemon_threads = True
    allow_reuse_address = True
    models = ("tiny", "large")

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.fail: Callable[[dict[str, Any], int], str | None] = lambda body, before: None
        self.asked: list[tuple[str, str]] = []
        self.answered: list[tuple[str, str, str]] = []
        self.under_way = self.most_under_way = 0
        self.times: list[float] = []
        self.delay = 0.0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> ModelServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no news."""

    def counts(self) -> Counter:
        return Counter(identity for _, identity in self.asked)


def identity(body: dict[str, Any]) -> str:
    return json.dumps([body["model"], body["messages"], body.get("seed"), body.get("temperature")])


def name_of(body: dict[str, Any]) -> str:
    """Which prompt it is, by the schema's name, or by the words of the task."""
    if body.get("response_format", {}).get("type") == "json_schema":
        return body["response_format"]["json_schema"]["name"]
    text = body["messages"][-1]["content"]
    again = "_again" if "have been asked already" in text else ""
    if "Facts that the answer" in text:
        return "judge_complex"
    if '"accept"' in text:
        return "judge_paraphrase" if "\nParaphrase:" in text else "judge_simple"
    if '"answer"' in text:
        return "answer"
    if '"missing"' in text:
        return "missing"
    if '"paraphrase"' in text:
        return "paraphrase"
    return ("complex" if "putting together" in text else "simple") + again


def sensible(body: dict[str, Any]) -> dict[str, Any]:
    """What the model answers."""
    text, name = body["messages"][-1]["content"], name_of(body)
    own = text.partition("\n\n")[0]
    facts = FACT.findall(own)
    if name.startswith(("simple", "complex")):
        wanted = FACT.findall(text.partition("not been asked for yet:")[2]) or facts[: len(facts) // 2]
        if name.startswith("simple"):
            return {"questions": [{"facts": [_fact(f)], "question": f"What is in the {f[0]}?"} for f in wanted]}
        first, last = facts[0], wanted[-1]
        return {
            "questions": [
                {"facts": [_fact(first), _fact(last)], "question": f"What are in the {first[0]} and the {last[0]}?"},
                {"facts": [_fact(first)], "question": f"Only one fact for the {last[0]}?"},
            ]
        }
    if name == "answer":
        question = re.search(r"Question: (.*)", text).group(1)
        values = [value for box, value in facts if box in question]
        return {"answer": "wrong" if "white" in question else " and ".join(values)}
    if name in ("judge_simple", "judge_complex"):
        right = "\nAnswer: wrong" not in text
        return {"reason": "it is so" if right else "it is not so", "accept": right}
    if name == "missing":
        pairs = text.partition("answers so far:")[2]
        return {"missing": [_fact(f) for f in facts if f[1] not in pairs and "white" not in f[0]]}
    if name == "paraphrase":
        return {"paraphrase": " ".join(f"{value} is what the {box} has." for box, value in reversed(facts))}
    if name == "judge_paraphrase":
        return {"reason": "the same", "accept": True}
    if name == "teacher":
        return {"answer": f"It is {facts[0][1]}."}
    return {"reason": "it agrees", "accept": "Answer: It is" in text}


def _fact(fact: tuple[str, str]) -> str:
    return f"The {fact[0]} holds {fact[1]}."


def completion(content: str | None, finish: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "tiny",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        models = [{"id": name, "object": "model", "created": 1, "owned_by": "us"} for name in self.server.models]
        self.send(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        same, name = identity(body), name_of(body)
        server = self.server
        with server.lock:
            before = server.counts()[same]
            server.asked.append((name, same))
            server.times.append(time.monotonic())
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            action = server.fail(body, before)
            if action in FAILURES:
                FAILURES[action](self)
                return
            content = action if action is not None else json.dumps(sensible(body))
            time.sleep(server.delay)
            self.send(200, completion(content))
            with server.lock:
                server.answered.append((name, same, content))
        finally:
            with server.lock:
                server.under_way -= 1

    def send(self, status: int, body: Any, *, content_type: str = "application/json", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": content_type, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def error(self, status: int, message: str, **headers: str) -> None:
        self.send(status, {"error": {"message": message, "type": "error", "code": status}}, **headers)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def drop_in_the_middle(self) -> None:
        data = json.dumps(completion('{"accept": true}')).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.hang_up()

    def stall(self) -> None:
        time.sleep(1.5)
        self.hang_up()


# Every way to fail, by name. The first eleven are failures in passing, the others are answers that cannot be used.
FAILURES: dict[str, Callable[[_Handler], None]] = {
    "hangs up": _Handler.hang_up,
    "drops": _Handler.drop_in_the_middle,
    "stalls": _Handler.stall,
    "broken body": lambda h: h.send(200, b'{"choices": [{"message": {"content": "{'),
    "wrong type": lambda h: h.send(200, b"<html>busy</html>", content_type="text/html"),
    "no choices": lambda h: h.send(200, {**completion(""), "choices": []}),
    "error in 200": lambda h: h.send(200, {"error": {"message": "overloaded"}}),
    "not a completion": lambda h: h.send(200, [1, 2]),
    "429": lambda h: h.error(429, "slow down", Retry_After="0.05"),
    "500": lambda h: h.error(500, "oh"),
    "503": lambda h: h.send(503, b"", content_type="text/plain"),
    "null": lambda h: h.send(200, completion(None)),
    "cut off": lambda h: h.send(200, completion('{"accept": true, "answer": "x", "paraphrase": "y"}', "length")),
    "broken JSON": lambda h: h.send(200, completion('{"accept": true, "answer": "it", "questions: [')),
    "prose": lambda h: h.send(200, completion("I would accept that. The answer is: red.")),
    "both ways": lambda h: h.send(
        200, completion('{"accept": true, "answer": "1"} or rather {"accept": false, "answer": "2"}')
    ),
    "too long": lambda h: h.error(400, "maximum context length is 4096 tokens"),
    "no schema": lambda h: h.error(400, "response_format is not supported"),
    "no model": lambda h: h.error(404, "The model `none` does not exist."),
    "no key": lambda h: h.error(401, "Incorrect API key provided"),
    "no good": lambda h: h.error(400, "I do not like it"),
    "no quota": lambda h: h.send(
        429,
        {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}},
        Retry_After="60",
    ),
}
PASSING = tuple(FAILURES)[:11]
UNUSABLE = tuple(FAILURES)[11:16]
