"""``clara-fast index``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from clara_fast.cli.conditions import WhereOption, parsed_where
from clara_fast.cli.models import JsonOption
from clara_fast.cli.output import note, print_json, size

EffortOption = Annotated[
    int | None,
    typer.Option(help="Lists (IVF) or neighbours (HNSW) that a search visits: more find more. Default: FAISS's."),
]


def index(
    path: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a store.")],
    kind: Annotated[
        str, typer.Option(help="IVF or HNSW, sized for the store, or a string of FAISS's index_factory.")
    ] = "IVF",
    report: Annotated[
        bool, typer.Option("--report", help="Do not build: compare the index that is there with exact search.")
    ] = False,
    k: Annotated[int, typer.Option("-k", help="Neighbours to compare.")] = 10,
    candidates: Annotated[
        list[int] | None,
        typer.Option(help="Proposals for each query; may be given several times. Default: 50 200 800."),
    ] = None,
    effort: EffortOption = None,
    where: WhereOption = None,
    samples: Annotated[int, typer.Option(help="Documents that serve as queries of the report (--report only).")] = 256,
    json: JsonOption = False,
) -> None:
    """Build an index for two-stage search beside a store, or report its recall.

    The index proposes documents by the mean of their memory tokens; exact cosines of whole memories decide among
    them. The report takes documents of the store as queries, each looking for others than itself.
    """
    from clara_fast.store import MemoryStore
    from clara_fast.store.recall import recall_report

    condition = parsed_where(where)
    if where is not None and not report:
        raise ValueError("--where is for --report: an index holds all documents")
    with MemoryStore.open(path) as store:
        if not report:
            started = time.perf_counter()
            facts = store.build_index(kind).facts
            result = {"store": str(path), "kind": facts.kind, "documents": facts.rows, "bytes": facts.bytes}
            result["seconds"] = elapsed = time.perf_counter() - started
            if json:
                print_json(result)
            else:
                print(f"{path}: {facts.kind} over {facts.rows} documents, {size(facts.bytes)}, in {elapsed:.1f} s")
                note(f"next: clara-fast index {path} --report, clara-fast search {path} QUERY --index")
            return
        built = store.open_index(effort=effort)
        if not 1 <= k < len(store):
            raise ValueError(f"-k ({k}) must be at least 1 and less than the number of documents ({len(store)})")
        if samples < 1:
            raise ValueError(f"--samples ({samples}) must be at least 1")
        lines = recall_report(store, built, k, candidates or [50, 200, 800], samples=samples, where=condition)
        if json:
            print_json({"store": str(path), "kind": built.facts.kind, "k": k, "report": lines})
            return
        print(f"{path}: {built.facts.kind} over {built.facts.rows} documents")
        print(f"exact search: {lines[0]['exact_seconds'] * 1000:.2f} ms a query")
        for line in lines:
            print(
                f"{line['candidates']:6} candidates: recall@{k} {line['recall']:.4f}, "
                f"{line['seconds'] * 1000:.2f} ms a query"
            )
