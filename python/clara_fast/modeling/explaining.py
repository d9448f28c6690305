"""Why a model retrieves what it retrieves: its query's memory in words, and what an answer teaches the retriever."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clara_fast.modeling.answering import Source, Store, nearest
from clara_fast.modeling.branches import pack_groups, question_branches
from clara_fast.ops import reference

if TYPE_CHECKING:
    from clara_fast.modeling.clara import Clara

# Tokens beyond the question that the text names.
ADDED_SHOWN = 12


@dataclass(frozen=True)
class LensToken:
    """A token that a memory slot points at.

    Attributes:
        text: the token, without white space around it.
        probability: of the LM head's softmax over the base model's vocabulary.
        in_question: whether the question holds it, as a token or as a word.
        in_documents: which of the retrieved documents hold it, by their place in the ranking from 0.
    """

    text: str
    probability: float
    in_question: bool
    in_documents: list[int]


@dataclass(frozen=True)
class Candidate:
    """What the answer's loss does to a candidate's score.

    Attributes:
        document: which one, with its cosine.
        selected: whether it is among the ``top_k`` that are read.
        gradient: of the answer's loss (nats a token) in this cosine. Training goes against it: a candidate with a
            negative one is raised.
    """

    document: Source
    selected: bool
    gradient: float

    @property
    def raised(self) -> bool:
        """Whether a training step would bring the question nearer to this document."""
        return self.gradient < 0


@dataclass
class Explanation:
    """See :func:`explain`. ``str()`` gives it as text, :meth:`as_dict` for JSON, :meth:`draw` as a picture.

    Attributes:
        question: what was asked.
        slots: for every memory slot of the question, the tokens that it points at, likeliest first.
        documents: what was retrieved, best first; empty without a store or documents.
        answer: whose loss was taken, if one was given.
        loss: of that answer from the selected documents, nats a token.
        candidates: what that loss does to each candidate, best first.
    """

    question: str
    slots: list[list[LensToken]]
    documents: list[Source] = field(default_factory=list)
    answer: str | None = None
    loss: float | None = None
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def added(self) -> list[LensToken]:
        """What the memory says beyond the question: each word of the lens that the question lacks, likeliest first."""
        best: dict[str, LensToken] = {}
        for token in (token for slot in self.slots for token in slot if not token.in_question):
            if token.text and token.probability > (best[_plain(token)].probability if _plain(token) in best else 0):
                best[_plain(token)] = token
        return sorted(best.values(), key=lambda token: -token.probability)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        found = asdict(self)
        for row, candidate in zip(found["candidates"], self.candidates, strict=True):
            row["raised"] = candidate.raised
        return {**found, "added": [asdict(token) for token in self.added]}

    def __str__(self) -> str:
        lines = [f"question: {self.question}", "", "slot  tokens (+ not in the question, * in a retrieved document)"]
        for i, slot in enumerate(self.slots):
            lines.append(f"{i:4}  " + "  ".join(f"{_marked(token)} {token.probability:.2f}" for token in slot))
        if added := self.added[:ADDED_SHOWN]:
            lines += ["", "beyond the question: " + ", ".join(f"{_marked(t)} {t.probability:.2f}" for t in added)]
        if self.documents:
            lines += ["", "retrieved"]
            lines += [f"{i + 1:4}. {_score(d)}  {_name(d)}" for i, d in enumerate(self.documents)]
        if self.candidates:
            lines += [
                "",
                f"loss of the answer {self.answer!r}: {self.loss:.3f} nats a token; what it does to the scores",
            ]
            for i, one in enumerate(self.candidates):
                arrow = "raised " if one.raised else "lowered"
                read = "read" if one.selected else "    "
                lines.append(
                    f"{i + 1:4}. {_score(one.document)}  {arrow} {one.gradient:+.2e}  {read}  {_name(one.document)}"
                )
        return "\n".join(lines)

    def draw(self, file: str | Path) -> None:
        """Write a picture (``.png``, ``.svg`` or ``.pdf``): tokens by slot, and a bar for each candidate.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the file's name ends otherwise.
        """
        from clara_fast.modeling.explanation_plot import draw

        draw(self, Path(file))


def explain(
    model: Clara,
    question: str,
    *,
    store: Store | None = None,
    documents: Sequence[str] | None = None,
    answer: str | None = None,
    top_k: int | None = None,
    num_candidates: int = 20,
    num_tokens: int = 5,
) -> Explanation:
    """Look into a question's memory, and into what an answer would teach the retriever.

    The lens puts each slot's state, which is normed already, through the LM head. Memories that a connector has moved
    to the space of embeddings are looked at before it.

    Args:
        model: the model.
        question: what is asked.
        store: its ``num_candidates`` nearest documents are the candidates.
        documents: the candidates themselves, instead of a store.
        answer: if it is given, its loss is taken from the ``top_k`` best candidates' memories, and goes back through
            the straight-through selection (reference.md section 4 of the method; paper section 3.2) to every score.
        top_k: how many candidates are read; default the model's ``config.top_k``, or all where there are fewer.
        num_candidates: taken from a store.
        num_tokens: shown for each slot.

    Raises:
        ValueError: the question is empty, both or (with an answer) neither of store and documents were given, a number
            is out of range, or another model wrote the store.
    """
    if store is not None and documents is not None:
        raise ValueError("explain() takes a store or documents, not both")
    if answer is not None and store is None and not documents:
        raise ValueError(
            "an answer teaches the retriever about documents: explain() needs a store or documents with it"
        )
    if answer is not None and not answer.strip():
        raise ValueError("answer must hold text, but is empty")
    for name, value in (("num_candidates", num_candidates), ("num_tokens", num_tokens)):
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    query = model.encode_queries(question)
    found, memory = _candidates(model, query, store, documents, num_candidates)
    count = min(model.config.top_k, len(found)) if top_k is None else top_k
    if found and not 1 <= count <= len(found):
        raise ValueError(f"top_k ({count}) must be at least 1 and at most the number of documents ({len(found)})")
    lens = _Lens(model, question, [f"{d.title}\n{d.text}" for d in found[:count]])
    explanation = Explanation(question, lens.slots(_states(model, question), num_tokens), found[:count])
    if answer is not None:
        explanation.answer = answer
        explanation.loss, gradient = score_gradient(model, question, answer, query[0], memory, count)
        explanation.candidates = [
            Candidate(document, i < count, value)
            for i, (document, value) in enumerate(zip(found, gradient.tolist(), strict=True))
        ]
    return explanation


def score_gradient(
    model: Clara,
    question: str,
    answer: str,
    query: Tensor,
    memory: Tensor,
    top_k: int,
    *,
    temperature: float = 0.02,
) -> tuple[float, Tensor]:
    """Loss of ``answer`` (nats a token), and its gradient ``[N]`` in the cosines of the candidates.

    Args:
        model: the model, of which nothing gets a gradient.
        question, answer: what the loss is of.
        query: ``[m, D]`` memory of the question.
        memory: ``[N, m, D]`` memories of the candidates.
        top_k: how many of them are read.
        temperature: of the straight-through softmax.
    """
    prompts = pack_groups(model, [question_branches(model, [(question, answer)], num_documents=top_k)])
    wide = memory.float()[None]
    with model.inference(), torch.enable_grad():
        asked = query.detach().float().flatten()[None].requires_grad_()
        # In plain PyTorch the scores are a node of the graph, whose gradient can be asked for.
        selected, _, scores = reference.select_memory(asked, wide.flatten(2), wide, top_k, temperature=temperature)
        loss = model.answer_loss(prompts.to(model.device), selected.flatten(0, 2))
        (gradient,) = torch.autograd.grad(loss, scores)
    return float(loss.detach()), gradient[0]


class _Lens:
    """Reads states as tokens, and knows which of them question and documents hold."""

    def __init__(self, model: Clara, question: str, documents: Sequence[str]) -> None:
        self.model = model
        self.question, *self.documents = (self._pieces(text) for text in (question, *documents))

    def slots(self, states: Tensor, count: int) -> list[list[LensToken]]:
        head = self.model.lm.get_output_embeddings()
        with self.model.inference():
            logits = head(states.to(head.weight)).float()[:, : self.model.text.added_ids[0]]
        top = logits.softmax(-1).topk(min(count, logits.shape[1]))
        return [
            [self._token(i, p) for i, p in zip(ids, probabilities, strict=True)]
            for ids, probabilities in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def _token(self, token: int, probability: float) -> LensToken:
        text = str(self.model.tokenizer.decode([token])).strip()
        place = text.casefold()
        holders = [i for i, pieces in enumerate(self.documents) if place in pieces] if place else []
        return LensToken(text, probability, place in self.question, holders)

    def _pieces(self, text: str) -> set[str]:
        """Tokens and words of a text, lower case."""
        ids = self.model.tokenizer(self.model.text.defuse(text), add_special_tokens=False)["input_ids"]
        tokens = (str(piece).strip().casefold() for piece in self.model.tokenizer.batch_decode([[i] for i in ids]))
        return {*tokens, *re.findall(r"\w+", text.casefold())}


def _states(model: Clara, question: str) -> Tensor:
    """Final, normed states ``[m, D]`` of the question's memory slots, before any connector."""
    connector, model.connector = model.connector, None
    try:
        return model.encode_queries(question)[0]
    finally:
        model.connector = connector


def _candidates(
    model: Clara, query: Tensor, store: Store | None, documents: Sequence[str] | None, count: int
) -> tuple[list[Source], Tensor]:
    """The candidates, best first, and their memories."""
    if store is not None:
        store.check_model(model)
        ((hits, memory),) = store.search_with_memory(query, min(count, len(store)))
        return [Source(h.id, h.score, h.text, h.title) for h in hits], memory.to(query)
    if not documents:
        return [], query[:0]
    memory = model.compress(documents)
    rows, scores = nearest(model, query, memory, len(documents))
    order = rows.tolist()
    return [Source(str(i), s, documents[i]) for i, s in zip(order, scores.tolist(), strict=True)], memory[order]


def _plain(token: LensToken) -> str:
    return token.text.casefold()


def _marked(token: LensToken) -> str:
    return f"{token.text or '␣'}{'' if token.in_question else '+'}{'*' if token.in_documents else ''}"


def _score(document: Source) -> str:
    return f"{document.score:.4f}" if document.score is not None else "      "


def _name(document: Source, length: int = 70) -> str:
    """Id, title and the beginning of the text on one line."""
    line = " ".join(f"{document.id}  {document.title} {document.text}".split())
    return line if len(line) <= length else line[: length - 1] + "…"
