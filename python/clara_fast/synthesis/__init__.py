"""Training data from an instruction-tuned model behind any OpenAI-compatible server: nothing in it is unverified."""

from clara_fast.synthesis.client import Client, Endpoint
from clara_fast.synthesis.items import Item, Items, passages_of, question_of
from clara_fast.synthesis.problems import BadEndpoint, ServerGone
from clara_fast.synthesis.prompts import Prompts, copy_prompts
from clara_fast.synthesis.report import Prices, plot
from clara_fast.synthesis.run import Places, Run
from clara_fast.synthesis.scp import ScpTask
from clara_fast.synthesis.teacher import TeacherTask

__all__ = [
    "BadEndpoint",
    "Client",
    "Endpoint",
    "Item",
    "Items",
    "Places",
    "Prices",
    "Prompts",
    "Run",
    "ScpTask",
    "ServerGone",
    "TeacherTask",
    "copy_prompts",
    "passages_of",
    "plot",
    "question_of",
]
