"""Retrieval and generation: the parts of a model put together into answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from clara_fast import ops
from clara_fast.modeling.roles import default_role

if TYPE_CHECKING:
    from clara_fast.modeling.clara import Clara


class Store(Protocol):
    """What :func:`answer` needs of a :class:`clara_fast.MemoryStore`."""

    def __len__(self) -> int: ...

    def check_model(self, model: Any) -> None: ...

    def search_with_memory(self, queries: Tensor, k: int) -> list[tuple[list[Any], Tensor]]: ...


@dataclass(frozen=True)
class Source:
    """A document that an answer was drawn from; ``score`` is its cosine with the question (None: not compared)."""

    id: str
    score: float | None
    text: str = ""
    title: str = ""


@dataclass
class Answer:
    """An answer with its sources, best first, and the seconds each step took for the whole call."""

    question: str
    text: str
    documents: list[Source]
    timings: dict[str, float] = field(default_factory=dict)


def nearest(model: Clara, query: Tensor, memory: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows and cosines, each ``[k]``, of the memories ``[N, m, D]`` nearest to ``query [1, m, D]``."""
    scores, indices = ops.cosine_topk(query.flatten(1), memory.flatten(1), k)
    return indices[0], scores[0]


def answer(
    model: Clara,
    questions: str | Sequence[str],
    *,
    store: Store | None = None,
    documents: Sequence[str] | Sequence[Sequence[str]] | None = None,
    memory: Tensor | Sequence[Tensor] | None = None,
    top_k: int | None = None,
    max_new_tokens: int = 64,
    **generate_options: Any,
) -> Answer | list[Answer]:
    """Answer questions from exactly one of a store, documents, or memories.

    Args:
        model: the model.
        questions: one question, or several that are answered in one batch.
        store: the ``top_k`` documents nearest to each question are read.
        documents: candidates of the question (of each question, if there are several); the ``top_k`` nearest are read.
        memory: ``[k, m, D]`` (for several questions ``[B, k, m, D]``, or one ``[k, m, D]`` for each, ``k`` as it
            comes), read as it is and in that order.
        top_k: how many documents to read; default the model's ``config.top_k``, or all where there are fewer.
        max_new_tokens: length limit of an answer.
        generate_options: passed on to transformers' ``generate`` (sampling, beams, ``streamer``, ...).

    Returns:
        One :class:`Answer` for one question, a list for several.

    Raises:
        ValueError: none or several sources were given, ``top_k`` exceeds the number of documents, or another model
            wrote the store.
    """
    if sum(source is not None for source in (store, documents, memory)) != 1:
        raise ValueError("answer() reads from exactly one of store, documents and memory")
    single = isinstance(questions, str)
    batch: list[str] = [questions] if isinstance(questions, str) else list(questions)
    if not batch:
        return []
    timings: dict[str, float] = {}
    memories: list[Tensor] = []
    sources: list[list[Source]] = []
    if memory is not None:
        memories = _given(model, [memory] if single else memory, len(batch))
        sources = [[Source(id=str(i), score=None) for i in range(len(one))] for one in memories]
    else:
        if store is not None:
            store.check_model(model)
        with _timed(timings, "query"):
            queries = model.encode_queries(batch)
        if store is not None:
            with _timed(timings, "search"):
                found = store.search_with_memory(queries, number_to_read(model, top_k, len(store)))
                memories = [memory for _, memory in found]
            sources = [[Source(h.id, h.score, h.text, h.title) for h in hits] for hits, _ in found]
        else:
            assert documents is not None
            one_list = single or not documents or isinstance(documents[0], str)
            groups: Sequence[Any] = [documents] if one_list else documents
            if len(groups) != len(batch):
                raise ValueError(f"documents ({len(groups)} lists) must be one list for each of {len(batch)} questions")
            for query, group in zip(queries, groups, strict=True):
                with _timed(timings, "compress"):
                    compressed = model.compress(group)
                with _timed(timings, "search"):
                    rows, scores = nearest(model, query[None], compressed, number_to_read(model, top_k, len(group)))
                memories.append(compressed[rows])
                pairs = zip(rows.tolist(), scores.tolist(), strict=True)
                sources.append([Source(str(i), score, group[i]) for i, score in pairs])
    with _timed(timings, "generate"):
        prompts = [
            model.text.prompt(model.prompts, model.prompts.answer(model.text.defuse(q), len(found)))
            for q, found in zip(batch, memories, strict=True)
        ]
        texts = generate(model, prompts, memories, max_new_tokens=max_new_tokens, **generate_options)
    answers = [Answer(q, t, s, timings) for q, t, s in zip(batch, texts, sources, strict=True)]
    return answers[0] if single else answers


# Of transformers' generate, what answers depend on.
_FIXED_OPTIONS = {"num_return_sequences": 1, "return_dict_in_generate": False}


