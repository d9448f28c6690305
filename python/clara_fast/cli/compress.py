"""``clara-fast compress``."""

from __future__ import annotations

import json as json_format
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from clara_fast.store import CorpusError, Record


def compress(
    corpus: Annotated[
        str,
        typer.Argument(
            help="A .jsonl, .jsonl.gz or .parquet file, a folder of such or of .txt and .md files, "
            "or a data set: hf://datasets/NAME, or its NAME with --split."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the store; an unfinished one is continued.")],
    model: ModelOption = None,
    subfolder: SubfolderOption = None,
    base_model: BaseModelOption = None,
    text_field: Annotated[
        str, typer.Option(help="Field with a document's text, or with a list of documents.")
    ] = "text",
    id_field: Annotated[
        str,
        typer.Option(
            help="Field with its id; without one, its line number (FILE:NUMBER in a folder), or a text file's path."
        ),
    ] = "id",
    title_field: Annotated[str, typer.Option(help="Field with its title, if any.")] = "title",
    split: Annotated[str | None, typer.Option(help="Split of a data set.")] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a data set.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many documents.")] = None,
    chunk: Annotated[
        int | None,
        typer.Option(help="Cut longer documents into chunks of so many tokens. Default: keep their beginnings only."),
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Tokens that a chunk shares with the one before. Default: an eighth of --chunk.")
    ] = None,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Also compress documents that say what another one says.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows that are no documents instead of stopping there.")
    ] = False,
    skipped: Annotated[
        Path | None, typer.Option(help="Write what was left out to this .jsonl file, with the reason.")
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens that go through the model at once. Default: 2048 on a CPU, else 16384."),
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Documents in a shard, at most.")] = 1024,
    shard_seconds: Annotated[
        float, typer.Option(help="Work after which a shard is written: a kill loses little more.")
    ] = 60.0,
    store_dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the memories in a new store: bfloat16 (default), float16, float32, int8, float8_e4m3fn.",
            show_default=False,
        ),
    ] = None,
    pooled_keys: Annotated[
        bool, typer.Option("--pooled-keys", help="A new store also keeps means over the memory tokens.")
    ] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Compress a corpus into a store.

    The store grows shard by shard, and a shard is whole or absent: after an interruption, the same command
    does the rest. Documents longer than the model reads are cut, and counted in a warning, unless --chunk is given.

    Several processes share the work: torchrun --nproc-per-node 8 -m clara_fast compress ...
    """
    from clara_fast.store import Corpus, CorpusError, MemoryStore, compress_corpus
    from clara_fast.store.ranks import Ranks

    ranks = Ranks.from_environment()
    first = ranks is None or ranks.rank == 0
    choice = ModelChoice.of(model, subfolder, base_model, device or _own_device(), dtype)
    with ExitStack() as stack:
        left_out = _LeftOut()
        documents = Corpus.open(
            corpus,
            text_field=text_field,
            id_field=id_field,
            title_field=title_field,
            split=split,
            subset=subset,
            limit=limit,
            on_bad=left_out.bad if skip_bad else None,
        )
        if next(iter(documents), None) is None:  # a wrong field is told of before a model is loaded
            raise CorpusError(f"corpus {corpus} holds no document")
        total = documents.count()
        if MemoryStore.exists(out):
            there = MemoryStore.open(out)
            choice = choice.or_of(there)
            if store_dtype not in (None, there.stats()["dtype"]):
                raise ValueError(f"--store-dtype ({store_dtype}) must be that of {out}: {there.stats()['dtype']}")
            if pooled_keys and not there.stats()["pooled_keys"]:
                raise ValueError(f"--pooled-keys: {out} keeps none; clara-fast convert makes a store that does")
        clara, load_seconds = choice.load()
        if batch_tokens is None:
            # A CPU works no faster on larger batches, and reports progress more often on small ones.
            batch_tokens = 2048 if clara.device.type == "cpu" else 16384
        started = time.perf_counter()
        if first:
            formats: dict[str, Any] = {"pooled_keys": pooled_keys}
            if store_dtype is not None:
                formats["dtype"] = store_dtype
            store = MemoryStore.open_or_create(out, clara, loaded_from=choice.where, **formats)
        if ranks is not None:
            ranks.barrier()
        if not first:
            store = MemoryStore.open(out, clara)
        stack.enter_context(store)
        left_out.count = 0  # what was looked at before is looked at again
        if skipped is not None and first:
            left_out.file = stack.enter_context(open(skipped, "w", encoding="utf-8"))
        try:
            with document_progress(visible=first) as bar:
                task = bar.add_task("compressing", total=total)
                report = compress_corpus(
                    store,
                    clara,
                    documents,
                    batch_tokens=batch_tokens,
                    shard_documents=shard_size,
                    shard_seconds=shard_seconds,
                    chunk=chunk,
                    overlap=overlap,
                    keep_duplicates=keep_duplicates,
                    ranks=ranks,
                    total=total,
                    progress=lambda count: bar.advance(task, count),
                    on_duplicate=left_out.duplicate,
                )
        except KeyboardInterrupt:
            if first:
                note(f"stopped: {out} holds {len(store)} documents; the same command does the rest")
            raise
        stats = store.stats()
    if not first:
        return
    elapsed = time.perf_counter() - started
    result = {
        "store": str(out),
        "added": report.added,
        "skipped": report.skipped,
        "duplicates": report.duplicates,
        "bad": left_out.count,
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
    pieces = "" if report.chunks == report.added else f" as {report.chunks} chunks"
    print(
        f"{out}: {report.added} documents added{pieces} in {elapsed:.1f} s ({report.added / elapsed:.1f} docs/s) "
        f"after {load_seconds:.1f} s of loading, {report.skipped} there before"
    )
    if report.duplicates or left_out.count:
        print(f"left out: {report.duplicates} that say what another one says, {left_out.count} bad rows")
    print(f"now {stats['documents']} documents, {size(stats['bytes_per_document'])} each")
    print(f'next: clara-fast ask {out} "your question"')


def _own_device() -> str | None:
    """The GPU of this process among those that a launcher started on this machine; None: as ever."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    if local is None or not torch.cuda.is_available():
        return None
    return f"cuda:{int(local) % torch.cuda.device_count()}"


class _LeftOut:
    """Counts bad rows, and writes what is left out to a file of JSON lines, if there is one."""

    def __init__(self) -> None:
        self.count = 0
        self.file: IO[str] | None = None

    def bad(self, error: CorpusError) -> None:
        self.count += 1
        self._write({"reason": str(error)})

    def duplicate(self, record: Record, other: str) -> None:
        self._write({"reason": "duplicate", "where": record.where, "id": record.id, "same_as": other})

    def _write(self, line: dict[str, str]) -> None:
        if self.file is not None:
            self.file.write(json_format.dumps(line, ensure_ascii=False) + "\n")
