"""Training on transformers' Trainer: data, collation, the stages."""

from clara_fast.training.data import ScpSample, read_scp
from clara_fast.training.scp import ScpTrainer, ScpTrainingArguments

__all__ = ["ScpSample", "ScpTrainer", "ScpTrainingArguments", "read_scp"]
