"""``clara-fast search``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from clara_fast.cli.conditions import WhereOption, parsed_where
from clara_fast.cli.index import EffortOption
from clara_fast.cli.models import (
    BaseModelOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelChoice,
    ModelOption,
    SubfolderOption,
)
from clara_fast.cli.output import print_hit, print_json, seconds

DEFAULT_K = 5


def search(
    path: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a store.")],
    queries: Annotated[list[str], typer.Argument(metavar="QUERY...", help="One question or more.")],
    k: Annotated[
        int | None,
        typer.Option("-k", help=f"Documents for each query. Default: {DEFAULT_K}, or all if there are fewer."),
    ] = None,
    where: WhereOption = None,
    pooled: Annotated[bool, typer.Option("--pooled", help="Compare the means over the memory tokens.")] = False,
    use_index: Annotated[
        bool, typer.Option("--index", help="Two-stage search by the store's index (clara-fast index).")
    ] = False,
    candidates: Annotated[
        int | None,
        typer.Option(help="What the index proposes for each query. Default: 20 for each of -k, 100 at least."),
    ] = None,
    effort: EffortOption = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="With --index: also search exactly, and say how much of that was found.")
    ] = False,
    model: ModelOption = None,
    subfolder: SubfolderOption = None,
    base_model: BaseModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Find the documents of a store nearest to each query, by the cosine of their memories."""
    from clara_fast.store import MemoryStore

    if not all(query.strip() for query in queries):
        raise ValueError("a query is empty")
    condition = parsed_where(where)
    for name, value in (("--candidates", candidates), ("--effort", effort), ("--compare", compare or None)):
        if value is not None and not use_index:
            raise ValueError(f"{name} is for a search with --index")
    store = MemoryStore.open(path)
    index = store.open_index(effort=effort) if use_index else None
    clara, load_seconds = ModelChoice.of(model, subfolder, base_model, device, dtype).or_of(store).load()
    store.check_model(clara)
    k = min(DEFAULT_K, len(store)) if k is None else k
    started = time.perf_counter()
    memories = clara.encode_queries(queries)
    encoded = time.perf_counter()
    keys = "pooled" if pooled else "memory"
    found = store.search(memories, k, where=condition, keys=keys, index=index, candidates=candidates)
    timings = {"load": load_seconds, "query": encoded - started, "search": time.perf_counter() - encoded}
    recall: dict[str, float] = {}
    if compare:
        compared = time.perf_counter()
        exact = store.search(memories, k, where=condition)
        timings["exact search"] = time.perf_counter() - compared
        shared = sum(len({hit.row for hit in a} & {hit.row for hit in b}) for a, b in zip(found, exact, strict=True))
        total = sum(map(len, exact))
        recall = {"recall": shared / total if total else 1.0}
    if json:
        results = [{"query": q, "hits": [asdict(hit) for hit in hits]} for q, hits in zip(queries, found, strict=True)]
        facts = {"store": str(path), "documents": len(store), "k": k, "results": results}
        print_json({**facts, **recall, "timings": timings})
        return
    for query, hits in zip(queries, found, strict=True):
        print(query)
        for rank, hit in enumerate(hits, start=1):
            print_hit(rank, hit)
        print()
    if recall:
        print(f"recall@{k} of exact search: {recall['recall']:.4f}")
    print(f"{len(store)} documents; {seconds(timings)}")
