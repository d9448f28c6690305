"""``clara-fast inspect``."""

from __future__ import annotations

import json as json_format
import math
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from clara_fast.cli.models import JsonOption
from clara_fast.cli.output import note, print_json, size, snippet

_SAMPLES = 3


def inspect(
    path: Annotated[Path, typer.Argument(metavar="STORE_OR_MODEL", help="Folder of a store or of a model.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file of a store and check its checksum.")
    ] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Verify, and drop a store's damaged shards.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw norms and cosines of a store's memories here (.png, .svg or .pdf).")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what a store or a model holds, without loading a model."""
    if (path / "manifest.json").exists():
        facts = _store(path, verify, repair, plot)
    elif (path / "config.json").is_file():
        if verify or repair or plot is not None:
            raise ValueError("--verify, --repair and --plot are for stores; this is a model")
        facts = _model(path)
    elif path.exists():
        raise ValueError(f"{path} is neither a store (no manifest.json) nor a model (no config.json)")
    else:
        raise FileNotFoundError(f"{path} does not exist")
    if json:
        print_json(facts)
    else:
        _print(facts)


def _store(path: Path, verify: bool, repair: bool, plot: Path | None) -> dict[str, Any]:
    from clara_fast.cli import store_plot
    from clara_fast.store import MemoryStore

    if plot is not None:
        store_plot.require_plot(plot)
    with MemoryStore.open(path) as store:
        facts: dict[str, Any] = {"kind": "store"}
        if repair:
            facts["dropped_shards"] = store.repair()
            if facts["dropped_shards"]:
                note("dropped damaged shards; the same compress command adds their documents again")
        elif verify:
            facts["verified_in_seconds"] = store.verify()["seconds"]
        samples = [
            {"row": document.row, "id": document.id, "title": document.title, "text": snippet(document.text)}
            for document in islice(store, _SAMPLES)
        ]
        if plot is not None:
            if not len(store):
                raise ValueError(f"{path} holds no document to draw")
            measured = store_plot.measure(store)
            store_plot.draw(store, measured, plot)
            facts |= store_plot.summary(measured)
            note(f"norms and cosines drawn to {plot}")
        return {**facts, **store.stats(), "first_documents": samples}


def _model(path: Path) -> dict[str, Any]:
    try:
        config = json_format.loads((path / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is not JSON: {error}") from None
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    listed = [
        {
            "file": file.relative_to(path).as_posix(),
            "bytes": file.stat().st_size,
            **(_tensors(file) if file.suffix == ".safetensors" else {}),
        }
        for file in files
    ]
    return {"kind": "model", "path": str(path), "config": config, "files": listed}


def _tensors(file: Path) -> dict[str, Any]:
    """How many tensors and numbers a safetensors file holds; its header is read, nothing else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        return {"damaged": str(error)}
    return {"tensors": len(shapes), "parameters": sum(math.prod(shape) for shape in shapes)}


def _print(facts: dict[str, Any], indent: str = "") -> None:
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            print(f"{indent}{name}:")
            _print(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"{indent}{name}:")
            for entry in value:
                print(f"{indent}  " + "  ".join(_shown(key, part) for key, part in entry.items() if part != ""))
        else:
            print(f"{indent}{name:22} {_shown(name, value)}")


def _shown(name: str, value: Any) -> str:
    if "bytes" in name and isinstance(value, int | float):
        return size(value)
    return f"{value} {name}" if name in ("tensors", "parameters") else str(value)
