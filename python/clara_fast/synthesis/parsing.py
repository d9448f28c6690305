"""JSON out of a language model's answer, whatever stands around it, and the shapes that the prompts ask for.

A model that is not held to a schema thinks aloud, puts its JSON into code fences, forgets the list around a single
object, or leaves a comma before a bracket. That is read all the same; what it does not say is never guessed.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_THOUGHTS = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL)
# Strings are matched first, so that a comma inside one stays.
_STRING_OR_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])', re.DOTALL)
_COMMA = re.compile(r",\s*[\]}]")
_OPENING = re.compile(r"[{\[]")
_YES, _NO = {"true", "yes", "accept", "accepted"}, {"false", "no", "reject", "rejected"}


class UnusableAnswer(ValueError):
    """What the model wrote does not have the form that was asked for."""


@dataclass(frozen=True)
class Question:
    """A question that a model proposed, with the facts that it says the answer needs."""

    text: str
    facts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """A judge's decision and its reason."""

    accept: bool
    reason: str


def read_questions(content: str) -> list[Question]:
    """``{"questions": [{"facts": [...], "question": ...}]}``, a bare list, or single objects one after the other.

    Raises:
        UnusableAnswer: there is not one question.
    """
    try:
        found = [question for value in json_values(content) for question in _questions(value)]
    except UnusableAnswer:
        # Cut off: a list of texts in a broken object may be of facts, so only whole objects count.
        objects = (value for value in json_values(content, parts=True) if isinstance(value, dict))
        found = [question for value in objects for question in _questions(value)]
    if not found:
        raise UnusableAnswer("no question in it")
    return found


def read_list(content: str, key: str) -> list[str]:
    """``{key: [text, ...]}`` or a bare list of texts; the list may be empty.

    Raises:
        UnusableAnswer: there is no such list, or several that differ.
    """
    found = []
    for value in json_values(content):
        items = value.get(key) if isinstance(value, dict) else value
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            found.append([item.strip() for item in items if item.strip()])
    return _only(found, f"list {key!r}")


def read_text(content: str, key: str) -> str:
    """``{key: text}``; the text may be empty.

    Raises:
        UnusableAnswer: there is no such text, or several that differ.
    """
    values = [_first(value) for value in json_values(content)]
    found = [value.get(key) for value in values if isinstance(value, dict)]
    found = [str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for v in found]
    return _only([text.strip() for text in found if isinstance(text, str)], f"text {key!r}")


def read_verdict(content: str) -> Verdict:
    """``{"reason": ..., "accept": true or false}``.

    Raises:
        UnusableAnswer: it decides nothing, or both ways.
    """
    decisions, reason = [], ""
    for value in map(_first, json_values(content)):
        said = str(value.get("accept")).strip().lower() if isinstance(value, dict) else ""
        if said in _YES | _NO:
            decisions.append(said in _YES)
            reason = str(value.get("reason") or reason)
    return Verdict(_only(decisions, "decision 'accept'"), " ".join(reason.split()))


def json_values(content: str, *, parts: bool = False) -> list[Any]:
    """The outermost JSON objects and lists in ``content``, in order.

    Args:
        content: what the model wrote.
        parts: take the whole values inside of an object that is cut off or broken. Never to be done with a decision:
            what stands inside of a broken one may be a quotation.

    Raises:
        UnusableAnswer: there is none, or an object is broken and ``parts`` are not wanted.
    """
    text = _THOUGHTS.sub("", content)
    if "</think>" in text:  # the chat template had opened it
        text = text.rpartition("</think>")[2]
    values = list(_scan(text, parts))
    if not values:
        raise UnusableAnswer("no JSON in it")
    return values


def normalized(text: str) -> str:
    """``text`` without case, punctuation, and width of white space: equal for texts that differ in no word."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in plain).split())


def _scan(text: str, parts: bool) -> Iterator[Any]:
    position = 0
    while opening := _OPENING.search(text, position):
        position = opening.start()
        try:
            value, position = _decode(text, position)
        except RecursionError:  # a server that cannot stop; to try each bracket would take minutes
            raise UnusableAnswer("nested too deep") from None
        except json.JSONDecodeError:
            if opening.group() == "{" and not parts:
                raise UnusableAnswer("broken JSON in it") from None
            position += 1  # prose in brackets, or cut off
            continue
        yield value


def _decode(text: str, position: int) -> tuple[Any, int]:
    """The JSON value that begins at ``position``, and where it ends; a comma before a closing bracket may stand."""
    decoder = json.JSONDecoder(strict=False)
    try:
        return decoder.raw_decode(text, position)
    except json.JSONDecodeError:
        if not _COMMA.search(text, position):
            raise
        # Blanks in the commas' place leave everything else where it was.
        rest = _STRING_OR_COMMA.sub(lambda match: match.group(1) or " ", text[position:])
        value, length = decoder.raw_decode(rest)
        return value, position + length


def _questions(value: Any) -> list[Question]:
    if isinstance(value, list):
        return [question for item in value for question in _questions(item)]
    if isinstance(value, str):
        return [Question(value.strip())] if value.strip() else []
    if not isinstance(value, dict):
        return []
    if "questions" in value:
        return _questions(value["questions"])
    text = value.get("question")
    if not isinstance(text, str) or not text.strip():
        return []
    facts = value.get("facts", value.get("fact", []))
    facts = facts if isinstance(facts, list) else [facts]
    return [Question(text.strip(), [f.strip() for f in facts if isinstance(f, str) and f.strip()])]


def _first(value: Any) -> Any:
    """The object in a list of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _only(found: list[Any], what: str) -> Any:
    if not found:
        raise UnusableAnswer(f"no {what} in it")
    if any(value != found[0] for value in found):
        raise UnusableAnswer(f"more than one {what} in it, and they differ")
    return found[0]
