"""One request to an OpenAI-compatible server, asked until it is answered.

What passes (no connection, timeouts, 429, 5xx, broken answers) is asked again, later and later. What a server cannot do
(schemas, some parameters) is found out once and then left out. What cannot get better by waiting ends the run.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from clara_fast.synthesis.dialect import Dialect
from clara_fast.synthesis.pace import Pace
from clara_fast.synthesis.problems import BadEndpoint, Passing, RequestFailed, ServerGone, problem_of

LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Request:
    """What to ask: ``schema`` is that of the JSON to answer with, ``name`` the prompt's."""

    name: str
    model: str
    messages: list[dict[str, str]]
    schema: dict[str, Any]
    max_tokens: int
    temperature: float
    seed: int

    def key(self) -> str:
        """Names the request in the journal."""
        return hashlib.blake2b(json.dumps(vars(self), sort_keys=True).encode(), digest_size=12).hexdigest()

    def tokens(self) -> float:
        """An estimate before it is known: four characters a token, and half of the room for the answer."""
        return sum(len(message["content"]) for message in self.messages) / 4 + self.max_tokens / 2


@dataclass(frozen=True)
class Reply:
    """What was answered; ``refused`` is the server's reason where it would not answer this request at all."""

    content: str
    truncated: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: str | None = None


