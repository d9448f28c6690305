"""``clara-fast train``: the training stages from the command line."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from clara_fast.cli.models import BaseModelOption, JsonOption
from clara_fast.cli.output import note, print_json
from clara_fast.cli.train_config import ConfigOption, arguments_of, make_arguments, shipped_configs

app = typer.Typer(no_args_is_help=True, help="Train a model, stage by stage.")

Questions = Annotated[
    list[Path], typer.Argument(help='JSONL (may be gzipped) of {"question", "docs", "gold_answer", "pos_index"}.')
]
OutOption = Annotated[Path, typer.Option(help="Folder for the model and its checkpoints; an unfinished run resumes.")]
EvalOption = Annotated[Path | None, typer.Option("--eval", help="Held-out samples, the same format.")]
EvalSamplesOption = Annotated[int, typer.Option(help="Held-out samples to evaluate on.")]
StepsOption = Annotated[int, typer.Option(help="Optimizer steps; -1: as many as --epochs makes.")]
EpochsOption = Annotated[float, typer.Option(help="Passes over the data, if --steps is not given.")]
AccumulateOption = Annotated[int, typer.Option(help="Batches per optimizer step.")]
EvalEveryOption = Annotated[int, typer.Option(help="Steps between evaluations and checkpoints.")]
DtypeOption = Annotated[str, typer.Option(help="Of the base model: auto, float32, bfloat16, float16.")]
SeedOption = Annotated[int, typer.Option(help="Of order, dropout and targets.")]
AnswersOption = Annotated[
    int, typer.Option(help="Held-out questions to answer at each evaluation, for EM, F1 and cover match (slow).")
]
ReportOption = Annotated[
    str, typer.Option(help="Where the log goes too: tensorboard, wandb, ... (comma-separated, as transformers has it).")
]

# How many training passages the connector takes its first statistics from.
CALIBRATION_PASSAGES = 64


@app.command("scp")
def scp(
    context: typer.Context,
    train: Annotated[list[Path], typer.Argument(help="JSONL files (may be gzipped) of passages with questions.")],
    out: OutOption,
    base: Annotated[str | None, typer.Option(help="Base model to start from: hub name or folder.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Clara model to go on from, instead of --base; may be of another rate.")
    ] = None,
    base_model: BaseModelOption = None,
    eval_file: EvalOption = None,
    eval_samples: EvalSamplesOption = 64,
    eval_answers: AnswersOption = 0,
    max_words: Annotated[int | None, typer.Option(help="Leave out passages with more words.")] = None,
    doc_max_length: Annotated[int, typer.Option(help="Tokens read of each document.")] = 256,
    compression_rate: Annotated[
        int | None, typer.Option(help="Document tokens per memory token; default the model's, 16 for a new one.")
    ] = None,
    lora_r: Annotated[int, typer.Option(help="Rank of each role's LoRA.")] = 16,
    lora_dropout: Annotated[float, typer.Option(help="Dropout of the adapters in training.")] = 0.1,
    connector: Annotated[bool, typer.Option(help="Train a linear map from hidden states to embeddings.")] = False,
    bits: Annotated[
        int | None, typer.Option(help="Load the base in 8 or 4 bits; needs clara-fast[kbit]. The model remembers it.")
    ] = None,
    spread: Annotated[bool, typer.Option(help="Spread the memory tokens' positions over the text.")] = False,
    steps: StepsOption = -1,
    epochs: EpochsOption = 1.0,
    batch_size: Annotated[int, typer.Option(help="Passages in a batch.")] = 8,
    accumulate: AccumulateOption = 1,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the adapters.")] = 1e-4,
    reconstruction: Annotated[float, typer.Option(help="Share of passages to be written out instead.")] = 0.0,
    eval_every: EvalEveryOption = 100,
    report_to: ReportOption = "none",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Pretrain compressor and generator together (paper section 3.1): CE + 0.1 MSE.

    Evaluation prints the answer loss under four contexts: the passage's memory, another passage's, none, the full text.
    """
    from transformers import set_seed

    from clara_fast.data import read_scp
    from clara_fast.modeling import Clara
    from clara_fast.training import ScpTrainer, ScpTrainingArguments, checkpoints

    if (base is None) == (model is None):
        raise ValueError("give exactly one of --base and --model")
    samples = [s for s in read_scp(train) if max_words is None or len(s.document.split()) <= max_words]
    if not samples:
        raise ValueError(f"max_words ({max_words}) leaves no passage to train on")
    held_out = read_scp(eval_file, limit=eval_samples) if eval_file is not None else None
    if model is not None:
        clara = Clara.from_pretrained(model, base_model=base_model, dtype=dtype, compression_rate=compression_rate)
    else:
        set_seed(seed)  # the fresh adapters are the same in every process, and when a run starts again
        clara = Clara.from_base(
            str(base),
            doc_max_length=doc_max_length,
            compression_rate=compression_rate or 16,
            lora={"r": lora_r, "alpha": 2 * lora_r, "dropout": lora_dropout},
            dtype=dtype,
            quantization_config=_quantization(bits),
            connector=connector,
            memory_positions="spread" if spread else "after",
        )
        if connector and checkpoints.last_checkpoint(out) is None:
            clara.calibrate_connector([s.document for s in samples[:CALIBRATION_PASSAGES]])
    settings = {
        **_common(
            out, steps, epochs, batch_size, learning_rate, eval_every, report_to, seed, evaluate=held_out is not None
        ),
        "eval_answers": eval_answers,
        "gradient_accumulation_steps": accumulate,
        "reconstruction": reconstruction,
        **arguments_of(context),
    }
    arguments = make_arguments(ScpTrainingArguments, settings, config)
    trainer = ScpTrainer(clara, arguments, samples, held_out)
    _run(trainer, out, json, f"clara-fast compress CORPUS --model {out} --out STORE")


