"""The model: :class:`Clara`, its configuration, and what its methods return. Loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clara_fast.modeling.answering import Answer as Answer
    from clara_fast.modeling.answering import Source as Source
    from clara_fast.modeling.clara import Clara as Clara
    from clara_fast.modeling.clara import ClaraOutput as ClaraOutput
    from clara_fast.modeling.config import ClaraConfig as ClaraConfig
    from clara_fast.modeling.config import LoraSettings as LoraSettings
    from clara_fast.modeling.explaining import Explanation as Explanation

_HOME_OF = {
    "Answer": "answering",
    "Clara": "clara",
    "ClaraConfig": "config",
    "ClaraOutput": "clara",
    "Explanation": "explaining",
    "LoraSettings": "config",
    "Source": "answering",
}

__all__ = [*_HOME_OF]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"clara_fast.modeling.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'clara_fast.modeling' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
