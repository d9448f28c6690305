"""What a Clara model is made of: geometry, adapters and the options that change its numbers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

CONFIG_FILE = "config.json"
MODEL_TYPE = "clara_fast"


@dataclass
class LoraSettings:
    """Size of each role's LoRA; ``target_modules`` as in peft (``"all-linear"`` leaves out the LM head)."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.1
    target_modules: str | list[str] = "all-linear"


@dataclass
class ClaraConfig:
    """Configuration of a :class:`clara_fast.Clara` model, kept as ``config.json`` beside its weights.

    Args:
        base_model: hub name or folder of the causal language model.
        doc_max_length: tokens of a document that are read; the rest is cut off.
        compression_rate: document tokens per memory token, so that ``num_memory = doc_max_length //
            compression_rate`` memory tokens stand for every document (paper section 3).
        lora: size of the adapters.
        distinct_memory_tokens: one token per slot (``<MEM0>``, ``<MEM1>``, ...) or one that is repeated.
        separator: whether ``<SEP>`` follows each document's memory in the prompt.
        memory_positions: ``"after"`` puts the memory tokens behind the text as the reference does; ``"spread"``
            gives them position ids spread evenly over the text, which small models learn from faster.
        connector: whether a linear layer maps final hidden states into the space of the input embeddings.
        top_k: documents whose memories go into a prompt when a call does not say.
        quantization_config: what transformers' ``BitsAndBytesConfig`` is made from, for a base that is loaded in 8 or
            4 bits.
    """

    base_model: str
    doc_max_length: int = 256
    compression_rate: int = 16
    lora: LoraSettings = field(default_factory=LoraSettings)
    distinct_memory_tokens: bool = True
    separator: bool = True
    memory_positions: Literal["after", "spread"] = "after"
    connector: bool = False
    top_k: int = 5
    hidden_size: int = 0
    quantization_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.lora, dict):
            self.lora = LoraSettings(**self.lora)
        if self.compression_rate < 1:
            raise ValueError(f"compression_rate ({self.compression_rate}) must be at least 1")
        if self.doc_max_length < self.compression_rate:
            raise ValueError(
                f"doc_max_length ({self.doc_max_length}) must be at least compression_rate "
                f"({self.compression_rate}), or no memory token is left"
            )
        if self.memory_positions not in ("after", "spread"):
            raise ValueError(f"memory_positions ({self.memory_positions!r}) must be 'after' or 'spread'")
        if self.top_k < 1:
            raise ValueError(f"top_k ({self.top_k}) must be at least 1")

    @property
    def num_memory(self) -> int:
        """Memory tokens per document."""
        return self.doc_max_length // self.compression_rate

    def save(self, folder: Path) -> None:
        """Write ``config.json`` into ``folder``."""
        (folder / CONFIG_FILE).write_text(self.to_json_string())

    def to_dict(self) -> dict[str, Any]:
        """The content of ``config.json``; transformers' reports to TensorBoard and W&B ask for it by this name."""
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(self)}

    def to_json_string(self) -> str:
        """:meth:`to_dict` as ``config.json`` has it."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, content: dict[str, Any], source: str) -> ClaraConfig:
        """Build from the parsed ``config.json``; ``source`` names the file in errors."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(content) - known - {"model_type"})
        if unknown:
            raise ValueError(f"{source} has settings that this version does not know: {', '.join(unknown)}")
        if "base_model" not in content:
            raise ValueError(f"{source} names no base_model")
        return cls(**{k: v for k, v in content.items() if k in known})


def read_config(path: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a checkpoint folder, ours or ml-clara's."""
    file = path / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a checkpoint: it holds no {CONFIG_FILE}")
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return content


def quantization_settings(config: Any) -> dict[str, Any] | None:
    """What ``config.json`` keeps of a ``BitsAndBytesConfig``, or of its settings as a dict: those that were chosen.

    Raises:
        ValueError: they load neither in 8 nor in 4 bits, or are another method's.
    """
    if not config:
        return None
    from transformers import BitsAndBytesConfig

    if isinstance(config, dict):
        config = BitsAndBytesConfig.from_dict(dict(config))
    if not isinstance(config, BitsAndBytesConfig):
        raise ValueError(f"quantization_config ({type(config).__name__}) must be a BitsAndBytesConfig or its settings")
    settings = {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}
    if not (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        raise ValueError(f"quantization_config ({settings}) must set load_in_8bit or load_in_4bit")
    return settings
