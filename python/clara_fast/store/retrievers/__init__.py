"""A store as a retriever of LangChain or LlamaIndex; made by :meth:`clara_fast.MemoryStore.as_retriever`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from clara_fast.store.chunks import parent_of, parent_text
from clara_fast.store.documents import Hit

if TYPE_CHECKING:
    from clara_fast.store.reading import StoreReader, Writer

FRAMEWORKS = ("langchain", "llamaindex")


class Encoder(Protocol):
    """What a retriever asks of a model (a :class:`clara_fast.Clara`)."""

    def encode_queries(self, questions: list[str]) -> Tensor: ...


@dataclass(frozen=True)
class Retrieval:
    """From a question to hits: what the retrievers of all frameworks share."""

    store: StoreReader
    model: Any
    k: int
    parents: bool
    options: dict[str, Any]

    def __call__(self, question: str) -> list[Hit]:
        """The nearest documents, best first; with ``parents`` whole documents in the place of their chunks."""
        queries = self.model.encode_queries([question])
        hits: list[Hit] = self.store.search(queries, min(self.k, len(self.store)), **self.options)[0]
        if not self.parents:
            return hits
        whole: dict[str, Hit] = {}
        for hit in hits:
            parent = parent_of(hit)
            name = hit.id if parent is None else parent[0]
            if name not in whole:  # the best of its chunks gives the score
                whole[name] = hit if parent is None else replace(hit, id=name, text=parent_text(self.store, hit))
        return list(whole.values())


def make_retriever(
    store: StoreReader, model: Writer, framework: str, k: int, parents: bool, options: dict[str, Any]
) -> Any:
    """See :meth:`clara_fast.MemoryStore.as_retriever`."""
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework ({framework!r}) must be one of {', '.join(map(repr, FRAMEWORKS))}")
    if k < 1:
        raise ValueError(f"k ({k}) must be at least 1")
    store.check_model(model)
    retrieval = Retrieval(store, model, k, parents, options)
    try:
        if framework == "langchain":
            from clara_fast.store.retrievers.langchain import LangChainRetriever

            return LangChainRetriever(retrieval=retrieval)
        from clara_fast.store.retrievers.llamaindex import LlamaIndexRetriever

        return LlamaIndexRetriever(retrieval)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is missing: pip install clara-fast[{framework}]") from None


def facts(hit: Hit) -> dict[str, Any]:
    """Metadata of a retrieved document: its own, and what a search says of it."""
    return {**hit.metadata, "id": hit.id, "title": hit.title, "score": hit.score}
