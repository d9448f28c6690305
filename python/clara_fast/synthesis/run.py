"""A whole run: many items at once, the journal, and the files that come of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from clara_fast.synthesis.asking import Asker
from clara_fast.synthesis.client import Client, Endpoint
from clara_fast.synthesis.items import Item, Items
from clara_fast.synthesis.journal import Journal
from clara_fast.synthesis.problems import RequestFailed
from clara_fast.synthesis.prompts import Prompts
from clara_fast.synthesis.report import Prices, Report


class Task(Protocol):
    """What is made of each item: :class:`ScpTask` or :class:`TeacherTask`."""

    @property
    def name(self) -> str: ...
    def settings(self) -> dict[str, Any]: ...
    async def work(self, item: Item, asker: Asker) -> dict[str, Any]: ...
    def rows(self, item: Item, outcome: dict[str, Any]) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Places:
    """The files of a run, all named after its output."""

    out: Path

    def __post_init__(self) -> None:
        if self.out.suffix != ".jsonl":
            raise ValueError(f"out ({self.out}) must be a .jsonl file")

    def beside(self, kind: str) -> Path:
        """``scp.jsonl`` and ``"report.json"`` give ``scp.report.json``."""
        return self.out.with_name(f"{self.out.stem}.{kind}")

    @property
    def journal(self) -> Path:
        return self.beside("journal.jsonl")

    @property
    def rejected(self) -> Path:
        return self.beside("rejected.jsonl")

    @property
    def report(self) -> Path:
        return self.beside("report.json")


@dataclass
class Run:
    """Work on all ``items`` and write what was accepted; begun again, it goes on where it stopped.

    The output depends on the items, the prompts and the server's answers only: not on ``endpoint.concurrency``, nor on
    how often the run was killed.

    Attributes:
        task: what to make of each item.
        items: what to work on.
        out: file for the accepted rows; journal, rejects and report go beside it.
        endpoint: the server.
        model: who writes.
        judge: who judges; default: the same.
        prompts: ours, or a folder's.
        prices: for the report.
    """

    task: Task
    items: Items
    out: Path
    endpoint: Endpoint
    model: str
    judge: str | None = None
    prompts: Prompts = field(default_factory=Prompts)
    prices: Prices = field(default_factory=Prices)

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise ValueError("model must name a model of the server")
        self.places = Places(Path(self.out))

    def __call__(self, progress: Callable[[str, int], None] = lambda what, count: None) -> dict[str, Any]:
        """Run to the end.

        Args:
            progress: called with ``"items"`` and how many there are, ``"done"`` and how many were finished now, and
                ``"accepted"`` and how many rows' worth was accepted.

        Returns:
            the report, as it is written to ``OUT.report.json``.

        Raises:
            ValueError: bad input; an endpoint, key or model that is wrong.
            ServerGone: the server has stopped answering. What was accepted before is written.
            OSError: a file cannot be read or written.
        """
        return asyncio.run(self._run(progress))

    async def _run(self, progress: Callable[[str, int], None]) -> dict[str, Any]:
        total, duplicates = self.items.count()
        progress("items", total)
        if self.places.out.exists() and not self.places.journal.exists():
            raise FileExistsError(f"{self.out} exists, and no journal beside it: choose another --out, or remove it")
        async with Client(self.endpoint) as client:
            begun = self.places.journal.exists()
            await client.check()
            journal = Journal.open(self.places.journal, self._settings())
            trouble: list[str] = []
            try:
                await self._work(client, journal, progress, trouble)
            finally:
                await journal.drain()
                if begun or client.sent:
                    report = self._write(journal, duplicates, client, trouble)
                else:  # nothing came of it: as if it had never begun
                    self.places.journal.unlink()
                journal.close()
            return report

    def _settings(self) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "model": self.model,
            "judge": self.judge or self.model,
            "prompts": self.prompts.fingerprint(),
            **self.task.settings(),
        }

    async def _work(
        self, client: Client, journal: Journal, progress: Callable[[str, int], None], trouble: list[str]
    ) -> None:
        """Let ``concurrency`` workers take items until there are none; the first fatal problem stops all."""
        waiting = iter(self.items)

        async def worker() -> None:
            for item in waiting:
                if journal.is_done(item.key):
                    progress("done", 1)
                    continue
                asker = Asker(item.key, (self.model, self.judge or self.model), client, journal, self.prompts)
                try:
                    outcome = await self.task.work(item, asker)
                except RequestFailed as error:  # the item stays open
                    trouble.append(f"{item.id}: {error}")
                    continue
                await journal.append_done(item.key, {**outcome, **asker.spent()})
                progress("done", 1)
                progress("accepted", len(outcome.get("pairs", [])) or len(self.task.rows(item, outcome)))

        workers = [asyncio.create_task(worker()) for _ in range(self.endpoint.concurrency)]
        try:
            finished, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        for task in finished:
            task.result()

    def _write(self, journal: Journal, duplicates: int, client: Client, trouble: list[str]) -> dict[str, Any]:
        """Output, rejects and report, each whole, from what the journal holds."""
        report = Report(self.task.name, duplicates, self.prices)
        with contextlib.ExitStack() as files:
            accepted = files.enter_context(replacing(self.places.out))
            rejected = files.enter_context(replacing(self.places.rejected))
            for item in self.items:
                outcome = journal.outcome(item.key) if journal.is_done(item.key) else None
                report.add(item, outcome)
                if outcome is not None:
                    accepted.writelines(_lines(self.task.rows(item, outcome)))
                    rejected.writelines(_lines({"id": item.id, **record} for record in outcome["rejected"]))
        result = report.result()
        result["this_run"] = {"requests": client.sent, "retried": dict(client.trouble), "unfinished": trouble[:20]}
        with replacing(self.places.report) as file:
            file.write(json.dumps(result, ensure_ascii=False, indent=2).encode() + b"\n")
        return result


def _lines(rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    for row in rows:
        yield json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A file that takes the place of ``path`` when it is whole and on disk; else ``path`` stays as it is."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
