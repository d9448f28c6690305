"""The retriever of LlamaIndex."""

from __future__ import annotations

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from clara_fast.store.retrievers import Retrieval, facts


class LlamaIndexRetriever(BaseRetriever):
    """Documents of a memory store as nodes, nearest first; their score is the cosine."""

    def __init__(self, retrieval: Retrieval) -> None:
        super().__init__()
        self._retrieval = retrieval

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [
            NodeWithScore(node=TextNode(id_=hit.id, text=hit.text, metadata=facts(hit)), score=hit.score)
            for hit in self._retrieval(query_bundle.query_str)
        ]
