"""``clara-fast synthesize``."""

from __future__ import annotations

import json as json_module
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clara_fast.cli.models import JsonOption
from clara_fast.cli.output import item_progress, note, print_json

if TYPE_CHECKING:
    from clara_fast.synthesis import Places

_DEFAULT_KEY = "OPENAI_API_KEY"


def _copy(folder: Path | None) -> Path | None:
    if folder is not None:
        from clara_fast.synthesis import copy_prompts

        for file in copy_prompts(folder):
            print(file)
        raise typer.Exit
    return folder


def synthesize(
    passages: Annotated[
        Path,
        typer.Argument(help='JSONL (may be gzipped) of {"text", "title", "id"}; for teacher: {"question", "docs"}.'),
    ],
    endpoint: Annotated[str, typer.Option(help="OpenAI-compatible server, such as http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The server's model that writes.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSONL to write; an unfinished run goes on.")],
    task: Annotated[str, typer.Option(help="scp: questions and paraphrases of passages; teacher: answers.")] = "scp",
    judge_model: Annotated[str | None, typer.Option(help="The server's model that judges; default: the same.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Folder of prompts to use in the place of ours.")] = None,
    copy_prompts: Annotated[
        Path | None,
        typer.Option(
            help="Copy our prompts to this folder, to be changed there, and stop.", is_eager=True, callback=_copy
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field with a passage, or with a list of passages.")] = "text",
    id_field: Annotated[str, typer.Option(help="Field with its id; without one, a hash of it.")] = "id",
    title_field: Annotated[str, typer.Option(help="Field with its title, if any.")] = "title",
    limit: Annotated[int | None, typer.Option(help="Only the first so many passages or questions.")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds for each, at most 10. Default: 10; teacher: 3.", show_default=False)
    ] = None,
    max_answer_words: Annotated[int, typer.Option(help="scp: reject longer answers.")] = 30,
    docs: Annotated[int, typer.Option(help="teacher: documents to answer from; those in pos_index are kept.")] = 5,
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.")] = 16,
    requests_per_minute: Annotated[float | None, typer.Option(help="Send no more.")] = None,
    tokens_per_minute: Annotated[float | None, typer.Option(help="Spend no more, sent and received.")] = None,
    retries: Annotated[int, typer.Option(help="How often to ask again after an error that may pass.")] = 8,
    backoff: Annotated[float, typer.Option(help="Seconds before the first retry; doubled for each further one.")] = 1.0,
    timeout: Annotated[float, typer.Option(help="Seconds that one answer may take.")] = 120.0,
    structured: Annotated[
        str, typer.Option(help="How to ask for JSON: auto, json_schema, json_object or off.")
    ] = "auto",
    extra_body: Annotated[
        str | None,
        typer.Option(help='JSON to add to each request, e.g. {"chat_template_kwargs": {"enable_thinking": false}}.'),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help=f"Environment variable with the key. Default: {_DEFAULT_KEY}, if it is set.")
    ] = None,
    price_in: Annotated[float, typer.Option(help="Price of a million tokens sent, for the report.")] = 0.0,
    price_out: Annotated[float, typer.Option(help="Price of a million tokens received.")] = 0.0,
    plots: Annotated[
        bool | None, typer.Option(help="Draw the report. Default: if matplotlib is installed.", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write training data with a language model behind a server; a judge has accepted every row.

    Beside OUT.jsonl stand OUT.journal.jsonl (every answer; the same command goes on from it after a kill),
    OUT.rejected.jsonl (with reasons), OUT.report.json and OUT.report.png.
    """
    from clara_fast.synthesis import (
        Endpoint,
        Items,
        Prices,
        Prompts,
        Run,
        ScpTask,
        TeacherTask,
        passages_of,
        plot,
        question_of,
    )

    if task not in ("scp", "teacher"):
        raise ValueError(f"task ({task}) must be scp or teacher")
    if docs < 1:
        raise ValueError(f"docs ({docs}) must be at least 1")
    if task == "scp":
        work: Any = ScpTask(10 if rounds is None else rounds, max_answer_words)
        read = partial(passages_of, text_field=text_field, id_field=id_field, title_field=title_field)
    else:
        work = TeacherTask(3 if rounds is None else rounds)
        read = partial(question_of, max_documents=docs, id_field=id_field)
    if plots:
        _need_matplotlib()
    run = Run(
        task=work,
        items=Items(passages, read, limit),
        out=out,
        endpoint=Endpoint(
            url=endpoint,
            api_key=_key(api_key_env),
            concurrency=concurrency,
            retries=retries,
            backoff=backoff,
            timeout=timeout,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            structure=structured,
            extra=_extra(extra_body),
        ),
        model=model,
        judge=judge_model,
        prompts=Prompts(prompts),
        prices=Prices(price_in, price_out),
    )
    with item_progress("items") as bar:
        bar_task = bar.add_task("synthesizing", total=None)
        accepted = 0

        def progress(what: str, count: int) -> None:
            nonlocal accepted
            if what == "items":
                bar.update(bar_task, total=count)
            elif what == "done":
                bar.advance(bar_task, count)
            else:
                accepted += count
                bar.update(bar_task, description=f"synthesizing, {accepted} accepted")

        try:
            report = run(progress)
        except KeyboardInterrupt:
            note(f"stopped: {run.places.journal} keeps every answer; the same command does the rest")
            raise
    if plots is not False and _has_matplotlib():
        plot(report, run.places.beside("report.png"))
    if json:
        print_json({"out": str(out), **report})
    else:
        _print(run.places, report)
    if report["unfinished"]:
        for line in report["this_run"]["unfinished"][:3]:
            note(line)
        note(f"{report['unfinished']} items are unfinished: the same command asks for them again")
        raise typer.Exit(1)


def _print(places: Places, report: dict[str, Any]) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in report["accepted"].items()) or "nothing"
    rejected = sum(sum(reasons.values()) for reasons in report["rejected"].values())
    print(f"{places.out}: accepted {kinds}; {rejected} rejected; {report['duplicates']} duplicates left out")
    if not report["accepted"] and rejected:
        print(f"why: {places.rejected}")
    tokens = f"{report['prompt_tokens']} tokens sent, {report['completion_tokens']} received"
    cost = f", cost {report['cost']:.2f}" if report["cost"] else ""
    print(f"{report['finished']} of {report['items']} items in {report['requests']} requests; {tokens}{cost}")


def _key(variable: str | None) -> str | None:
    if variable is None:
        return os.environ.get(_DEFAULT_KEY) or None
    key = os.environ.get(variable)
    if not key:
        raise ValueError(f"the environment variable {variable} (--api-key-env) is not set")
    return key


def _extra(text: str | None) -> dict[str, Any]:
    try:
        extra = json_module.loads(text or "{}")
    except json_module.JSONDecodeError as error:
        raise ValueError(f"extra_body is not JSON ({error})") from None
    if not isinstance(extra, dict):
        raise ValueError(f"extra_body ({text}) must be a JSON object")
    return extra


def _has_matplotlib() -> bool:
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def _need_matplotlib() -> None:
    if not _has_matplotlib():
        raise ImportError("--plots needs matplotlib: pip install 'clara-fast[bench]'")
