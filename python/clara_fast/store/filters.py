"""Which documents a search may find: conditions on ids, titles and metadata."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clara_fast.store.errors import listing
from clara_fast.store.shard import Shard
from clara_fast.store.snapshot import Snapshot

COMPARISONS = {
    "==": lambda field, value: field == value,
    "!=": lambda field, value: field != value,
    ">": lambda field, value: field > value,
    ">=": lambda field, value: field >= value,
    "<": lambda field, value: field < value,
    "<=": lambda field, value: field <= value,
    "in": lambda field, value: field.isin(list(value)),
}
_UNKNOWN = re.compile(r"No match for FieldRef\.Name\((.*?)\) in ")

Where: TypeAlias = "pc.Expression | Mapping[str, Any]"


def expression(where: Where) -> pc.Expression:
    """A condition as an Arrow expression: fields of a mapping must all hold.

    ``{"lang": "en"}`` is equality (with ``None``: absent), ``{"lang": ["en", "de"]}`` one of these, and
    ``{"year": {">=": 1990, "<": 2000}}`` a range; the comparisons are those of ``COMPARISONS``.

    Raises:
        TypeError, ValueError: ``where`` is neither, or says nothing.
    """
    if isinstance(where, pc.Expression):
        return where
    if not isinstance(where, Mapping):
        raise TypeError(f"where must be a mapping or a pyarrow.compute.Expression, not {type(where).__name__}")
    conditions = [part for name, value in where.items() for part in _conditions(pc.field(name), name, value)]
    if not conditions:
        raise ValueError(f"where ({where!r}) holds no condition")
    whole = conditions[0]
    for condition in conditions[1:]:
        whole = whole & condition
    return whole


def _conditions(field: pc.Expression, name: str, value: Any) -> list[pc.Expression]:
    if value is None:
        return [field.is_null()]
    if isinstance(value, list | tuple | set | frozenset):
        return [field.isin(list(value))]
    if not isinstance(value, Mapping):
        return [field == value]
    if unknown := sorted(set(value) - set(COMPARISONS)):
        raise ValueError(f"where[{name!r}] has unknown comparisons {unknown}; there are {', '.join(COMPARISONS)}")
    return [COMPARISONS[sign](field, bound) for sign, bound in value.items()]


def allowed(snapshot: Snapshot, where: Where) -> list[np.ndarray]:
    """For every shard ``[rows]`` bool: live rows for which ``where`` holds. A field that a document lacks is null.

    Raises:
        ValueError: a field that no document has, or a comparison that its values do not allow.
    """
    condition = expression(where)
    text = str(condition)
    masks, missing, known = [], None, set()
    for shard in snapshot.shards:
        table = _table(shard, with_text="text" in text)
        known.update(table.column_names)
        mask, unknown = _holds(table, condition)
        masks.append(mask & shard.live_mask())
        missing = unknown if missing is None else missing & unknown
    if missing:
        raise ValueError(f"where names {listing(sorted(missing))}, which no document has; fields: {sorted(known)}")
    return masks


def _table(shard: Shard, *, with_text: bool) -> pa.Table:
    """Id, title and the fields of the metadata, of all rows."""
    import pyarrow.json

    columns = ["id", "title", "metadata", *(["text"] if with_text else [])]
    stored = shard.table(columns)
    lines = stored.column("metadata").to_pylist()
    # A field of its own keeps rows whose metadata is empty.
    content = "\n".join('{"": 0' + (", " + line[1:] if len(line) > 2 else "}") for line in lines).encode()
    options = pyarrow.json.ReadOptions(block_size=max(len(content), 1) + 1)
    try:
        table = pyarrow.json.read_json(io.BytesIO(content), read_options=options)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"metadata of shard {shard.entry.name} in {shard.folder.parent} cannot be filtered: "
            f"a field has values of several types ({str(error).splitlines()[0]})"
        ) from None
    for name in columns:
        if name != "metadata":
            place = table.schema.get_field_index(name)
            table = table.remove_column(place) if place >= 0 else table
            table = table.append_column(name, stored.column(name))
    return table.drop_columns([""])


def _holds(table: pa.Table, condition: pc.Expression) -> tuple[np.ndarray, set[str]]:
    """Where ``condition`` holds, and the fields that it names and the table lacks."""
    from pyarrow import acero

    unknown: set[str] = set()
    table = table.append_column("", pa.array(np.arange(len(table))))
    while True:
        try:
            nodes = [
                acero.Declaration("table_source", acero.TableSourceNodeOptions(table)),
                acero.Declaration("filter", acero.FilterNodeOptions(condition)),
                acero.Declaration("project", acero.ProjectNodeOptions([pc.field("")], ["row"])),
            ]
            kept = acero.Declaration.from_sequence(nodes).to_table().column("row").to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            match = _UNKNOWN.search(str(error))
            if match is None or match[1] in unknown:
                raise ValueError(f"where ({condition}) does not apply: {str(error).splitlines()[0]}") from None
            unknown.add(match[1])
            table = table.append_column(match[1], pa.nulls(len(table)))
            continue
        mask = np.zeros(len(table), dtype=bool)
        mask[kept] = True
        return mask, unknown
