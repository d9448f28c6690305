"""Rate limits: how much may be sent in any minute."""

from __future__ import annotations

import asyncio
import time
from collections import deque

MINUTE = 60.0


class Pace:
    """At most ``per_minute`` units in any ``window``; callers wait in the order in which they came.

    Args:
        per_minute: the limit; None: none.
        window: seconds that the limit is for.
    """

    def __init__(self, per_minute: float | None, window: float = MINUTE) -> None:
        if per_minute is not None and per_minute <= 0:
            raise ValueError(f"a limit per minute ({per_minute}) must be above 0")
        self._limit = per_minute
        self._window = window
        self._spent: deque[list[float]] = deque()  # [when, how much]
        self._turn = asyncio.Lock()

    async def take(self, amount: float) -> list[float]:
        """Wait until ``amount`` fits in; more than the limit itself goes alone. Returns the entry for ``settle``."""
        if self._limit is None:
            return [0.0, amount]
        async with self._turn:
            while (wait := self._seconds_until(min(amount, self._limit))) > 0:
                await asyncio.sleep(wait)
            entry = [time.monotonic(), amount]
            self._spent.append(entry)
            return entry

    @staticmethod
    def settle(entry: list[float], amount: float) -> None:
        """Put what was really spent in the place of an estimate."""
        entry[1] = amount

    def _seconds_until(self, amount: float) -> float:
        now = time.monotonic()
        while self._spent and self._spent[0][0] <= now - self._window:
            self._spent.popleft()
        total = sum(spent for _, spent in self._spent)
        assert self._limit is not None
        for when, spent in self._spent:
            if total + amount <= self._limit:
                return 0.0
            total -= spent
            if total + amount <= self._limit:
                return when + self._window - now
        return 0.0
