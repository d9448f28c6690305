"""clara_fast: documents compressed once into memory tokens, searched and answered from in that form.

CLaRa (Continuous Latent Reasoning, arXiv 2511.18659) as a library. The heavy parts load when they are first
used, so that ``import clara_fast`` costs little beyond torch:

- :class:`Clara` holds one causal language model in its three roles (compressor, query reasoner, generator);
- :class:`MemoryStore` keeps memories and documents on disk and searches them;
- :class:`ScpTrainer`, :class:`InstructionTrainer` and :class:`JointTrainer` are the three stages of the paper;
- :func:`warmup` compiles ahead what a model will call on a GPU;
- :mod:`clara_fast.ops` holds the fused operations by themselves, as ``torch.ops.clara_fast.*``;
- transformers models take ``attn_implementation="clara_fast"`` (:mod:`clara_fast.modeling.attention`).
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from clara_fast._register_attention import register_attention

try:
    __version__ = version("clara-fast")
except PackageNotFoundError:  # a source tree on sys.path, never installed
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from clara_fast import ops as ops
    from clara_fast.modeling import Answer as Answer
    from clara_fast.modeling import Clara as Clara
    from clara_fast.modeling import ClaraConfig as ClaraConfig
    from clara_fast.ops import warmup as warmup
    from clara_fast.store import MemoryStore as MemoryStore
    from clara_fast.training import InstructionTrainer as InstructionTrainer
    from clara_fast.training import JointTrainer as JointTrainer
    from clara_fast.training import ScpTrainer as ScpTrainer

_HOME_OF = {
    "Answer": "modeling",
    "Clara": "modeling",
    "ClaraConfig": "modeling",
    "MemoryStore": "store",
    "ScpTrainer": "training",
    "ScpTrainingArguments": "training",
    "warmup": "ops",
    "InstructionTrainer": "training",
    "InstructionTrainingArguments": "training",
    "JointTrainer": "training",
    "JointTrainingArguments": "training",
}
_SUBPACKAGES = ("data", "evaluation", "modeling", "ops", "store", "training")

__all__ = ["__version__", "ops", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"clara_fast.{_HOME_OF[name]}"), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"clara_fast.{name}")
    raise AttributeError(f"module 'clara_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})


register_attention()