@app.command("retriever")
def retriever(
    context: typer.Context,
    train: Annotated[Path, typer.Argument(help='JSONL (may be gzipped) of {"question", "gold_ids"}.')],
    store: Annotated[Path, typer.Option(help="Store of the documents, written by the model.")],
    model: Annotated[str, typer.Option(help="Clara model; gets a query reasoner if it has none.")],
    out: OutOption,
    base_model: BaseModelOption = None,
    eval_file: Annotated[Path | None, typer.Option("--eval", help="Held-out questions on the same store.")] = None,
    steps: StepsOption = -1,
    epochs: EpochsOption = 1.0,
    batch_size: Annotated[int, typer.Option(help="Questions in a batch.")] = 32,
    negatives: Annotated[int, typer.Option(help="Documents drawn from the store against each batch.")] = 1024,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the query reasoner.")] = 1e-4,
    eval_every: EvalEveryOption = 100,
    report_to: ReportOption = "none",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Train the query reasoner on known question-document pairs (InfoNCE): the supervised variant of retrieval.

    Evaluation reports Recall@1, Recall@5 and MRR@10 over the whole store.
    """
    from clara_fast.modeling import Clara
    from clara_fast.store import MemoryStore
    from clara_fast.training import RetrieverTrainer, RetrieverTrainingArguments, read_questions

    clara = Clara.from_pretrained(model, base_model=base_model, dtype=dtype)
    memories = MemoryStore.open(store, clara)
    questions = read_questions(train, memories)
    held_out = read_questions(eval_file, memories) if eval_file is not None else None
    settings = {
        **_common(
            out, steps, epochs, batch_size, learning_rate, eval_every, report_to, seed, evaluate=held_out is not None
        ),
        "negatives": negatives,
        **arguments_of(context),
    }
    arguments = make_arguments(RetrieverTrainingArguments, settings, config)
    trainer = RetrieverTrainer(clara, memories, arguments, questions, held_out)
    _run(trainer, out, json, f'clara-fast ask {store} "QUESTION" --model {out}')


@app.command("instruct")
def instruct(
    context: typer.Context,
    train: Questions,
    model: Annotated[str, typer.Option(help="Clara model that was pretrained (train scp).")],
    out: OutOption,
    base_model: BaseModelOption = None,
    eval_file: EvalOption = None,
    eval_samples: EvalSamplesOption = 64,
    eval_answers: AnswersOption = 0,
    documents: Annotated[int, typer.Option(help="Documents read per question, at most; known positives first.")] = 5,
    keep_generator: Annotated[bool, typer.Option(help="Go on with the model's generator, not with a new one.")] = False,
    steps: StepsOption = -1,
    epochs: EpochsOption = 1.0,
    batch_size: Annotated[int, typer.Option(help="Questions in a batch.")] = 8,
    accumulate: AccumulateOption = 1,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of compressor and generator.")] = 1e-4,
    eval_every: EvalEveryOption = 100,
    report_to: ReportOption = "none",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Tune compressor and a new generator on questions over several documents (paper: instruction tuning).

    Evaluation prints the answer loss under four contexts: the documents' memories, another question's, none, the full
    text.
    """
    from clara_fast.data import read_multidoc
    from clara_fast.modeling import Clara
    from clara_fast.training import InstructionTrainer, InstructionTrainingArguments

    samples = read_multidoc(train)
    held_out = read_multidoc(eval_file, limit=eval_samples) if eval_file is not None else None
    settings = {
        **_common(
            out, steps, epochs, batch_size, learning_rate, eval_every, report_to, seed, evaluate=held_out is not None
        ),
        "eval_answers": eval_answers,
        "gradient_accumulation_steps": accumulate,
        "num_documents": documents,
        "fresh_generator": not keep_generator,
        **arguments_of(context),
    }
    arguments = make_arguments(InstructionTrainingArguments, settings, config)
    clara = Clara.from_pretrained(model, base_model=base_model, dtype=dtype)
    trainer = InstructionTrainer(clara, arguments, samples, held_out)
    _run(trainer, out, json, f"clara-fast compress QUESTIONS --text-field docs --model {out} --out STORE")


@app.command("joint")
def joint(
    context: typer.Context,
    train: Questions,
    model: Annotated[str, typer.Option(help="Clara model; gets a query reasoner if it has none.")],
    out: OutOption,
    base_model: BaseModelOption = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Store of the documents, written by the model; without, they are compressed at every step."),
    ] = None,
    eval_file: EvalOption = None,
    eval_samples: EvalSamplesOption = 64,
    eval_answers: AnswersOption = 0,
    candidates: Annotated[
        str, typer.Option(help="'data': each question's own documents; 'search': the nearest in the store.")
    ] = "data",
    num_candidates: Annotated[int, typer.Option(help="Documents to select from, at most.")] = 20,
    search_every: Annotated[int, typer.Option(help="Steps between searches.")] = 100,
    top_k: Annotated[int | None, typer.Option(help="Documents selected; default the model's top_k.")] = None,
    steps: StepsOption = -1,
    epochs: EpochsOption = 1.0,
    batch_size: Annotated[int, typer.Option(help="Questions in a batch.")] = 4,
    accumulate: AccumulateOption = 1,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of query reasoner and generator.")] = 5e-6,
    eval_every: EvalEveryOption = 100,
    report_to: ReportOption = "none",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Train query reasoner and generator together on the loss of the answer alone (paper section 3.2).

    The store is made from the same questions by: clara-fast compress QUESTIONS --text-field docs.
    Evaluation prints Recall@1 and the answer loss under four contexts.
    """
    from clara_fast.data import read_multidoc
    from clara_fast.modeling import Clara
    from clara_fast.store import MemoryStore
    from clara_fast.training import JointTrainer, JointTrainingArguments

    own = candidates != "search"
    samples = read_multidoc(train, need_documents=own)
    held_out = read_multidoc(eval_file, need_documents=own, limit=eval_samples) if eval_file is not None else None
    settings = {
        **_common(
            out, steps, epochs, batch_size, learning_rate, eval_every, report_to, seed, evaluate=held_out is not None
        ),
        "eval_answers": eval_answers,
        "gradient_accumulation_steps": accumulate,
        "candidates": candidates,
        "num_candidates": num_candidates,
        "search_every": search_every,
        "top_k": top_k,
        **arguments_of(context),
    }
    arguments = make_arguments(JointTrainingArguments, settings, config)
    clara = Clara.from_pretrained(model, base_model=base_model, dtype=dtype)
    memories = MemoryStore.open(store, clara) if store is not None else None
    trainer = JointTrainer(clara, arguments, samples, held_out, store=memories)
    _run(trainer, out, json, f'clara-fast ask {store or "STORE"} "QUESTION" --model {out}')


@app.command("configs")
def configs() -> None:
    """List the configurations that come along; each is a file to copy from."""
    for name, file in shipped_configs().items():
        print(f"{name:24} {file}")


def _quantization(bits: int | None) -> dict[str, Any] | None:
    if bits not in (None, 4, 8):
        raise ValueError(f"bits ({bits}) must be 4 or 8")
    settings: dict[int | None, dict[str, Any]] = {
        4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        8: {"load_in_8bit": True},
    }
    return settings.get(bits)


def _common(
    out: Path,
    steps: int,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    eval_every: int,
    report_to: str,
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
        "report_to": _reports(report_to),
        "seed": seed,
    }


def _reports(names: str) -> list[str]:
    """The names in a list; raises ``ValueError`` or ``ImportError`` for one that transformers could not report to."""
    from transformers import integrations

    wanted = [name for name in names.replace(" ", "").split(",") if name not in ("", "none")]
    known = integrations.integration_utils.INTEGRATION_TO_CALLBACK
    for name in wanted:
        if name not in known:
            raise ValueError(f"report_to ({name}) must be none or some of {', '.join(sorted(known))}")
        if name not in integrations.get_available_reporting_integrations():
            extra = name if name in ("tensorboard", "wandb") else None
            how = f"clara-fast[{extra}]" if extra else name
            raise ImportError(f"report_to ({name}) needs a package that is not installed: pip install {how}")
    return wanted or ["none"]


def _run(trainer: Any, out: Path, json: bool, then: str) -> None:
    """Train, going on from the last checkpoint in ``out`` if there is one, and save the model there."""
    from clara_fast.training.checkpoints import last_checkpoint

    last = last_checkpoint(out)
    # The Trainer logs to stdout, which is for results.
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    first = trainer.is_world_process_zero()
    trainer.model.save_pretrained(out, is_main_process=first)
    if not first:
        return
    if json:
        print_json({"model": str(out), "steps": trainer.state.global_step, "log": trainer.state.log_history})
    note(f"saved to {out}; next: {then}")
