"""``clara-fast ask``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from clara_fast.modeling import Clara


def ask(
    path: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a store.")],
    question: Annotated[str, typer.Argument(help="What to answer.")],
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", "-k", help="Documents to read. Default: as the model says, or all if there are fewer."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    model: ModelOption = None,
    subfolder: SubfolderOption = None,
    base_model: BaseModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Answer a question from the memories of the nearest documents.

    Prints the answer, the documents it was drawn from with their scores, and the time of each step.
    """
    from clara_fast.store import MemoryStore

    if not question.strip():
        raise ValueError("the question is empty")
    store = MemoryStore.open(path)
    clara, load_seconds = ModelChoice.of(model, subfolder, base_model, device, dtype).or_of(store).load()
    store.check_model(clara)
    live = not json and sys.stdout.isatty()
    options: dict[str, Any] = {"streamer": _streamer(clara)} if live else {}
    answer = clara.answer(question, store=store, top_k=top_k, max_new_tokens=max_new_tokens, **options)
    timings = {"load": load_seconds, **answer.timings}
    if json:
        documents = [asdict(document) for document in answer.documents]
        print_json({"question": question, "answer": answer.text, "documents": documents, "timings": timings})
        return
    if not live:
        print(answer.text)
    print()
    for rank, document in enumerate(answer.documents, start=1):
        print_hit(rank, document)
    print(f"\n{len(store)} documents; {seconds(timings)}")


def _streamer(clara: Clara) -> Any:
    """Prints the answer to stdout while it is being written."""
    from transformers import TextStreamer

    return TextStreamer(clara.tokenizer, skip_prompt=True, skip_special_tokens=True)
