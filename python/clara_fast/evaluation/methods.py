"""The methods that are compared: who chooses the documents, and in which form the generator gets them.

A method is a retriever and a context. Adding one is a line in :data:`METHODS` and, for a new kind, a class with
:meth:`Retriever.rank` or :meth:`Context.fill`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from clara_fast.evaluation.encoding import Bill, Encoder, now
from clara_fast.evaluation.hard_compression import Shortener, llmlingua2, rarest_tokens
from clara_fast.evaluation.protocol import EvalProtocol, EvalSample
from clara_fast.evaluation.retrievers import Bm25, Dense, MemoryRetriever, Retriever
from clara_fast.modeling.prompts import Turn
from clara_fast.modeling.roles import NO_ROLE

if TYPE_CHECKING:
    from clara_fast.modeling import Clara


@dataclass
class Asked:
    """A question, the indices of the documents that are read, and the question whose memories ``other`` gets."""

    sample: EvalSample
    read: list[int]
    other: EvalSample | None = None

    @property
    def texts(self) -> list[str]:
        """The documents that are read."""
        return [self.sample.documents[i] for i in self.read]


@dataclass
class Reading:
    """What the generator gets for one question.

    Attributes:
        turn: the prompt, with slots for ``memory``.
        memory: ``[k, m, D]``; none (k = 0) where the prompt holds text alone.
        role: who answers: the generator, or the base model without adapters.
        read: indices of the documents that were read.
        ranking: all candidates, best first, if the method ranked them.
    """

    turn: Turn
    memory: Tensor
    role: str
    read: list[int]
    ranking: list[int] | None = None


class Context(Protocol):
    """Turns documents into a prompt and what fills its slots."""

    role: str

    def fill(self, batch: Sequence[Asked], bill: Bill) -> list[tuple[Turn, Tensor]]:
        """A prompt and memories ``[k, m, D]`` for every question; what it took goes on the ``bill``."""
        ...


@dataclass
class Tools:
    """What methods are made from: the model, its memories, and what the command was told.

    Attributes:
        model: the model that is evaluated.
        samples: everything that is asked, for methods that need statistics or another question's documents.
        encoder: the model's memories of the batch at hand.
        retriever_model: another model that ranks in the place of this one, for ``infonce``.
        dense_model: name or folder of the sentence encoder of ``dense``.
        llmlingua_model, llmlingua_rate: classifier and rate of ``llmlingua2``.
    """

    model: Clara
    samples: Sequence[EvalSample]
    encoder: Encoder
    retriever_model: Clara | None = None
    dense_model: str | None = None
    llmlingua_model: str | None = None
    llmlingua_rate: float | None = None


@dataclass
class Method:
    """A retriever (None: which documents these are makes no difference, only how many) and a context."""

    name: str
    retriever: Retriever | None
    context: Context

    def read(
        self, batch: Sequence[tuple[EvalSample, EvalSample | None]], rules: EvalProtocol, top_k: int, bill: Bill
    ) -> list[Reading]:
        """What the generator gets for each question of a batch (each with the question that stands in for it)."""
        given = [rules.unranked(sample, top_k) for sample, _ in batch]
        rankings: list[list[int] | None] = [None] * len(batch)
        if self.retriever is not None and any(read is None for read in given):
            rankings = [*self.retriever.rank([sample for sample, _ in batch], bill)]
        asked = []
        for (sample, other), read, ranking in zip(batch, given, rankings, strict=True):
            order = ranking if ranking is not None else list(range(len(sample.documents)))
            chosen = read if read is not None else order[:top_k]
            asked.append(Asked(sample, chosen, other))
        filled = self.context.fill(asked, bill)
        return [
            Reading(turn, memory, self.context.role, one.read, ranking)
            for one, (turn, memory), ranking in zip(asked, filled, rankings, strict=True)
        ]


class MemoryContext:
    """Each document's memory, in the order of the ranking."""

    role = "generator"

    def __init__(self, tools: Tools) -> None:
        self.model, self.encoder = tools.model, tools.encoder

    def fill(self, batch: Sequence[Asked], bill: Bill) -> list[tuple[Turn, Tensor]]:
        texts = [self.texts(asked) for asked in batch]
        memory = self.encoder.documents([text for group in texts for text in group], bill)
        parts = memory.split([len(group) for group in texts])
        return [(self._turn(asked, len(part)), part) for asked, part in zip(batch, parts, strict=True)]

    def texts(self, asked: Asked) -> list[str]:
        """Whose memories are read."""
        return asked.texts

    def _turn(self, asked: Asked, count: int) -> Turn:
        return self.model.prompts.answer(self.model.text.defuse(asked.sample.question), count)


