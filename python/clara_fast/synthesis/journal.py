"""The journal of a run: every answer of the server and every finished item, on disk before it counts.

One JSON object a line: first the ``settings``, then ``answer``s and ``done`` items. Lines are appended in groups and
synced; a line that a kill has torn was never counted, and is cut off when the journal is opened again. When an item is
done, its answers are not needed any more.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from pathlib import Path
from typing import Any, Self

FORMAT = 1


class Journal:
    """Opened with :meth:`open`; one process at a time.

    Attributes:
        answers: by item and request, what the server has answered for items that are not done.
        found: how many records were there when it was opened.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.answers: dict[str, dict[str, dict[str, Any]]] = {}
        self.found = 0
        self._offsets: dict[str, int] = {}
        self._descriptor = descriptor
        self._size = 0
        self._waiting: list[tuple[bytes, dict[str, Any], asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._error: OSError | None = None

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> Self:
        """Begin a journal, or go on with the one that is there.

        Raises:
            ValueError: it was begun with other ``settings``, is no journal, or is damaged.
            OSError: it cannot be written, or another process has it open.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise type(error)(f"cannot write {path}: {error.strerror}") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(f"{path} is in use: another run writes it") from None
            journal = cls(path, descriptor)
            journal._load(settings)
        except BaseException:
            os.close(descriptor)
            raise
        return journal

    @property
    def done(self) -> int:
        """How many items are done."""
        return len(self._offsets)

    def is_done(self, item: str) -> bool:
        return item in self._offsets

    def outcome(self, item: str) -> dict[str, Any]:
        """What was made of a done ``item``; read from the disk."""
        offset = self._offsets[item]
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            outcome: dict[str, Any] = json.loads(stream.readline())["outcome"]
        return outcome

    async def append_answer(self, item: str, request: str, answer: dict[str, Any]) -> None:
        """Keep an answer; returns when it is on disk."""
        await self._append({"kind": "answer", "item": item, "request": request, "answer": answer})

    async def append_done(self, item: str, outcome: dict[str, Any]) -> None:
        """Keep what was made of ``item``; returns when it is on disk."""
        await self._append({"kind": "done", "item": item, "outcome": outcome})

    async def drain(self) -> None:
        """Wait until everything that was given to the journal is on disk."""
        while self._writer is not None and not self._writer.done():
            await asyncio.wait([self._writer])

    def close(self) -> None:
        """Let others have the journal."""
        os.close(self._descriptor)

    async def _append(self, record: dict[str, Any]) -> None:
        if self._error is not None:
            raise self._error
        written = asyncio.get_running_loop().create_future()
        self._waiting.append((_line(record), record, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_waiting())
        await written

    async def _write_waiting(self) -> None:
        """Write and sync whatever is waiting, as one group, until nothing is."""
        while self._waiting:
            group, self._waiting = self._waiting, []
            try:
                if self._error is not None:
                    raise self._error
                await asyncio.to_thread(self._write, b"".join(line for line, _, _ in group))
            except OSError as error:
                self._error = error
            for line, record, written in group:
                if self._error is None:
                    self._remember(record, self._size)
                    self._size += len(line)
                if written.cancelled():
                    continue
                if self._error is None:
                    written.set_result(None)
                else:
                    written.set_exception(self._error)

    def _write(self, lines: bytes) -> None:
        view = memoryview(lines)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fsync(self._descriptor)
        except OSError as error:
            raise type(error)(f"cannot write {self.path}: {error.strerror}") from None

    def _remember(self, record: dict[str, Any], offset: int) -> None:
        item = record["item"]
        if record["kind"] == "done":
            self._offsets[item] = offset
            self.answers.pop(item, None)
        elif item not in self._offsets:
            self.answers.setdefault(item, {})[record["request"]] = record["answer"]

    def _load(self, settings: dict[str, Any]) -> None:
        with open(self.path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):  # torn by a kill
                    break
                try:
                    record = json.loads(line)
                    if number == 1:
                        self._compare(record["settings"], settings)
                    else:
                        self._remember(record, self._size)
                except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
                    raise ValueError(f"{self.path}, line {number}: damaged, or not the journal of a run") from None
                self._size += len(line)
                self.found = number - 1
        os.ftruncate(self._descriptor, self._size)
        os.lseek(self._descriptor, self._size, os.SEEK_SET)
        if self._size == 0:
            line = _line({"kind": "settings", "settings": {"format": FORMAT, **settings}})
            self._write(line)
            self._size = len(line)

    def _compare(self, before: dict[str, Any], settings: dict[str, Any]) -> None:
        for key, now in {"format": FORMAT, **settings}.items():
            if before.get(key) != now:
                raise ValueError(
                    f"{self.path} was begun with {key} {before.get(key)!r}, and this run has {now!r}: "
                    "choose another --out, or remove the journal to begin again"
                )


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
