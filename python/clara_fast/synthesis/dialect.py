"""What of OpenAI's protocol a server takes: schemas or only JSON, names of parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clara_fast.synthesis.client import Request

STRUCTURES = ("json_schema", "json_object", "off")
_ABOUT_STRUCTURE = ("response_format", "json_schema", "json_object", "schema", "grammar", "guided", "structured")


@dataclass(frozen=True)
class Dialect:
    """How a request is put; ``fixed`` if the user has chosen its structure."""

    structure: str = STRUCTURES[0]
    fixed: bool = False
    length_field: str = "max_tokens"
    left_out: frozenset[str] = frozenset()

    @classmethod
    def of(cls, structure: str) -> Dialect:
        """From the option: ``auto`` begins with schemas and takes less where they are refused."""
        if structure == "auto":
            return cls()
        if structure not in STRUCTURES:
            raise ValueError(f"structured ({structure}) must be auto, {', '.join(STRUCTURES)}")
        return cls(structure, fixed=True)

    def arguments(self, request: Request) -> dict[str, Any]:
        """What goes into the request beside model and messages."""
        arguments: dict[str, Any] = {
            self.length_field: request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        if self.structure == "json_schema":
            schema = {"name": request.name, "schema": request.schema, "strict": True}
            arguments["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif self.structure == "json_object":
            arguments["response_format"] = {"type": "json_object"}
        return {key: value for key, value in arguments.items() if key not in self.left_out}

    def without(self, refusal: str, *, guess: bool) -> Dialect | None:
        """The same without what the server's ``refusal`` speaks of, or None where it speaks of nothing of this kind.

        Args:
            refusal: the server's words.
            guess: take less structure even where the words do not say why.
        """
        said = refusal.lower()
        if "max_completion_tokens" in said and self.length_field == "max_tokens":
            return replace(self, length_field="max_completion_tokens")
        for parameter in ("temperature", "seed"):
            if parameter in said and parameter not in self.left_out:
                return replace(self, left_out=self.left_out | {parameter})
        weaker = STRUCTURES.index(self.structure) + 1
        if not self.fixed and weaker < len(STRUCTURES) and (guess or any(sign in said for sign in _ABOUT_STRUCTURE)):
            return replace(self, structure=STRUCTURES[weaker])
        return None