class OtherMemory(MemoryContext):
    """As many memories of another question's documents, its positives first: a control."""

    def texts(self, asked: Asked) -> list[str]:
        other = asked.other
        assert other is not None, "the harness gives every question another one"
        order = [*other.positives, *(i for i in range(len(other.documents)) if i not in other.positives)]
        return [other.documents[order[i % len(order)]] for i in range(len(asked.read))]


class TextContext:
    """Documents as text, as far as the compressor would read them, shortened or not; the base model answers."""

    def __init__(self, tools: Tools, shorten: Shortener | None = None) -> None:
        self.model, self.shorten = tools.model, shorten
        self.role = NO_ROLE

    def fill(self, batch: Sequence[Asked], bill: Bill) -> list[tuple[Turn, Tensor]]:
        started = now(self.model.device)
        text, prompts = self.model.text, self.model.prompts
        turns = []
        for asked in batch:
            documents = [text.readable(document) for document in asked.texts]
            if self.shorten is not None:
                documents = [self.shorten(document) for document in documents]
            turns.append(
                prompts.answer_from_text(text.defuse(asked.sample.question), [text.defuse(d) for d in documents])
            )
        if self.shorten is not None:
            bill.add("compress", now(self.model.device) - started)
        return [(turn, nothing(self.model)) for turn in turns]


class NoContext:
    """The question alone; the generator answers."""

    role = "generator"

    def __init__(self, tools: Tools) -> None:
        self.model = tools.model

    def fill(self, batch: Sequence[Asked], bill: Bill) -> list[tuple[Turn, Tensor]]:
        ask, defuse = self.model.prompts.answer_from_text, self.model.text.defuse
        return [(ask(defuse(asked.sample.question), []), nothing(self.model)) for asked in batch]


def nothing(model: Clara) -> Tensor:
    """No memory, ``[0, m, D]``."""
    return torch.empty(0, model.config.num_memory, model.config.hidden_size, dtype=model.dtype, device=model.device)


@dataclass(frozen=True)
class Recipe:
    """How a method is made.

    Attributes:
        title: its name in tables.
        make: builds it.
        chooses: whether it has a retriever of its own, and so says nothing new where none is asked.
        needs: an optional argument of :class:`Tools` that it cannot do without.
    """

    title: str
    make: Callable[[Tools], tuple[Retriever | None, Context]]
    chooses: bool = False
    needs: str | None = None


def _own(tools: Tools) -> Retriever:
    return MemoryRetriever(tools.encoder)


def _infonce(tools: Tools) -> tuple[Retriever, Context]:
    assert tools.retriever_model is not None
    return MemoryRetriever(Encoder(tools.retriever_model), forget=True), MemoryContext(tools)


METHODS: dict[str, Recipe] = {
    "none": Recipe("no context", lambda t: (None, NoContext(t))),
    "other": Recipe("another passage's memory", lambda t: (None, OtherMemory(t))),
    "memory": Recipe("memory", lambda t: (_own(t), MemoryContext(t))),
    "text": Recipe("full text", lambda t: (_own(t), TextContext(t))),
    "rarest": Recipe("rarest tokens", lambda t: (_own(t), TextContext(t, rarest_tokens(t.model, t.samples)))),
    "llmlingua2": Recipe(
        "LLMLingua-2", lambda t: (_own(t), TextContext(t, llmlingua2(t.model, t.llmlingua_model, t.llmlingua_rate)))
    ),
    "bm25": Recipe("BM25, full text", lambda t: (Bm25(), TextContext(t)), chooses=True),
    "dense": Recipe("dense, full text", lambda t: (Dense(t.dense_model, t.model.device), TextContext(t)), chooses=True),
    "infonce": Recipe("supervised retriever, memory", _infonce, chooses=True, needs="retriever_model"),
}


def make_method(name: str, tools: Tools) -> Method:
    """The method called ``name``."""
    return Method(name, *METHODS[name].make(tools))


def check_methods(names: Sequence[str], *, choosing: bool = True, have: Sequence[str] = ()) -> list[str]:
    """The names, each once and in their order.

    Args:
        names: of methods.
        choosing: whether there is anything to choose from (more than one document, and a retriever is asked).
        have: the optional arguments of :class:`Tools` that are there.

    Raises:
        ValueError: one is unknown, has nothing to choose from, or lacks an option that it needs.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise ValueError(f"methods is empty: name some of {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            raise ValueError(f"method ({name!r}) must be one of {', '.join(METHODS)}")
        recipe = METHODS[name]
        if recipe.chooses and not choosing:
            raise ValueError(f"method {name!r} differs by the documents it chooses, and here none are to be chosen")
        if recipe.needs and recipe.needs not in have:
            raise ValueError(f"method {name!r} needs --{recipe.needs.replace('_', '-')}")
    return names
