"""Train the model that `make demo` uses, from nothing: SmolLM2-135M as base, question-answer data as in the README.

    python examples/train_demo_model.py --base FOLDER --data ../shared/data --out runs/demo

Four steps, each of which is skipped or resumed when it was done before:

1. `clara-fast train scp`: compressor and generator on short passages with at least two questions each;
2. `clara-fast compress`: memories of some of these passages;
3. `clara-fast train retriever`: the query reasoner on their questions;
4. the adapters alone, in bfloat16, to OUT/model.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

MAX_WORDS = 105


def main(
    base: Annotated[Path, typer.Option(help="SmolLM2-135M-Instruct; make demo leaves it in its cache.")],
    data: Annotated[Path, typer.Option(help="Folder with scp_train.jsonl.gz and scp_dev.jsonl.gz.")],
    out: Annotated[Path, typer.Option(help="Folder for everything that is made.")],
    scp_steps: Annotated[int, typer.Option(help="Optimizer steps of 8 passages.")] = 200,
    retriever_passages: Annotated[int, typer.Option(help="Passages whose questions train the retriever.")] = 450,
    retriever_steps: Annotated[int, typer.Option(help="Optimizer steps of 32 questions.")] = 45,
) -> None:
    """Train the demo's model."""
    out.mkdir(parents=True, exist_ok=True)
    prepare(data / "scp_train.jsonl.gz", out, retriever_passages)
    settings = out / "settings.yaml"
    settings.write_text("memory_learning_rate: 5.0e-3\nconnector_learning_rate: 2.0e-4\nwarmup_steps: 10\n")
    run("train", "scp", out / "scp.jsonl", "--base", base, "--out", out / "scp",
        "--eval", data / "scp_dev.jsonl.gz", "--eval-samples", 24, "--eval-every", 40, "--steps", scp_steps,
        "--compression-rate", 8, "--lora-r", 8, "--lora-dropout", 0, "--connector", "--spread",
        "--batch-size", 8, "--learning-rate", 1e-3, "--reconstruction", 0.2, "--dtype", "float32",
        "--config", settings)  # fmt: skip
    run("compress", out / "passages.jsonl", "--model", out / "scp", "--out", out / "store")
    run("train", "retriever", out / "questions.jsonl", "--store", out / "store", "--model", out / "scp",
        "--out", out / "retriever", "--eval", out / "questions_dev.jsonl", "--eval-every", 15,
        "--steps", retriever_steps, "--batch-size", 32, "--learning-rate", 5e-4, "--dtype", "float32")  # fmt: skip
    from clara_fast import Clara

    model = Clara.from_pretrained(out / "retriever")
    # The generator has seen one document at a time, and the folder must not name a path of this machine.
    model.config.top_k = 1
    model.config.base_model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(out / "model")
    # The base model has the same tokenizer, without its added tokens: 3.5 MB that the repository need not hold.
    for file in (*(out / "model").glob("tokenizer*"), out / "model" / "chat_template.jinja"):
        file.unlink()


def prepare(scp_train: Path, out: Path, num_passages: int) -> None:
    """Short passages with several questions; of some of them, a corpus with questions for the retriever."""
    with gzip.open(scp_train, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if len(row["question"]) >= 2 and len(row["docs"][0].split()) <= MAX_WORDS]
    write(out / "scp.jsonl", rows)
    chosen = rows[:: max(1, len(rows) // num_passages)][:num_passages]
    write(out / "passages.jsonl", [{"id": row["id"], "text": row["docs"][0]} for row in chosen])
    asked = [{"question": row["question"][0], "gold_ids": [row["id"]]} for row in chosen[::10]]
    write(out / "questions_dev.jsonl", asked)
    asked = [
        {"question": question, "gold_ids": [row["id"]]}
        for i, row in enumerate(chosen)
        for question in row["question"][1 if i % 10 == 0 else 0 :]
    ]
    write(out / "questions.jsonl", asked)


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def run(*command: object) -> None:
    subprocess.run([Path(sys.executable).with_name("clara-fast"), *map(str, command)], check=True)


if __name__ == "__main__":
    typer.run(main)
