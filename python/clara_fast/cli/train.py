"""``clara-fast train``: the training stages from the command line."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from clara_fast.cli.models import JsonOption
from clara_fast.cli.output import note, print_json

app = typer.Typer(no_args_is_help=True, help="Train a model, stage by stage.")

# How many training passages the connector takes its first statistics from.
CALIBRATION_PASSAGES = 64


@app.command("scp")
def scp(
    train: Annotated[list[Path], typer.Argument(help="JSONL files (may be gzipped) of passages with questions.")],
    out: Annotated[Path, typer.Option(help="Folder for the model and its checkpoints; an unfinished run resumes.")],
    base: Annotated[str | None, typer.Option(help="Base model to start from: hub name or folder.")] = None,
    model: Annotated[str | None, typer.Option(help="Clara model to go on from, instead of --base.")] = None,
    eval_file: Annotated[Path | None, typer.Option("--eval", help="Held-out samples, the same format.")] = None,
    eval_samples: Annotated[int, typer.Option(help="Held-out passages to evaluate on.")] = 64,
    max_words: Annotated[int | None, typer.Option(help="Leave out passages with more words.")] = None,
    doc_max_length: Annotated[int, typer.Option(help="Tokens read of each document.")] = 256,
    compression_rate: Annotated[int, typer.Option(help="Document tokens per memory token.")] = 16,
    lora_r: Annotated[int, typer.Option(help="Rank of each role's LoRA.")] = 16,
    lora_dropout: Annotated[float, typer.Option(help="Dropout of the adapters in training.")] = 0.1,
    connector: Annotated[bool, typer.Option(help="Train a linear map from hidden states to embeddings.")] = False,
    spread: Annotated[bool, typer.Option(help="Spread the memory tokens' positions over the text.")] = False,
    steps: Annotated[int, typer.Option(help="Optimizer steps; -1: as many as --epochs makes.")] = -1,
    epochs: Annotated[float, typer.Option(help="Passes over the data, if --steps is not given.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Passages in a batch.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the adapters.")] = 1e-4,
    reconstruction: Annotated[float, typer.Option(help="Share of passages to be written out instead.")] = 0.0,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations and checkpoints.")] = 100,
    dtype: Annotated[str, typer.Option(help="Of the base model: auto, float32, bfloat16, float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of order, dropout and targets.")] = 0,
    config: Annotated[
        Path | None, typer.Option(help="YAML of further training arguments, as transformers names them.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Pretrain compressor and generator together (paper section 3.1): CE + 0.1 MSE.

    Evaluation prints the answer loss under four contexts: the passage's memory, another passage's, none, the full text.
    """
    from clara_fast.modeling import Clara
    from clara_fast.training import ScpTrainer, ScpTrainingArguments, read_scp

    if (base is None) == (model is None):
        raise ValueError("give exactly one of --base and --model")
    samples = [s for s in read_scp(train) if max_words is None or len(s.document.split()) <= max_words]
    if not samples:
        raise ValueError(f"max_words ({max_words}) leaves no passage to train on")
    held_out = read_scp(eval_file, limit=eval_samples) if eval_file is not None else None
    if model is not None:
        clara = Clara.from_pretrained(model, dtype=dtype)
    else:
        clara = Clara.from_base(
            str(base),
            doc_max_length=doc_max_length,
            compression_rate=compression_rate,
            lora={"r": lora_r, "alpha": 2 * lora_r, "dropout": lora_dropout},
            dtype=dtype,
            connector=connector,
            memory_positions="spread" if spread else "after",
        )
        if connector and _last_checkpoint(out) is None:
            clara.calibrate_connector([s.document for s in samples[:CALIBRATION_PASSAGES]])
    settings = {
        **_common(out, steps, epochs, batch_size, learning_rate, eval_every, seed, evaluate=held_out is not None),
        "gradient_accumulation_steps": accumulate,
        "reconstruction": reconstruction,
        **_yaml(config),
    }
    _run(ScpTrainer(clara, ScpTrainingArguments(**settings), samples, held_out), out, json)
    note(f"saved to {out}; next: clara-fast compress CORPUS --model {out} --out STORE")


@app.command("retriever")
def retriever(
    train: Annotated[Path, typer.Argument(help='JSONL (may be gzipped) of {"question", "gold_ids"}.')],
    store: Annotated[Path, typer.Option(help="Store of the documents, written by the model.")],
    model: Annotated[str, typer.Option(help="Clara model; gets a query reasoner if it has none.")],
    out: Annotated[Path, typer.Option(help="Folder for the model and its checkpoints; an unfinished run resumes.")],
    eval_file: Annotated[Path | None, typer.Option("--eval", help="Held-out questions on the same store.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps; -1: as many as --epochs makes.")] = -1,
    epochs: Annotated[float, typer.Option(help="Passes over the data, if --steps is not given.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Questions in a batch.")] = 32,
    negatives: Annotated[int, typer.Option(help="Documents drawn from the store against each batch.")] = 1024,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the query reasoner.")] = 1e-4,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations and checkpoints.")] = 100,
    dtype: Annotated[str, typer.Option(help="Of the base model: auto, float32, bfloat16, float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the order and the dropout.")] = 0,
    config: Annotated[
        Path | None, typer.Option(help="YAML of further training arguments, as transformers names them.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Train the query reasoner on known question-document pairs (InfoNCE): the supervised variant of retrieval.

    Evaluation reports Recall@1, Recall@5 and MRR@10 over the whole store.
    """
    from clara_fast.modeling import Clara
    from clara_fast.store import MemoryStore
    from clara_fast.training import RetrieverTrainer, RetrieverTrainingArguments, read_questions

    clara = Clara.from_pretrained(model, dtype=dtype)
    memories = MemoryStore.open(store, clara)
    questions = read_questions(train, memories)
    held_out = read_questions(eval_file, memories) if eval_file is not None else None
    settings = {
        **_common(out, steps, epochs, batch_size, learning_rate, eval_every, seed, evaluate=held_out is not None),
        "negatives": negatives,
        **_yaml(config),
    }
    arguments = RetrieverTrainingArguments(**settings)
    _run(RetrieverTrainer(clara, memories, arguments, questions, held_out), out, json)
    note(f'saved to {out}; next: clara-fast ask {store} "QUESTION" --model {out}')


def _common(
    out: Path,
    steps: int,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    eval_every: int,
    seed: int,
    *,
    evaluate: bool,
) -> dict[str, Any]:
    """What every stage's command says to transformers."""
    return {
        "output_dir": str(out),
        "max_steps": steps,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "learning_rate": learning_rate,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_on_start": evaluate,
        "eval_steps": eval_every,
        "save_steps": eval_every,
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": "none",
        "seed": seed,
    }


def _run(trainer: Any, out: Path, json: bool) -> None:
    """Train, going on from the last checkpoint in ``out`` if there is one, and save the model there."""
    # The Trainer logs to stdout, which is for results.
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train(resume_from_checkpoint=_last_checkpoint(out))
    trainer.model.save_pretrained(out)
    if json:
        print_json({"model": str(out), "steps": trainer.state.global_step, "log": trainer.state.log_history})


def _last_checkpoint(out: Path) -> str | None:
    """The latest checkpoint that is whole: the Trainer writes its state file last, and a kill may come before."""
    whole = [file.parent for file in out.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]))) if whole else None


def _yaml(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    import yaml

    content = yaml.safe_load(file.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a mapping of training arguments")
    return content
