"""The model: :class:`Clara`, its configuration, and what its methods return."""

from clara_fast.modeling.answering import Answer, Source
from clara_fast.modeling.clara import Clara, ClaraOutput
from clara_fast.modeling.config import ClaraConfig, LoraSettings

__all__ = ["Answer", "Clara", "ClaraConfig", "ClaraOutput", "LoraSettings", "Source"]