@dataclass
class Endpoint:
    """How to reach the server, and how hard to try.

    Attributes:
        url: its base; ``/v1`` is put behind a bare host.
        api_key: sent as the bearer token; local servers take any.
        concurrency: requests under way at once.
        retries: how often a request that failed in passing is asked again.
        backoff: seconds before the first retry; doubled for each further one, up to a minute.
        timeout: seconds that one answer may take.
        requests_per_minute, tokens_per_minute: limits to keep to; None: none.
        structure: how JSON is asked for: ``auto``, ``json_schema``, ``json_object`` or ``off``.
        extra: further fields of each request's body.
    """

    url: str
    api_key: str | None = None
    concurrency: int = 16
    retries: int = 8
    backoff: float = 1.0
    timeout: float = 120.0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    structure: str = "auto"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from urllib.parse import urlsplit

        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"endpoint ({self.url}) must be a URL such as http://localhost:8000/v1")
        if parts.path in ("", "/"):
            self.url = self.url.rstrip("/") + "/v1"
        for name, least in (("concurrency", 1), ("retries", 0), ("backoff", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}")
        if self.timeout <= 0:
            raise ValueError(f"timeout ({self.timeout}) must be above 0")


class Client:
    """Sends requests to an endpoint. An asynchronous context: ``async with Client(endpoint) as client``.

    Attributes:
        trouble: how often what went wrong in passing, by kind.
        sent: requests answered in this run.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        try:
            from openai import AsyncOpenAI
        except ImportError:
            raise ImportError("synthesis needs the openai client: pip install 'clara-fast[synthesis]'") from None
        self.endpoint = endpoint
        self.trouble: Counter[str] = Counter()
        self.sent = 0
        self._openai = AsyncOpenAI(
            base_url=endpoint.url, api_key=endpoint.api_key or "none", timeout=endpoint.timeout, max_retries=0
        )
        self._dialect = Dialect.of(endpoint.structure)
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._alone = asyncio.Lock()
        self._requests, self._tokens = Pace(endpoint.requests_per_minute), Pace(endpoint.tokens_per_minute)
        self._resume_at = 0.0  # after a 429, nobody asks before
        self._failed_in_a_row = 0
        self._proven = False  # whether any request has gone well
        self._fatal: BadEndpoint | ServerGone | None = None  # why none will go well any more
        self._jitter = random.Random()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._openai.close()

    async def check(self) -> None:
        """Find out that the server is there, before any work.

        Raises:
            BadEndpoint: nobody answers, or the key is refused. A server that cannot list its models passes.
        """
        try:
            await self._models()
        except Exception as error:
            problem = problem_of(error, self.endpoint)
            if isinstance(problem, Passing) and (problem.unreachable or problem.kind == "timeout"):
                raise BadEndpoint(f"cannot reach {self.endpoint.url}: {problem}") from None
            if problem.about_key:
                raise BadEndpoint(str(problem)) from None

    async def send(self, request: Request, keep: Callable[[Reply], Awaitable[None]]) -> None:
        """Ask the server, and give its answer to ``keep``.

        The slot is free again when ``keep`` has ended: a kill loses no more answers than ``concurrency``.

        Raises:
            RequestFailed: it failed in passing, and so did all retries; others may go better.
            ServerGone: nothing is answered any more.
            BadEndpoint: the model, the key or the address is wrong.
        """
        async with self._turn():
            try:
                reply = await self._persist(request)
            except (BadEndpoint, ServerGone) as error:
                self._fatal = error
                raise
            self._failed_in_a_row = 0
            self.sent += 1
            await keep(reply)

    @asynccontextmanager
    async def _turn(self) -> Any:
        """A free slot. Until a first request has been answered they go one by one: what is wrong is told once."""
        if not self._proven:
            async with self._alone:
                if not self._proven:
                    yield
                    return
        async with self._slots:
            yield

    async def _persist(self, request: Request) -> Reply:
        failures = 0
        while True:
            await self._wait_for_pause()
            if self._fatal is not None:
                raise self._fatal
            await self._requests.take(1)
            spent = await self._tokens.take(request.tokens())
            try:
                reply = await self._in_a_dialect(request)
                self._tokens.settle(spent, reply.prompt_tokens + reply.completion_tokens)
                return reply
            except Passing as problem:
                self.trouble[problem.kind] += 1
                failures += 1
                if failures > self.endpoint.retries:
                    raise self._given_up(problem, failures) from None
                pause = min(LONGEST_PAUSE, self.endpoint.backoff * 2 ** (failures - 1)) * self._jitter.uniform(0.5, 1)
                if problem.retry_after is not None:
                    pause = max(pause, problem.retry_after)
                    if problem.kind == "429":
                        self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + problem.retry_after)
                await asyncio.sleep(pause)

    async def _wait_for_pause(self) -> None:
        clock = asyncio.get_running_loop().time
        while (wait := self._resume_at - clock()) > 0:
            await asyncio.sleep(wait)

    def _given_up(self, problem: Passing, failures: int) -> RequestFailed | ServerGone:
        self._failed_in_a_row += 1
        if not self._proven or self._failed_in_a_row > 2 * self.endpoint.concurrency:
            return ServerGone(f"{self.endpoint.url} does not answer: {problem}, after {failures} attempts")
        return RequestFailed(f"{problem}, after {failures} attempts")

    async def _in_a_dialect(self, request: Request) -> Reply:
        """Ask, and find out what the server does not take."""
        dialect = self._dialect
        first_refusal = None
        while True:
            try:
                reply = await self._once(request, dialect)
            except Passing:
                raise
            except Exception as error:
                refusal = problem_of(error, self.endpoint)
                if refusal.fatal:
                    raise await self._explained(refusal, request) from None
                if isinstance(refusal, Passing):
                    raise refusal from None
                first_refusal = first_refusal or refusal
                weaker = dialect.without(str(refusal), guess=not self._proven)
                if weaker is not None:
                    dialect = weaker
                    continue
                if not first_refusal.too_long and (not self._proven or first_refusal.about_model(request.model)):
                    raise await self._explained(first_refusal, request) from None
                return Reply("", refused=str(first_refusal))
            if dialect is not self._dialect:
                self._dialect = dialect
            self._proven = True
            return reply

    async def _once(self, request: Request, dialect: Dialect) -> Reply:
        answer = await asyncio.wait_for(
            self._openai.chat.completions.create(
                model=request.model,
                messages=request.messages,  # type: ignore[arg-type]
                extra_body=self.endpoint.extra or None,
                **dialect.arguments(request),
            ),
            self.endpoint.timeout,
        )
        choices = getattr(answer, "choices", None)
        if not choices:
            raise Passing("broken", "the answer holds no choices")
        content = getattr(getattr(choices[0], "message", None), "content", None)
        if not isinstance(content, str | None):
            raise Passing("broken", "the answer's content is no text")
        usage = getattr(answer, "usage", None)
        return Reply(
            # Half of a surrogate pair cannot be written to a file.
            (content or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
            truncated=choices[0].finish_reason == "length",
            prompt_tokens=_count(usage, "prompt_tokens"),
            completion_tokens=_count(usage, "completion_tokens"),
        )

    async def _models(self) -> list[str]:
        page = await asyncio.wait_for(self._openai.models.list(), min(30.0, self.endpoint.timeout))
        return [str(model.id) for model in getattr(page, "data", None) or [] if hasattr(model, "id")]

    async def _explained(self, refusal: Any, request: Request) -> BadEndpoint:
        """The refusal, and the models that the server has if that may be the cause."""
        message = f"{self.endpoint.url} refuses model {request.model!r}: {refusal}"
        if refusal.about_key:
            return BadEndpoint(str(refusal))
        try:
            models = await self._models()
        except Exception:
            models = []
        if models and request.model not in models:
            message += f". Its models: {', '.join(models[:20])}{', ...' if len(models) > 20 else ''}"
        return BadEndpoint(message)


def _count(usage: Any, name: str) -> int:
    value = getattr(usage, name, None)
    return value if isinstance(value, int) else 0


async def together(*work: Any) -> list[Any]:
    """The results of ``work``, in its order. Where one fails the others still end, and keep their answers."""
    results = await asyncio.gather(*work, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:  # what ends the run goes before what leaves one item open
        raise next((error for error in errors if not isinstance(error, RequestFailed)), errors[0])
    return results
