"""``clara-fast compress``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

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
from clara_fast.cli.output import document_progress, note, print_json, size


def compress(
    corpus: Annotated[
        Path, typer.Argument(help="A .jsonl, .jsonl.gz or .parquet file, or a folder of .txt and .md files.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the store; an unfinished one is continued.")],
    model: ModelOption = None,
    subfolder: SubfolderOption = None,
    base_model: BaseModelOption = None,
    text_field: Annotated[
        str, typer.Option(help="Field with a document's text, or with a list of documents.")
    ] = "text",
    id_field: Annotated[str, typer.Option(help="Field with its id; without one, its line number.")] = "id",
    title_field: Annotated[str, typer.Option(help="Field with its title, if any.")] = "title",
    limit: Annotated[int | None, typer.Option(help="Only the first so many documents.")] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens that go through the model at once. Default: 2048 on a CPU, else 16384."),
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Documents in a shard, at most.")] = 1024,
    shard_seconds: Annotated[float, typer.Option(help="Work in a shard, at most: a kill loses no more.")] = 60.0,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Compress a corpus into a store.

    The store grows shard by shard, and a shard is whole or absent: after an interruption, the same command
    does the rest.
    Documents longer than the model reads are cut, and counted in a warning.
    """
    from clara_fast.store import Corpus, MemoryStore, compress_corpus

    choice = ModelChoice.of(model, subfolder, base_model, device, dtype)
    documents = Corpus.open(corpus, text_field=text_field, id_field=id_field, title_field=title_field, limit=limit)
    total = documents.count()
    if MemoryStore.exists(out):
        choice = choice.or_of(MemoryStore.open(out))
    clara, load_seconds = choice.load()
    if batch_tokens is None:
        # A CPU works no faster on larger batches, and reports progress more often on small ones.
        batch_tokens = 2048 if clara.device.type == "cpu" else 16384
    started = time.perf_counter()
    with MemoryStore.open_or_create(out, clara, loaded_from=choice.where) as store:
        try:
            with document_progress() as bar:
                task = bar.add_task("compressing", total=total)
                report = compress_corpus(
                    store,
                    clara,
                    documents,
                    batch_tokens=batch_tokens,
                    shard_documents=shard_size,
                    shard_seconds=shard_seconds,
                    progress=lambda count: bar.advance(task, count),
                )
        except KeyboardInterrupt:
            note(f"stopped: {out} holds {len(store)} documents; the same command does the rest")
            raise
        stats = store.stats()
    elapsed = time.perf_counter() - started
    result = {
        "store": str(out),
        "added": report.added,
        "skipped": report.skipped,
        "truncated": report.truncated,
        "documents": stats["documents"],
        "shards": stats["shards"],
        "bytes_per_document": stats["bytes_per_document"],
        "timings": {"load": load_seconds, "compress": elapsed},
        "documents_per_second": report.added / elapsed,
    }
    if json:
        print_json(result)
        return
    print(
        f"{out}: {report.added} documents added in {elapsed:.1f} s ({report.added / elapsed:.1f} docs/s) "
        f"after {load_seconds:.1f} s of loading, {report.skipped} there before"
    )
    print(f"now {stats['documents']} documents, {size(stats['bytes_per_document'])} each")
    print(f'next: clara-fast ask {out} "your question"')
