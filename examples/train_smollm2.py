"""All three stages on SmolLM2-135M, from nothing: the model of `make demo`, at several compression rates.

    python examples/train_smollm2.py --base FOLDER --data ../shared/data --out runs/smollm2

Every step is a command of clara-fast in a folder of its own. What was done is skipped, what was stopped resumes:

1. `scp-8`: compressor and generator learn together at rate 8, on short passages with several questions each;
2. `scp-R` for each rate: the same from there at that rate, so that the first steps are paid for once;
3. `instruct-R`: questions over several documents;
4. `store-R`, `joint-R`: query reasoner and generator by the loss on the answer, from stored memories;
5. `retriever-R`: the query reasoner on questions about short passages, to search a whole corpus (InfoNCE);
6. `model-R`: the adapters alone, in bfloat16.

With `--scale 1` all of it takes some hours of one CPU core and shows the way, not the method: the paper trains on
a thousand times as much. `--scale 20` is what the first experiments suggest, for a GPU.
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FIRST_RATE = 8
MAX_WORDS = 105
DOCUMENTS = 3
CANDIDATES = 10
PASSAGES = 450


def main(
    base: Annotated[Path, typer.Option(help="SmolLM2-135M-Instruct; make demo leaves it in its cache.")],
    data: Annotated[Path, typer.Option(help="Folder with scp_*.jsonl.gz and multidoc_*.jsonl.gz.")],
    out: Annotated[Path, typer.Option(help="Folder for everything that is made.")],
    rates: Annotated[str, typer.Option(help="Compression rates, with commas.")] = "4,16",
    scale: Annotated[float, typer.Option(help="Times as many steps and questions.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Of the base model; float32 where bfloat16 is slow.")] = "bfloat16",
) -> None:
    """Train a model per rate."""

    def times(count: int) -> int:
        return round(count * scale)

    out.mkdir(parents=True, exist_ok=True)
    passages, questions, corpus = prepare(data, out, times(320))
    settings = out / "settings.yaml"
    settings.write_text("memory_learning_rate: 5.0e-3\nconnector_learning_rate: 2.0e-4\nwarmup_steps: 10\n")
    scp = ["--eval", data / "scp_dev.jsonl.gz", "--eval-samples", 16, "--eval-every", 60, "--batch-size", 8,
           "--reconstruction", 0.25, "--config", settings, "--dtype", dtype]  # fmt: skip
    stage(out / f"scp-{FIRST_RATE}", "scp", passages, "--base", base, "--compression-rate", FIRST_RATE,
          "--lora-r", 8, "--lora-dropout", 0, "--connector", "--spread",
          "--steps", times(360), "--learning-rate", 1e-3, "--seed", 0, *scp)  # fmt: skip
    for rate in (int(rate) for rate in rates.split(",")):
        stage(out / f"scp-{rate}", "scp", passages, "--model", out / f"scp-{FIRST_RATE}", "--base-model", base,
              "--compression-rate", rate, "--steps", times(240), "--learning-rate", 6e-4,
              "--seed", rate, *scp)  # fmt: skip
        held = ["--base-model", base, "--eval", data / "multidoc_dev_nq.jsonl.gz", "--dtype", dtype]
        stage(out / f"instruct-{rate}", "instruct", questions, "--model", out / f"scp-{rate}", *held,
              "--steps", times(80), "--batch-size", 4, "--documents", DOCUMENTS, "--keep-generator",
              "--learning-rate", 3e-4, "--eval-samples", 24, "--eval-every", 40)  # fmt: skip
        store = out / f"store-{rate}"
        run("compress", corpus, "--text-field", "docs", "--model", out / f"instruct-{rate}", "--dtype", dtype,
            "--out", store)  # fmt: skip
        stage(out / f"joint-{rate}", "joint", corpus, "--model", out / f"instruct-{rate}", "--base-model", base,
              "--store", store, "--top-k", DOCUMENTS, "--num-candidates", CANDIDATES,
              "--epochs", 2, "--batch-size", 8, "--learning-rate", 2e-4, "--dtype", dtype)  # fmt: skip
        retriever(out, rate, base, times(72), dtype)
        export(out / f"retriever-{rate}", out / f"model-{rate}")


def retriever(out: Path, rate: int, base: Path, steps: int, dtype: str) -> None:
    """Some of the passages as a corpus, the first question of every tenth held out."""
    rows = [json.loads(line) for line in (out / "passages.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = rows[:: max(1, len(rows) // PASSAGES)][:PASSAGES]
    corpus = write(out / "corpus.jsonl", [{"id": row["id"], "text": row["docs"][0]} for row in rows])
    asked = [(question, row["id"], i) for row in rows for i, question in enumerate(row["question"])]
    held = {(row["id"], 0) for row in rows[::10]}
    files = [
        write(out / name, [{"question": q, "gold_ids": [id_]} for q, id_, i in asked if ((id_, i) in held) == wanted])
        for name, wanted in (("corpus_train.jsonl", False), ("corpus_dev.jsonl", True))
    ]
    model, store = out / f"joint-{rate}", out / f"corpus-{rate}"
    run("compress", corpus, "--model", model, "--base-model", base, "--dtype", dtype, "--out", store)
    stage(out / f"retriever-{rate}", "retriever", files[0], "--eval", files[1], "--eval-every", 15, "--store", store,
          "--model", model, "--base-model", base, "--steps", steps, "--batch-size", 32, "--learning-rate", 5e-4,
          "--dtype", dtype)  # fmt: skip


def prepare(data: Path, out: Path, count: int) -> tuple[Path, Path, Path]:
    """Files of short passages with several questions, of questions with documents, and of those for joint training."""
    rows = read(data / "scp_train.jsonl.gz")
    passages = [row for row in rows if len(row["question"]) >= 2 and len(row["docs"][0].split()) <= MAX_WORDS]
    asked = read(data / "multidoc_train_nq.jsonl.gz")
    random.Random(0).shuffle(asked)
    return (
        write(out / "passages.jsonl", passages),
        write(out / "questions.jsonl", asked),
        write(out / "joint.jsonl", [fewer_documents(row) for row in asked[:count]]),
    )


def fewer_documents(row: dict) -> dict:
    """The question with ``CANDIDATES`` of its documents, the positive ones among them."""
    gold = row["pos_index"]
    kept = sorted([*gold, *[i for i in range(len(row["docs"])) if i not in gold][: CANDIDATES - len(gold)]])
    return {**row, "docs": [row["docs"][i] for i in kept], "pos_index": [kept.index(i) for i in gold]}


def export(trained: Path, model: Path) -> None:
    """The adapters in bfloat16, without a path of this machine and without what the base model brings."""
    if (model / "config.json").is_file():
        return
    from clara_fast import Clara

    clara = Clara.from_pretrained(trained)
    clara.config.top_k = 1  # the demo's questions are about one passage each
    clara.config.base_model = HUB_NAME
    clara.save_pretrained(model)
    for file in (*model.glob("tokenizer*"), model / "chat_template.jinja"):
        file.unlink(missing_ok=True)


def stage(folder: Path, name: str, *options: object) -> None:
    """``clara-fast train NAME``, unless ``folder`` holds its finished model."""
    if not (folder / "config.json").is_file():
        run("train", name, *options, "--out", folder)


def run(*command: object) -> None:
    subprocess.run([Path(sys.executable).with_name("clara-fast"), *map(str, command)], check=True)


def read(file: Path) -> list[dict]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


if __name__ == "__main__":
    typer.run(main)
