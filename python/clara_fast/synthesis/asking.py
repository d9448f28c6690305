"""Asking for one item: from the journal what has been answered before, from the server the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from clara_fast.synthesis.client import Client, Reply, Request
from clara_fast.synthesis.journal import Journal
from clara_fast.synthesis.parsing import UnusableAnswer
from clara_fast.synthesis.prompts import SCHEMAS, Prompts

T = TypeVar("T")
# An answer that cannot be used is asked for again with another seed, so often in all.
ATTEMPTS = 3


class NoAnswer(Exception):
    """The server has answered, but never with what could be used."""


class Asker:
    """Asks all that one item needs, and counts it.

    Args:
        item: key of the item.
        models: of the writer and of the judge.
        client, journal, prompts: see there.
    """

    def __init__(self, item: str, models: tuple[str, str], client: Client, journal: Journal, prompts: Prompts) -> None:
        self._item, self._models = item, models
        self._client, self._journal, self._prompts = client, journal, prompts
        self._known = dict(journal.answers.get(item, {}))
        self._used: dict[str, Reply] = {}

    async def ask(
        self,
        name: str,
        read: Callable[[str], T],
        values: Mapping[str, str],
        *,
        sample: int = 1,
        parts: bool = False,
    ) -> T:
        """What ``read`` makes of the answer to the prompt ``name`` filled with ``values``.

        Args:
            name: the prompt.
            read: raises :class:`UnusableAnswer` for what it cannot use.
            values: for the placeholders.
            sample: number of the wanted answer, where the same is asked more than once.
            parts: whether an answer that was cut off can be used.

        Raises:
            NoAnswer: the server refused, or no attempt gave a usable answer.
        """
        reason = ""
        for attempt in range(ATTEMPTS):
            reply = await self._reply(self._request(name, values, sample, attempt))
            if reply.refused is not None:
                raise NoAnswer(f"the server refuses: {reply.refused}")
            try:
                if reply.truncated and not parts:
                    raise UnusableAnswer("cut off at max_tokens")
                if self._prompts[name].echoed(reply.content):
                    raise UnusableAnswer("repeats the prompt's example")
                return read(reply.content)
            except UnusableAnswer as error:
                reason = str(error)
        raise NoAnswer(f"no usable answer in {ATTEMPTS} attempts: {reason}")

    def spent(self) -> dict[str, int]:
        """Requests and tokens that the item took, in this run and those before."""
        replies = self._used.values()
        return {
            "requests": len(replies),
            "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
            "completion_tokens": sum(reply.completion_tokens for reply in replies),
        }

    def _request(self, name: str, values: Mapping[str, str], sample: int, attempt: int) -> Request:
        prompt = self._prompts[name]
        messages = prompt.fill(values)
        seed = hashlib.blake2b(f"{self._item} {name} {sample} {attempt}".encode(), digest_size=4).digest()
        return Request(
            name=name,
            model=self._models[name.startswith("judge")],
            messages=messages,
            schema=SCHEMAS[name],
            max_tokens=prompt.max_tokens,
            # A second attempt at temperature 0 would only say the same again.
            temperature=prompt.temperature if attempt == 0 else max(prompt.temperature, 0.5),
            seed=int.from_bytes(seed, "big") & 0x7FFFFFFF,
        )

    async def _reply(self, request: Request) -> Reply:
        key = request.key()
        if key not in self._known:

            async def keep(reply: Reply) -> None:
                answer: dict[str, Any] = {k: v for k, v in vars(reply).items() if v is not None and v is not False}
                await self._journal.append_answer(self._item, key, answer)
                self._known[key] = answer

            await self._client.send(request, keep)
        self._used[key] = Reply(**self._known[key])
        return self._used[key]
