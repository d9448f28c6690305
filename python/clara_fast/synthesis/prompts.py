"""The prompts, one YAML file each, and what may be put into them.

A file has ``user`` and, if wanted, ``system`` (texts with ``$placeholders``), ``temperature`` and ``max_tokens``.
Ours all begin with the passage: a server that keeps prefixes then reads it once for all that is asked of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from clara_fast.synthesis.parsing import normalized

# What can be put into each prompt; the first must be there.
PLACEHOLDERS = {
    "simple": ("passage",),
    "complex": ("passage",),
    "simple_again": ("passage", "missing", "asked"),
    "complex_again": ("passage", "missing", "asked"),
    "answer": ("passage", "question"),
    "judge_simple": ("passage", "question", "answer"),
    "judge_complex": ("passage", "question", "answer", "facts"),
    "missing": ("passage", "pairs"),
    "paraphrase": ("passage", "objections"),
    "judge_paraphrase": ("passage", "paraphrase"),
    "teacher": ("documents", "question"),
    "judge_teacher": ("documents", "question", "answer", "gold"),
}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


_TEXT: dict[str, Any] = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}
_QUESTIONS = _object(questions={"type": "array", "items": _object(facts=_TEXTS, question=_TEXT)})
_ANSWER = _object(answer=_TEXT)
_VERDICT = _object(reason=_TEXT, accept={"type": "boolean"})
# The reason comes before the decision, so that a model thinks first.
SCHEMAS = {
    "simple": _QUESTIONS,
    "complex": _QUESTIONS,
    "simple_again": _QUESTIONS,
    "complex_again": _QUESTIONS,
    "answer": _ANSWER,
    "judge_simple": _VERDICT,
    "judge_complex": _VERDICT,
    "missing": _object(missing=_TEXTS),
    "paraphrase": _object(paraphrase=_TEXT),
    "judge_paraphrase": _VERDICT,
    "teacher": _ANSWER,
    "judge_teacher": _VERDICT,
}


@dataclass(frozen=True)
class Prompt:
    """One prompt; ``fill`` makes the messages of it."""

    name: str
    user: str
    system: str | None
    temperature: float
    max_tokens: int

    def fill(self, values: Mapping[str, str]) -> list[dict[str, str]]:
        """The chat messages with ``values`` in the place of the placeholders."""
        texts = {"system": self.system, "user": self.user}
        return [
            {"role": role, "content": string.Template(text).substitute(values).strip()}
            for role, text in texts.items()
            if text is not None
        ]

    def echoed(self, content: str) -> bool:
        """Whether an answer holds a text of the example that the prompt shows (its lines that begin with a brace).

        Small models copy it, and a judge's copy may say ``"accept": true``.
        """
        example = "\n".join(line for line in self.user.splitlines() if line.lstrip().startswith("{"))
        return bool(_quoted(example) & _quoted(content))


def _quoted(text: str) -> set[str]:
    """Strings that are no keys, of JSON whole or broken."""
    found = re.findall(r'"((?:[^"\\]|\\.)*)"(\s*:)?', text)
    return {normalized(string) for string, colon in found if not colon} - {""}


class Prompts:
    """All prompts: ours, and in their place those that ``folder`` has.

    Raises:
        NotADirectoryError: ``folder`` is none.
        ValueError: a file in it has no known name, or breaks the format; file and rule are named.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        found = {file.stem: file for file in shipped_prompts()}
        if folder is not None:
            found |= _own_files(Path(folder))
        self._prompts = {name: _read(name, found[name]) for name in PLACEHOLDERS}

    def __getitem__(self, name: str) -> Prompt:
        return self._prompts[name]

    def fingerprint(self) -> str:
        """Equal for equal prompts: answers to others are not to be mixed in."""
        content = json.dumps([vars(prompt) for prompt in self._prompts.values()], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def shipped_prompts() -> list[Path]:
    """The files that come along."""
    return sorted(Path(str(files("clara_fast") / "assets" / "synthesis")).glob("*.yaml"))


def copy_prompts(folder: str | Path) -> list[Path]:
    """Copy the prompts that come along to ``folder``, to be changed there.

    Raises:
        FileExistsError: one of the files is there already; nothing is copied.
    """
    targets = {file: Path(folder) / file.name for file in shipped_prompts()}
    for target in targets.values():
        if target.exists():
            raise FileExistsError(f"{target} exists already: prompts are not copied over others")
    os.makedirs(folder, exist_ok=True)
    for file, target in targets.items():
        target.write_bytes(file.read_bytes())
    return list(targets.values())


def _own_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise NotADirectoryError(f"prompts {folder} is not a folder")
    own = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if not own:
        raise ValueError(f"prompts {folder} holds no .yaml file: --copy-prompts {folder} puts ours there")
    for name, file in own.items():
        if name not in PLACEHOLDERS:
            raise ValueError(f"{file}: there is no prompt of this name, only {', '.join(PLACEHOLDERS)}")
    return own


def _read(name: str, file: Path) -> Prompt:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    allowed = {"system", "user", "temperature", "max_tokens"}
    if not isinstance(content, dict) or not isinstance(content.get("user"), str) or set(content) - allowed:
        raise ValueError(f"{file} must hold 'user', and may hold 'system', 'temperature' and 'max_tokens', no other")
    temperature, max_tokens = content.get("temperature", 0.0), content.get("max_tokens", 512)
    if not isinstance(temperature, int | float) or isinstance(temperature, bool) or temperature < 0:
        raise ValueError(f"{file}: temperature ({temperature!r}) must be a number of at least 0")
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise ValueError(f"{file}: max_tokens ({max_tokens!r}) must be an integer of at least 1")
    prompt = Prompt(name, content["user"], content.get("system"), float(temperature), max_tokens)
    _check_placeholders(prompt, file)
    return prompt


def _check_placeholders(prompt: Prompt, file: Path) -> None:
    known, used = PLACEHOLDERS[prompt.name], set()
    for text in (prompt.system or "", prompt.user):
        template = string.Template(text)
        if not template.is_valid():
            raise ValueError(f"{file}: a $ must begin a placeholder; write $$ for the sign itself")
        used |= set(template.get_identifiers())
    if unknown := sorted(used - set(known)):
        raise ValueError(f"{file}: there is no placeholder ${unknown[0]} in this prompt, only ${', $'.join(known)}")
    if known[0] not in used:
        raise ValueError(f"{file}: the placeholder ${known[0]} is missing")
