"""``--where``: which documents count."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

WhereOption = Annotated[
    str | None,
    typer.Option(help='Only documents of which this holds: \'{"lang": ["en", "de"], "year": {">=": 1990}}\'.'),
]


def parsed_where(where: str | None) -> dict[str, Any] | None:
    """The condition that ``--where`` gives.

    Raises:
        ValueError: it is no JSON object.
    """
    if where is None:
        return None
    try:
        condition = json.loads(where)
    except ValueError as error:
        raise ValueError(f"--where ({where}) is not JSON: {error}") from None
    if not isinstance(condition, dict):
        raise ValueError(f"--where ({where}) must be a JSON object")
    return condition
