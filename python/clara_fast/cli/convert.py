"""``clara-fast convert``, ``compact`` and ``delete``: a store into another form, and its life."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from clara_fast.cli.models import JsonOption
from clara_fast.cli.output import print_json, size

StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a store.")]


def convert(
    path: Annotated[
        Path, typer.Argument(metavar="STORE_OR_FILES", help="Folder of a store, or of files that --export wrote.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder; it appears when all is written.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16, float32, int8 or float8_e4m3fn. Default: as it is."),
    ] = None,
    pooled_keys: Annotated[
        bool | None,
        typer.Option("--pooled-keys/--no-pooled-keys", help="Keep the mean of each document's memory tokens too."),
    ] = None,
    export: Annotated[
        bool, typer.Option("--export", help="Write pairs of safetensors and Parquet files that need no manifest.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Copy a store into another format, out to plain files, or in from such files. The original stays as it is."""
    from clara_fast.store import MemoryStore

    started = time.perf_counter()
    if export and (dtype is not None or pooled_keys is not None):
        raise ValueError("--export writes what is stored: convert first, then export")
    if export:
        store = MemoryStore.open(path)
        result: dict[str, Any] = {"files": 2 * store.export(out), "documents": len(store)}
    elif MemoryStore.exists(path):
        store = MemoryStore.open(path)
        result = _compared(store.stats(), store.convert(out, dtype=dtype, pooled_keys=pooled_keys).stats())
    else:
        if dtype is not None or pooled_keys is not None:
            raise ValueError(f"{path} is no store: import it first, without --dtype and --pooled-keys")
        result = MemoryStore.import_from(path, out).stats()
    result = {"out": str(out), **result, "seconds": time.perf_counter() - started}
    if json:
        print_json(result)
        return
    print(f"{out}: {result['documents']} documents in {result['seconds']:.1f} s")
    if "before" in result:
        print(f"{size(result['bytes_per_document'])} each, {size(result['before'])} before")


def _compared(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {**after, "before": before["bytes_per_document"]}


def compact(
    path: StoreArgument,
    shard_size: Annotated[
        int | None, typer.Option(help="Documents in a shard, at most. Default: what makes 256 MiB, 65,536 at most.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Give back the space of deleted documents and merge small shards. It may be stopped and called again."""
    from clara_fast.store import MemoryStore

    with MemoryStore.open(path) as store:
        before = store.stats()
        written = store.compact(shard_documents=shard_size)
        after = store.stats()
    if json:
        print_json({**after, "written": written, "shards_before": before["shards"]})
        return
    each, now = (size(stats["memory_bytes"] + stats["document_bytes"]) for stats in (before, after))
    print(f"{path}: {before['shards']} shards with {each} became {after['shards']} with {now}")


def delete(
    path: StoreArgument,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Documents to take out.")],
    json: JsonOption = False,
) -> None:
    """Take documents out of a store; clara-fast compact then gives their space back."""
    from clara_fast.store import MemoryStore

    with MemoryStore.open(path) as store:
        store.delete(ids)
        result = {"store": str(path), "deleted": len(set(ids)), "documents": len(store)}
    if json:
        print_json(result)
    else:
        print(f"{path}: {result['deleted']} deleted, {result['documents']} left")