def paraphrase(
    model: Clara, memory: Tensor, *, instruction: int = 0, max_new_tokens: int = 128, **generate_options: Any
) -> list[str]:
    """What each memory of ``[N, m, D]`` says, in the generator's words; ``instruction`` picks the phrasing."""
    if memory.ndim != 3:
        raise ValueError(f"memory {tuple(memory.shape)} must be [N, m, D]")
    prompt = model.text.prompt(model.prompts, model.prompts.paraphrase(instruction))
    memories = [one[None] for one in memory]
    return generate(model, [prompt] * len(memories), memories, max_new_tokens=max_new_tokens, **generate_options)


def generate(
    model: Clara,
    prompts: Sequence[list[int]],
    memories: Sequence[Tensor],
    *,
    max_new_tokens: int,
    role: str = "generator",
    **options: Any,
) -> list[str]:
    """Let the generator go on from prompts (token ids) whose memory slots are filled with ``memories [k, m, D]``.

    Greedy unless ``options`` say otherwise; they go to transformers' ``generate``. Another ``role`` may answer, or the
    base model without adapters (:data:`clara_fast.modeling.roles.NO_ROLE`).

    Raises:
        ValueError: an option would change what is returned, or replace what is set here.
    """
    for name, kept in _FIXED_OPTIONS.items():
        if options.get(name, kept) != kept:
            raise ValueError(f"{name} ({options[name]!r}) must be {kept!r} here: one text is returned for each prompt")
    if options.get("generation_config") is not None:
        raise ValueError("generation_config: give what it holds as options (max_new_tokens, do_sample, num_beams, ...)")
    sequences = generate_ids(model, prompts, memories, role=role, max_new_tokens=max_new_tokens, **options)
    return [text.strip() for text in model.tokenizer.batch_decode(sequences, skip_special_tokens=True)]


def generate_ids(
    model: Clara,
    prompts: Sequence[list[int]],
    memories: Sequence[Tensor],
    *,
    role: str = "generator",
    **options: Any,
) -> Tensor:
    """The token ids behind :func:`generate`: ``[B, new tokens]``, padded behind the end-of-sequence token."""
    if not prompts:
        return torch.empty(0, 0, dtype=torch.int64)
    length = max(len(ids) for ids in prompts)
    embeds = torch.zeros(len(prompts), length, model.config.hidden_size, dtype=model.dtype, device=model.device)
    mask = torch.zeros(len(prompts), length, dtype=torch.int64, device=model.device)
    with model.inference():
        for row, (ids, memory) in enumerate(zip(prompts, memories, strict=True)):
            embeds[row, length - len(ids) :] = fill_prompt(model, ids, memory, row)
            mask[row, length - len(ids) :] = 1
        options = {"do_sample": False, "pad_token_id": model.tokenizer.pad_token_id, **options}
        with default_role(model.lm.get_decoder(), role):
            return model.lm.generate(inputs_embeds=embeds, attention_mask=mask, **options)


def _given(model: Clara, memory: Any, count: int) -> list[Tensor]:
    """One memory ``[k, m, D]`` for each of ``count`` questions, as the caller gave them."""
    wanted = (model.config.num_memory, model.config.hidden_size)
    memories = list(memory)
    if len(memories) != count:
        raise ValueError(f"memory must hold one [k, m, D] for each of these {count} questions, not {len(memories)}")
    for i, one in enumerate(memories):
        if not isinstance(one, Tensor) or one.ndim != 3 or tuple(one.shape[1:]) != wanted:
            shape = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
            raise ValueError(f"memory of question {i} ({shape}) must be [k, m, D] with m, D = {wanted}")
    return memories


def fill_prompt(model: Clara, ids: list[int], memory: Tensor, question: int = 0) -> Tensor:
    """Embeddings ``[T, D]`` of a prompt with ``memory [k, m, D]`` in its slots; ``question`` names it in errors."""
    tokens = torch.tensor(ids)
    filled = model.lm.get_input_embeddings()(tokens.to(model.device))
    slots = torch.tensor(sorted(set(model.text.memory_ids)))
    places = torch.isin(tokens, slots).nonzero().flatten().to(model.device)
    flat = memory.reshape(-1, model.config.hidden_size).to(filled)
    if len(flat) != len(places):
        raise ValueError(f"memory of question {question} has {len(flat)} rows, its prompt {len(places)} slots")
    return filled.index_copy(0, places, flat)


def number_to_read(model: Clara, top_k: int | None, available: int) -> int:
    """How many documents to read: as asked, or as the model is configured, or all if there are fewer."""
    if top_k is None:
        return min(model.config.top_k, available)
    if not 1 <= top_k <= available:
        raise ValueError(f"top_k ({top_k}) must be at least 1 and at most the number of documents ({available})")
    return top_k


class _timed:
    """Adds the seconds of a block to ``timings[name]``."""

    def __init__(self, timings: dict[str, float], name: str) -> None:
        self.timings, self.name = timings, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.timings[self.name] = self.timings.get(self.name, 0.0) + time.perf_counter() - self.start
