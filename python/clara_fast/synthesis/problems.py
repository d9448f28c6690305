"""What can go wrong with a server, and what it means."""

from __future__ import annotations

import asyncio
import email.utils
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clara_fast.synthesis.client import Endpoint

_TOO_LONG = ("context length", "context_length", "context size", "context window", "too long", "too large", "exceed")


class BadEndpoint(ValueError):
    """The address, the key or the model is wrong: no request can go well."""


class ServerGone(RuntimeError):
    """The server has stopped answering; the journal keeps what it has answered."""


class RequestFailed(RuntimeError):
    """One request failed, and so did its retries; its item stays unfinished."""


class Problem(Exception):
    """Base of what :func:`problem_of` returns."""

    fatal = False
    about_key = False


class Passing(Problem):
    """May go better next time. ``kind`` names it in counts, ``retry_after`` is what the server asks for, in seconds."""

    def __init__(self, kind: str, message: str, retry_after: float | None = None, *, unreachable: bool = False) -> None:
        super().__init__(message)
        self.kind, self.retry_after, self.unreachable = kind, retry_after, unreachable


class Refusal(Problem):
    """The server will not answer this request, however often it is asked."""

    def __init__(self, message: str, *, fatal: bool = False, about_key: bool = False) -> None:
        super().__init__(message)
        self.fatal, self.about_key = fatal, about_key

    @property
    def too_long(self) -> bool:
        """Whether it is about this request's length, and not about every request."""
        return any(sign in str(self).lower() for sign in _TOO_LONG)

    def about_model(self, model: str) -> bool:
        """Whether it speaks of the model's name."""
        return model in str(self) and "model" in str(self).lower()


def problem_of(error: Exception, endpoint: Endpoint) -> Any:
    """What an exception of the openai client means.

    Raises:
        the exception itself, where it is none of the server's doing.
    """
    import openai

    if isinstance(error, Problem):
        return error
    if isinstance(error, TimeoutError | asyncio.TimeoutError | openai.APITimeoutError):
        return Passing("timeout", f"no answer within {endpoint.timeout:g} s")
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__ or error
        root: BaseException = cause
        while isinstance(root.__cause__ or root.__context__, OSError):
            root = root.__cause__ or root.__context__  # type: ignore[assignment]
        unreachable = "connect" in type(cause).__name__.lower() or "connect" in str(cause).lower()
        return Passing("connection", str(root) or type(root).__name__, unreachable=unreachable)
    if isinstance(error, openai.APIStatusError):
        return _of_status(error, endpoint)
    # JSONDecodeError and the client's own validation errors; a body that is JSON but no completion.
    if isinstance(error, openai.APIResponseValidationError | ValueError | TypeError | AttributeError | LookupError):
        return Passing("broken", f"the answer is no chat completion ({_one_line(str(error))[:100]})")
    raise error


def _of_status(error: Any, endpoint: Endpoint) -> Problem:
    status = error.status_code
    message = f"{_said(error)} (HTTP {status})"
    if status in (401, 403):
        hint = "" if endpoint.api_key else "; no key was given: set OPENAI_API_KEY, or name a variable by --api-key-env"
        return Refusal(f"{endpoint.url} refuses the key: {message}{hint}", fatal=True, about_key=True)
    if status == 404:
        return Refusal(message, fatal=True)
    if status == 429 and "insufficient_quota" in str(error.body):
        return Refusal(f"{endpoint.url}: {message}", fatal=True, about_key=True)
    if status in (408, 409, 425, 429) or (status >= 500 and status != 501):
        return Passing(str(status), message, _retry_after(error.response.headers))
    return Refusal(message)


def _said(error: Any) -> str:
    """The server's own words, wherever it puts them."""
    body = error.body
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and key in body:
            body = body[key]
    return _one_line(str(body or error.message))[:300]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _retry_after(headers: Any) -> float | None:
    """Seconds to wait, from ``Retry-After`` (seconds or a date) or ``retry-after-ms``."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        else:
            value = headers["retry-after"]
            try:
                seconds = float(value)
            except ValueError:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (KeyError, TypeError, ValueError):
        return None
    return min(max(seconds, 0.0), 3600.0) if seconds == seconds else None
