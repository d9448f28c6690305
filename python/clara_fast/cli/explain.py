"""``clara-fast explain``."""

from __future__ import annotations

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
from clara_fast.cli.output import note, print_json


def explain(
    question: Annotated[str, typer.Argument(help="What is asked.")],
    store_path: Annotated[
        Path | None, typer.Option("--store", help="Store whose documents are retrieved; it knows its model.")
    ] = None,
    document: Annotated[
        list[str] | None,
        typer.Option("--document", help="A candidate's text, instead of a store; may come repeatedly."),
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="Right answer: show what its loss does to the candidates' scores.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", "-k", help="Documents read. Default: as the model says.")
    ] = None,
    candidates: Annotated[int, typer.Option(help="Documents taken from the store.")] = 20,
    tokens: Annotated[int, typer.Option(help="Tokens shown for each memory slot.")] = 5,
    plot: Annotated[Path | None, typer.Option(help="Also draw it here: .png, .svg or .pdf.")] = None,
    model: ModelOption = None,
    subfolder: SubfolderOption = None,
    base_model: BaseModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Show in words what the model makes of a question, and what it retrieves by that.

    A logit lens over the question's memory: the tokens each slot points at, with + where the question lacks them and *
    where a retrieved document holds them. With --answer also the gradient that teaches the retriever: which candidates
    the answer's loss raises, and which it lowers.
    """
    from clara_fast.store import MemoryStore

    if not question.strip():
        raise ValueError("the question is empty")
    choice = ModelChoice.of(model, subfolder, base_model, device, dtype)
    store = MemoryStore.open(store_path) if store_path is not None else None
    clara, _ = (choice if store is None else choice.or_of(store)).load()
    explanation = clara.explain(
        question,
        store=store,
        documents=document or None,
        answer=answer,
        top_k=top_k,
        num_candidates=candidates,
        num_tokens=tokens,
    )
    if plot is not None:
        explanation.draw(plot)
        note(f"drawn to {plot}")
    if json:
        print_json(explanation.as_dict())
    else:
        print(explanation)
