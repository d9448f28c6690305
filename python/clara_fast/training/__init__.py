"""Training on transformers' Trainer: data, collation, the stages."""

from clara_fast.training.data import ScpSample, read_scp
from clara_fast.training.retriever import (
    RetrieverSample,
    RetrieverTrainer,
    RetrieverTrainingArguments,
    read_questions,
)
from clara_fast.training.scp import ScpTrainer, ScpTrainingArguments

__all__ = [
    "RetrieverSample",
    "RetrieverTrainer",
    "RetrieverTrainingArguments",
    "ScpSample",
    "ScpTrainer",
    "ScpTrainingArguments",
    "read_questions",
    "read_scp",
]
