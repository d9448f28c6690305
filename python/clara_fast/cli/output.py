"""What commands print: results on stdout, as text or as one JSON document; everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# Texts of users hold brackets: no markup. soft_wrap leaves lines whole, for terminals and pipes to break.
stderr = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
_SNIPPET = 160
_LONGEST_ERROR = 600


def print_json(document: Any) -> None:
    """The one JSON document of a command."""
    print(json.dumps(document, ensure_ascii=False, indent=2), flush=True)


def note(message: str) -> None:
    """A remark for the user, on stderr."""
    stderr.print(message)


def error_line(message: str) -> None:
    """``error: ...`` on one line of stderr."""
    stderr.print("error: " + snippet(message, _LONGEST_ERROR))


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """``warning: ...`` on one line of stderr; stands in for :func:`warnings.showwarning`."""
    stderr.print("warning: " + " ".join(str(message).split()))


def print_hit(rank: int, hit: Any) -> None:
    """A document that was found: rank, score, id and title, then the beginning of its text."""
    title = f"  {hit.title}" if hit.title and hit.title != hit.id else ""
    print(f"{rank:3}. {hit.score:.4f}  {hit.id}{title}{_place(hit)}")
    if text := snippet(hit.text):
        print(f"             {text}")


def _place(hit: Any) -> str:
    """Which part of its document a chunk is."""
    metadata = getattr(hit, "metadata", {})
    if not {"parent", "chunk", "chunks", "span"} <= set(metadata):
        return ""
    start, end = metadata["span"]
    return f"  (part {metadata['chunk'] + 1} of {metadata['chunks']} of {metadata['parent']}, characters {start}-{end})"


def snippet(text: str, length: int = _SNIPPET) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def seconds(timings: dict[str, float]) -> str:
    """``load 1.20 s, search 3 ms``."""
    return ", ".join(
        f"{name} {value:.2f} s" if value >= 0.1 else f"{name} {value * 1000:.1f} ms" for name, value in timings.items()
    )


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def document_progress(visible: bool = True) -> Progress:
    """:func:`item_progress` of documents."""
    return item_progress("docs", visible)


def item_progress(unit: str, visible: bool = True) -> Progress:
    """A bar on stderr: how many, how fast, how long still. Silent where stderr is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _PerSecond(unit),
        TimeRemainingColumn(),
        console=stderr,
        disable=not (visible and sys.stderr.isatty()),
    )


class _PerSecond(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self._unit}/s")
