"""The retriever of LangChain."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from clara_fast.store.retrievers import facts


class LangChainRetriever(BaseRetriever):
    """Documents of a memory store, nearest first; ``score`` in the metadata is the cosine."""

    retrieval: Any

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [Document(id=hit.id, page_content=hit.text, metadata=facts(hit)) for hit in self.retrieval(query)]
