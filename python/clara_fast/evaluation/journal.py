"""Predictions on disk, one line each, appended as they come: a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

PREDICTIONS_FILE, SETTINGS_FILE = "predictions.jsonl", "settings.json"


class Key(NamedTuple):
    """What a prediction is for."""

    model: str
    dataset: str
    method: str
    id: str


@dataclass
class Prediction:
    """One method's answer to one question, and all that its metrics are computed from.

    Attributes:
        model, dataset, method, id: see :class:`Key`.
        text: the answer.
        answers: the accepted ones.
        read: indices of the documents that were read.
        ranking: all candidates, best first; None if the method ranked none.
        positives: indices of the candidates that hold the answer.
        absent: further positives, which are not among the candidates.
        loss: summed cross-entropy (nats) of the first accepted answer's ``loss_tokens`` tokens.
        context_tokens: tokens in the prompt beyond those of the bare question; memory tokens count.
        text_tokens: the same if it held the documents that were read as text.
        seconds: of each part, this question's share of its batch.
    """

    model: str
    dataset: str
    method: str
    id: str
    text: str
    answers: list[str]
    read: list[int]
    ranking: list[int] | None
    positives: list[int]
    absent: int
    loss: float
    loss_tokens: int
    context_tokens: int
    text_tokens: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return Key(self.model, self.dataset, self.method, self.id)


class Journal:
    """Predictions of one run, in ``folder`` or in memory alone.

    Args:
        folder: made if it is not there; what an earlier run left in it is read.
        settings: whatever decides what the predictions are. Those of a folder must be the same.

    Raises:
        ValueError: the folder's run had other settings, or a line of its predictions is damaged.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.models: dict[str, Any] = {}
        self._known: dict[Key, Prediction] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._settle(folder / SETTINGS_FILE)
        self._file = folder / PREDICTIONS_FILE
        if self._file.exists():
            self._read()

    def __contains__(self, key: Key) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    def predictions(self, keys: Iterable[Key]) -> list[Prediction]:
        """Those of ``keys``, in their order."""
        return [self._known[key] for key in keys]

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Add predictions; once this returns, they survive a kill and a power cut."""
        fresh = {one.key: one for one in predictions}
        if self.folder is not None:
            lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in fresh.values())
            with self._file.open("ab") as stream:
                stream.write(lines.encode())
                stream.flush()
                os.fsync(stream.fileno())
        self._known.update(fresh)

    def claim(self, label: str, facts: dict[str, Any]) -> None:
        """Say which model ``label`` stands for.

        Raises:
            ValueError: in this folder it stands for another one.
        """
        known = self.models.setdefault(label, facts)
        if known != facts:
            raise ValueError(
                f"{self.folder} holds answers of another model called {label} ({known}, not {facts}): "
                "choose another --out, or remove that folder"
            )
        if self.folder is not None:
            self._write_settings(self.folder / SETTINGS_FILE)

    def _settle(self, file: Path) -> None:
        if not file.exists():
            self._write_settings(file)
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            known, self.models = found["settings"], found["models"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} does not hold the settings of an evaluation") from None
        wanted = json.loads(json.dumps(self.settings))
        for name in sorted({*known, *wanted}):
            if known.get(name) != wanted.get(name):
                raise ValueError(
                    f"{file.parent} holds a run with {name} {known.get(name)}, not {wanted.get(name)}: "
                    "choose another --out, or remove that folder"
                )

    def _write_settings(self, file: Path) -> None:
        temporary = file.with_suffix(".tmp")
        content = json.dumps({"settings": self.settings, "models": self.models}, indent=2, ensure_ascii=False)
        temporary.write_text(content + "\n", encoding="utf-8")
        os.replace(temporary, file)

    def _read(self) -> None:
        content = self._file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # a kill in the middle of a line
            with self._file.open("rb+") as stream:
                stream.truncate(whole)
        names = {f.name for f in fields(Prediction)}
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                one = Prediction(**{name: row[name] for name in names})
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self._file}, line {number}: is no prediction") from None
            self._known[one.key] = one
