"""Where the candidates of joint training lie: in the data's own documents, or in a store."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clara_fast.data.questions import QuestionSample
from clara_fast.store import MemoryStore
from clara_fast.store.documents import document_text


@dataclass
class JointSample:
    """A question with its candidates: texts to compress, or rows of a store.

    Attributes:
        sample: the question and its answers.
        candidates: of one question distinct; empty where the store is searched.
        positives: those of the candidates (or of the store's rows) that hold the answer.
    """

    sample: QuestionSample
    candidates: list[Any]
    positives: list[Any] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Of the sample, for messages."""
        return self.sample.id


def own_candidates(samples: Iterable[QuestionSample], count: int, *, keep_positives: bool) -> list[JointSample]:
    """Each question with ``count`` of its own documents, as text (see :meth:`QuestionSample.chosen`).

    Raises:
        ValueError: a question has no documents.
    """
    found = []
    for sample in samples:
        if not sample.documents:
            raise ValueError(f"sample {sample.id} has no candidate documents")
        chosen = [sample.documents[i] for i in sample.chosen(count, keep_positives=keep_positives)]
        found.append(_distinct(sample, chosen, [sample.documents[i] for i in sample.positives]))
    return found


class StoreCandidates:
    """Finds documents in a store by what the compressor read of them, title and text, by id, or by search.

    A text that the store holds several times is one candidate: its first row stands for all.

    Args:
        store: written by the model that is trained.
    """

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self._row_of: dict[bytes, int] = {}  # the first row of each text
        first = [self._row_of.setdefault(_digest(document_text(d.title, d.text)), d.row) for d in store]
        self._first = torch.tensor(first)  # of each row, [N]

    @property
    def num_texts(self) -> int:
        """Different texts in the store."""
        return len(self._row_of)

    def search(self, queries: Tensor, count: int) -> Tensor:
        """Rows ``[B, count]`` of the nearest different texts, best first.

        Args:
            queries: ``[B, m, D]``.
            count: at most :attr:`num_texts`.
        """
        size = len(self.store)
        depth = count
        while True:
            # Copies of a text crowd out others: look deeper until every question has enough.
            rows = self._first[self.store.topk(queries, depth)[1].cpu()]
            distinct = [list(dict.fromkeys(found))[:count] for found in rows.tolist()]
            if min(map(len, distinct)) == count:
                return torch.tensor(distinct)
            depth = min(2 * depth, size)

    def rows_of(self, sample: QuestionSample, indices: Sequence[int]) -> list[int]:
        """Rows of some of the sample's documents.

        Raises:
            ValueError: the store does not hold one of them.
        """
        rows = [self._row_of.get(_digest(sample.documents[i])) for i in indices]
        for i, row in zip(indices, rows, strict=True):
            if row is None:
                raise ValueError(
                    f"sample {sample.id}: docs[{i}] ({sample.documents[i][:60]!r}) is not in the store "
                    f"{self.store.path}: add it (clara-fast compress FILE --text-field docs)"
                )
        return [row for row in rows if row is not None]

    def positives_of(self, sample: QuestionSample) -> list[int]:
        """Rows that hold the answer, as far as they are known: by ``gold_ids``, or by the marked documents."""
        foreign = [name for name in sample.gold_ids if name not in self.store.ids]
        if foreign:
            raise ValueError(
                f"sample {sample.id}: gold_ids names {foreign[0]!r}, which the store {self.store.path} does not hold"
            )
        if sample.gold_ids:
            rows = self._first[[self.store.ids[name] for name in sample.gold_ids]]
            return list(dict.fromkeys(rows.tolist()))
        return self.rows_of(sample, sample.positives)

    def given(self, samples: Iterable[QuestionSample], count: int, *, keep_positives: bool) -> list[JointSample]:
        """Each question with rows of ``count`` of its own documents.

        Raises:
            ValueError: a question has no documents, or the store does not hold one.
        """
        found = []
        for sample in samples:
            if not sample.documents:
                raise ValueError(f"sample {sample.id} has no candidate documents")
            rows = self.rows_of(sample, sample.chosen(count, keep_positives=keep_positives))
            found.append(_distinct(sample, rows, self.positives_of(sample)))
        return found

    def searched(self, samples: Iterable[QuestionSample]) -> list[JointSample]:
        """Each question with its positives only: the candidates come from a search."""
        return [JointSample(sample, [], self.positives_of(sample)) for sample in samples]


def with_positives(found: list[int], positives: Sequence[int]) -> list[int]:
    """As many candidates as were found, with the positives that are missing in the place of the last."""
    missing = [row for row in positives if row not in found][: len(found)]
    # Positives that were found must not be the ones to give way.
    kept = [row for row in found if row in positives] + [row for row in found if row not in positives]
    kept = kept[: len(found) - len(missing)]
    return [*(row for row in found if row in kept), *missing]


def index_candidates(groups: Sequence[Sequence[Hashable]]) -> tuple[list[Any], Tensor]:
    """The distinct members of all groups, and where each group's are among them: ``[B, N]`` int64, -1 behind."""
    place: dict[Hashable, int] = {}
    for group in groups:
        for member in group:
            place.setdefault(member, len(place))
    indices = torch.full((len(groups), max(map(len, groups))), -1, dtype=torch.int64)
    for row, group in zip(indices, groups, strict=True):
        row[: len(group)] = torch.tensor([place[member] for member in group])
    return list(place), indices


def _distinct(sample: QuestionSample, candidates: Iterable[Any], positives: Iterable[Any]) -> JointSample:
    # The same text twice would be selected twice.
    return JointSample(sample, list(dict.fromkeys(candidates)), list(dict.fromkeys(positives)))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
