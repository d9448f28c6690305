"""What two-stage search finds of what exact search does."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from clara_fast.store.filters import Where
from clara_fast.store.pooled_index import PooledIndex
from clara_fast.store.reading import StoreReader


def recall_report(
    store: StoreReader,
    index: PooledIndex,
    k: int,
    candidates: Sequence[int],
    *,
    queries: Tensor | None = None,
    samples: int = 256,
    where: Where | None = None,
) -> list[dict[str, float]]:
    """How many of the ``k`` nearest documents two-stage search finds, and how long both searches take.

    Args:
        store: that was indexed.
        index: of it.
        k: neighbours to look for.
        candidates: numbers of proposals to try.
        queries: ``[B, m, D]``; default: ``samples`` documents of the store, each looking for others than itself.
        where: look for documents only for which this holds; see :meth:`clara_fast.MemoryStore.search`.

    Returns:
        for each number of candidates: ``candidates``, ``recall`` (of all that exact search finds for the queries),
        ``seconds`` a query, and ``exact_seconds`` of exact search.

    Raises:
        ValueError: exact search finds nothing.
    """
    own = None
    if queries is None:
        own = np.unique(np.linspace(0, len(store) - 1, min(samples, len(store))).astype(np.int64))
        queries = store.memory(own.tolist()).float()
    wanted = k if own is None else k + 1
    started = time.perf_counter()
    exact = store.topk(queries, wanted, where=where)[1].numpy()
    exact_seconds = (time.perf_counter() - started) / len(queries)
    best = [row[row != own[i]][:k] if own is not None else row for i, row in enumerate(exact)]
    total = sum(map(len, best))
    if not total:
        raise ValueError(f"where ({where}) leaves nothing to find")
    report = []
    for number in candidates:
        started = time.perf_counter()
        found = store.topk(queries, wanted, index=index, candidates=max(number, wanted), where=where)[1].numpy()
        seconds = (time.perf_counter() - started) / len(queries)
        hits = sum(len(np.intersect1d(true, proposed)) for true, proposed in zip(best, found, strict=True))
        report.append(
            {"candidates": number, "recall": hits / total, "seconds": seconds, "exact_seconds": exact_seconds}
        )
    return report
