"""Prompt strings and how they become chat text.

The strings are part of the published checkpoints' format (a trained generator depends on every character), so they
live in one data file, ``prompts.json``, which a saved model carries along and may change.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS_FILE = "prompts.json"


class Turn(NamedTuple):
    """What the generator is told: the system's text and the user's."""

    system: str
    user: str


class Prompts:
    """Renders chat prompts around memory slots.

    Args:
        strings: the content of ``prompts.json``.
        tokenizer: its chat template is used; a tokenizer without one gets plain lines.
        memory_block: what stands for one document: its memory tokens and, usually, the separator.
    """

    def __init__(self, strings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, memory_block: str) -> None:
        self.strings = strings
        self.tokenizer = tokenizer
        self.memory_block = memory_block

    @classmethod
    def load(cls, folder: Path | None, tokenizer: PreTrainedTokenizerBase, memory_block: str) -> Prompts:
        """The prompts saved in ``folder``, or the default ones."""
        own = folder / PROMPTS_FILE if folder is not None else None
        source = own if own is not None and own.is_file() else files(__package__) / PROMPTS_FILE
        return cls(json.loads(source.read_text(encoding="utf-8")), tokenizer, memory_block)

    def save(self, folder: Path) -> None:
        """Write ``prompts.json`` into ``folder``."""
        text = json.dumps(self.strings, indent=2, ensure_ascii=False)
        (folder / PROMPTS_FILE).write_text(text + "\n", encoding="utf-8")

    def answer(self, question: str, num_documents: int) -> Turn:
        """Asks for the answer to ``question`` from the memories of ``num_documents`` documents."""
        return self._answer(question, self.memory_block * num_documents)

    def answer_from_text(self, question: str, documents: list[str]) -> Turn:
        """The same over plain text (none: no context): what memories are compared with."""
        return self._answer(question, "\n\n".join(documents))

    def questions(self, num_documents: int = 1) -> Turn:
        """Pretraining: asks for all of a document's questions with their answers."""
        part = self.strings["questions"]
        return Turn(part["system"], _fill(part["user"], memory=self.memory_block * num_documents))

    def question_pairs(self, questions: list[str], answers: list[str]) -> str:
        """The reply to :meth:`questions`."""
        pair = self.strings["questions"]["pair"]
        return "\n".join(_fill(pair, question=q, answer=a) for q, a in zip(questions, answers, strict=True))

    def paraphrase(self, instruction: int, num_documents: int = 1) -> Turn:
        """Pretraining: asks for the text again; ``instruction`` picks one of the phrasings."""
        part = self.strings["paraphrase"]
        phrasings = part["instructions"]
        if not 0 <= instruction < len(phrasings):
            raise ValueError(f"instruction ({instruction}) must be at least 0 and below {len(phrasings)}")
        return Turn(part["system"], _fill(phrasings[instruction], memory=self.memory_block * num_documents))

    @property
    def num_paraphrase_instructions(self) -> int:
        """How many phrasings :meth:`paraphrase` knows."""
        return len(self.strings["paraphrase"]["instructions"])

    def render(self, turn: Turn, reply: str | None = None) -> str:
        """The chat text; without ``reply`` it ends where the model goes on.

        Templates that refuse a system role (Mistral's) get the system's text at the head of the user's turn.
        """
        system, user = turn
        if self.tokenizer.chat_template is None:
            text = f"{self.tokenizer.bos_token or ''}{system}\n{user}\nAnswer:"
            return text if reply is None else f"{text} {reply}{self.tokenizer.eos_token or ''}"
        if self._accepts_system_role:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        else:
            messages = [{"role": "user", "content": f"{system}\n{user}"}]
        if reply is not None:
            messages.append({"role": "assistant", "content": reply})
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply is None))

    def _answer(self, question: str, memory: str) -> Turn:
        part = self.strings["answer"]
        return Turn(part["system"], _fill(part["user"], memory=memory, question=question))

    @cached_property
    def _accepts_system_role(self) -> bool:
        import jinja2

        probe = [{"role": "system", "content": "probe-system"}, {"role": "user", "content": "probe-user"}]
        try:
            return "probe-system" in self.tokenizer.apply_chat_template(probe, tokenize=False)
        except jinja2.exceptions.TemplateError:
            return False


def _fill(pattern: str, **values: str) -> str:
    """``str.format`` in one pass that leaves every brace it does not know alone: questions may hold braces."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), pattern)
