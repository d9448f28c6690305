"""``clara-fast train``: the training stages from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clara_fast.cli.train_config import shipped_configs
from clara_fast.cli.train_options import (
    AnswersOption,
    BatchSizeOption,
    CommonOptions,
    EvalSamplesOption,
    LearningRateOption,
    with_common_options,
)

app = typer.Typer(no_args_is_help=True, help="Train a model, stage by stage.")

Questions = Annotated[
    list[Path],
    typer.Argument(help='JSONL (may be gzipped) of {"question", "docs", "gold_answer" (or "answer"), "pos_index"}.'),
]

# What a model that is gone on from remembers.
OF_A_NEW_MODEL = {"doc_max_length", "lora_r", "lora_dropout", "connector", "bits", "spread"}
# How many training passages the connector takes its first statistics from.
CALIBRATION_PASSAGES = 64


@app.command("scp")
@with_common_options
def scp(
    common: CommonOptions,
    train: Annotated[list[Path], typer.Argument(help="JSONL files (may be gzipped) of passages with questions.")],
    base: Annotated[str | None, typer.Option(help="Base model to start from: hub name or folder.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Clara model to go on from, instead of --base; may be of another rate.")
    ] = None,
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
        int | None, typer.Option(help="Load the base in 8 or 4 bits; needs clara-fast\\[kbit]. The model remembers it.")
    ] = None,
    spread: Annotated[bool, typer.Option(help="Spread the memory tokens' positions over the text.")] = False,
    batch_size: BatchSizeOption = 8,
    learning_rate: LearningRateOption = 1e-4,
    reconstruction: Annotated[float, typer.Option(help="Share of passages to be written out instead.")] = 0.0,
) -> None:
    """Pretrain compressor and generator together (paper section 3.1): CE + 0.1 MSE.

    Evaluation prints the answer loss under four contexts: the passage's memory, another passage's, none, the full text.
    With --model, what describes a model (tokens read, LoRA, connector, bits, positions) is its own, but for the rate.
    """
    from transformers import set_seed

    from clara_fast.data import read_scp
    from clara_fast.modeling import Clara
    from clara_fast.training import ScpTrainer, ScpTrainingArguments, checkpoints

    if (base is None) == (model is None):
        raise ValueError("give exactly one of --base and --model")
    quantization = _quantization(bits)
    if model is not None and (foreign := sorted(OF_A_NEW_MODEL & common.given)):
        raise ValueError(f"{foreign[0]} goes with --base only: a model remembers its own")
    samples = [s for s in read_scp(train) if max_words is None or len(s.document.split()) <= max_words]
    if not samples:
        raise ValueError(f"max_words ({max_words}) leaves no passage to train on")
    held_out = common.held_out(read_scp, limit=eval_samples)
    arguments = common.arguments(
        ScpTrainingArguments,
        batch_size=batch_size,
        learning_rate=learning_rate,
        eval_answers=eval_answers,
        reconstruction=reconstruction,
    )
    if model is not None:
        clara = Clara.from_pretrained(
            model, base_model=common.base_model, dtype=common.dtype, compression_rate=compression_rate
        )
    else:
        set_seed(common.seed)  # the fresh adapters are the same in every process, and when a run starts again
        clara = Clara.from_base(
            str(base),
            doc_max_length=doc_max_length,
            compression_rate=16 if compression_rate is None else compression_rate,
            lora={"r": lora_r, "alpha": 2 * lora_r, "dropout": lora_dropout},
            dtype=common.dtype,
            quantization_config=quantization,
            connector=connector,
            memory_positions="spread" if spread else "after",
        )
        if connector and checkpoints.last_checkpoint(common.out) is None:
            clara.calibrate_connector([s.document for s in samples[:CALIBRATION_PASSAGES]])
    trainer = ScpTrainer(clara, arguments, samples, held_out)
    common.run(trainer, f"clara-fast compress CORPUS --model {common.out} --out STORE")


@app.command("instruct")
@with_common_options
def instruct(
    common: CommonOptions,
    train: Questions,
    model: Annotated[str, typer.Option(help="Clara model that was pretrained (train scp).")],
    eval_samples: EvalSamplesOption = 64,
    eval_answers: AnswersOption = 0,
    documents: Annotated[int, typer.Option(help="Documents read per question, at most; known positives first.")] = 5,
    keep_generator: Annotated[bool, typer.Option(help="Go on with the model's generator, not with a new one.")] = False,
    batch_size: BatchSizeOption = 8,
    learning_rate: LearningRateOption = 1e-4,
) -> None:
    """Tune compressor and a new generator on questions over several documents (paper: instruction tuning).

    Evaluation prints the answer loss under four contexts: the documents' memories, another question's, none, the full
    text.
    """
    from clara_fast.data import read_multidoc
    from clara_fast.modeling import Clara
    from clara_fast.training import InstructionTrainer, InstructionTrainingArguments

    samples = read_multidoc(train)
    held_out = common.held_out(read_multidoc, limit=eval_samples)
    arguments = common.arguments(
        InstructionTrainingArguments,
        batch_size=batch_size,
        learning_rate=learning_rate,
        eval_answers=eval_answers,
        num_documents=documents,
        fresh_generator=not keep_generator,
    )
    clara = Clara.from_pretrained(model, base_model=common.base_model, dtype=common.dtype)
    trainer = InstructionTrainer(clara, arguments, samples, held_out)
    common.run(trainer, f"clara-fast compress QUESTIONS --text-field docs --model {common.out} --out STORE")


@app.command("joint")
@with_common_options
def joint(
    common: CommonOptions,
    train: Questions,
    model: Annotated[str, typer.Option(help="Clara model; gets a query reasoner if it has none.")],
    store: Annotated[
        Path | None,
        typer.Option(help="Store of the documents, written by the model; without, they are compressed at every step."),
    ] = None,
    eval_samples: EvalSamplesOption = 64,
    eval_answers: AnswersOption = 0,
    candidates: Annotated[
        str, typer.Option(help="'data': each question's own documents; 'search': the nearest in the store.")
    ] = "data",
    num_candidates: Annotated[int, typer.Option(help="Documents to select from, at most.")] = 20,
    search_every: Annotated[int, typer.Option(help="Steps between searches.")] = 100,
    top_k: Annotated[int | None, typer.Option(help="Documents selected; default the model's top_k.")] = None,
    batch_size: BatchSizeOption = 4,
    learning_rate: LearningRateOption = 5e-6,
) -> None:
    """Train query reasoner and generator together on the loss of the answer alone (paper section 3.2).

    The store is made from the same questions by: clara-fast compress QUESTIONS --text-field docs.
    Evaluation prints Recall@1, Recall@5, MRR@10 and the answer loss under four contexts.
    """
    from clara_fast.data import read_multidoc
    from clara_fast.modeling import Clara
    from clara_fast.store import MemoryStore
    from clara_fast.training import JointTrainer, JointTrainingArguments

    own = candidates != "search"
    samples = read_multidoc(train, need_documents=own)
    held_out = common.held_out(read_multidoc, need_documents=own, limit=eval_samples)
    arguments = common.arguments(
        JointTrainingArguments,
        batch_size=batch_size,
        learning_rate=learning_rate,
        eval_answers=eval_answers,
        candidates=candidates,
        num_candidates=num_candidates,
        search_every=search_every,
        top_k=top_k,
    )
    clara = Clara.from_pretrained(model, base_model=common.base_model, dtype=common.dtype)
    memories = MemoryStore.open(store, clara) if store is not None else None
    trainer = JointTrainer(clara, arguments, samples, held_out, store=memories)
    common.run(trainer, f'clara-fast ask {store or "STORE"} "QUESTION" --model {common.out}')


@app.command("retriever")
@with_common_options
def retriever(
    common: CommonOptions,
    train: Annotated[Path, typer.Argument(help='JSONL (may be gzipped) of {"question", "gold_ids"}.')],
    store: Annotated[Path, typer.Option(help="Store of the documents, written by the model.")],
    model: Annotated[str, typer.Option(help="Clara model; gets a query reasoner if it has none.")],
    negatives: Annotated[int, typer.Option(help="Documents drawn from the store against each batch.")] = 1024,
    batch_size: BatchSizeOption = 32,
    learning_rate: LearningRateOption = 1e-4,
) -> None:
    """Train the query reasoner on known question-document pairs (InfoNCE): the supervised variant of retrieval.

    Evaluation reports Recall@1, Recall@5 and MRR@10 over the whole store.
    """
    from clara_fast.modeling import Clara
    from clara_fast.store import MemoryStore
    from clara_fast.training import RetrieverTrainer, RetrieverTrainingArguments, read_questions

    clara = Clara.from_pretrained(model, base_model=common.base_model, dtype=common.dtype)
    memories = MemoryStore.open(store, clara)
    questions = read_questions(train, memories)
    held_out = common.held_out(read_questions, memories)
    arguments = common.arguments(
        RetrieverTrainingArguments, batch_size=batch_size, learning_rate=learning_rate, negatives=negatives
    )
    trainer = RetrieverTrainer(clara, memories, arguments, questions, held_out)
    common.run(trainer, f'clara-fast ask {store} "QUESTION" --model {common.out}')


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
