"""Training on transformers' Trainer: collation, the stages."""

from clara_fast.training.instruction import InstructionTrainer, InstructionTrainingArguments
from clara_fast.training.joint import JointTrainer, JointTrainingArguments
from clara_fast.training.retriever import (
    RetrieverSample,
    RetrieverTrainer,
    RetrieverTrainingArguments,
    read_questions,
)
from clara_fast.training.scp import ScpTrainer, ScpTrainingArguments
from clara_fast.training.trainer import NonFiniteError

__all__ = [
    "InstructionTrainer",
    "InstructionTrainingArguments",
    "JointTrainer",
    "JointTrainingArguments",
    "NonFiniteError",
    "RetrieverSample",
    "RetrieverTrainer",
    "RetrieverTrainingArguments",
    "ScpTrainer",
    "ScpTrainingArguments",
    "read_questions",
]
