"""Training on transformers' Trainer: data, collation, the stages."""

from clara_fast.training.data import ScpSample, read_scp
from clara_fast.training.instruction import InstructionTrainer, InstructionTrainingArguments
from clara_fast.training.joint import JointTrainer, JointTrainingArguments
from clara_fast.training.questions import QuestionSample, read_multidoc
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
    "QuestionSample",
    "RetrieverSample",
    "RetrieverTrainer",
    "RetrieverTrainingArguments",
    "ScpSample",
    "ScpTrainer",
    "ScpTrainingArguments",
    "read_multidoc",
    "read_questions",
    "read_scp",
]
