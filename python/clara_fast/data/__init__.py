"""Samples for training and evaluation, in the reference's JSONL formats."""

from clara_fast.data.questions import QuestionSample, read_multidoc
from clara_fast.data.scp import ScpSample, read_scp

__all__ = ["QuestionSample", "ScpSample", "read_multidoc", "read_scp"]
