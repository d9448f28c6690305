"""``clara-fast search``."""

from __future__ import annotations

import json as json_format
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

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
    where: Annotated[
        str | None,
        typer.Option(help='Only documents of which this holds: \'{"lang": ["en", "de"], "year": {">=": 1990}}\'.'),
    ] = None,
    pooled: Annotated[bool, typer.Option("--pooled", help="Compare the means over the memory tokens.")] = False,
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
    condition = _condition(where)
    store = MemoryStore.open(path)
    clara, load_seconds = ModelChoice.of(model, subfolder, base_model, device, dtype).or_of(store).load()
    store.check_model(clara)
    k = min(DEFAULT_K, len(store)) if k is None else k
    started = time.perf_counter()
    memories = clara.encode_queries(queries)
    encoded = time.perf_counter()
    found = store.search(memories, k, where=condition, keys="pooled" if pooled else "memory")
    timings = {"load": load_seconds, "query": encoded - started, "search": time.perf_counter() - encoded}
    if json:
        results = [{"query": q, "hits": [asdict(hit) for hit in hits]} for q, hits in zip(queries, found, strict=True)]
        print_json({"store": str(path), "documents": len(store), "k": k, "results": results, "timings": timings})
        return
    for query, hits in zip(queries, found, strict=True):
        print(query)
        for rank, hit in enumerate(hits, start=1):
            print_hit(rank, hit)
        print()
    print(f"{len(store)} documents; {seconds(timings)}")


def _condition(where: str | None) -> dict[str, Any] | None:
    if where is None:
        return None
    try:
        condition = json_format.loads(where)
    except ValueError as error:
        raise ValueError(f"--where ({where}) is not JSON: {error}") from None
    if not isinstance(condition, dict):
        raise ValueError(f"--where ({where}) must be a JSON object")
    return condition
