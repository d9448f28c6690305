"""Which documents a search may find: conditions on ids, titles and metadata."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
_LISTS = (list, tuple, set, frozenset)
# A column that no metadata has, for the numbers of rows.
_ROW = "\0row"
_REFUSALS = (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError)

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
    if isinstance(value, _LISTS):
        return [field.isin(list(value))]
    if not isinstance(value, Mapping):
        return [field == value]
    if unknown := sorted(set(value) - set(COMPARISONS)):
        raise ValueError(f"where[{name!r}] has unknown comparisons {unknown}; there are {', '.join(COMPARISONS)}")
    if not isinstance(value.get("in", []), _LISTS):
        raise ValueError(f"where[{name!r}]['in'] ({value['in']!r}) must be a list")
    return [COMPARISONS[sign](field, bound) for sign, bound in value.items()]


def allowed(snapshot: Snapshot, where: Where) -> list[np.ndarray]:
    """For every shard ``[rows]`` bool: live rows for which ``where`` holds. A field that a document lacks is null.

    Raises:
        ValueError: a field that no document has, or a comparison that its values do not allow.
    """
    try:
        condition = expression(where)
    except _REFUSALS as error:
        raise ValueError(f"where ({where!r}) does not apply: {_line(error)}") from None
    try:
        return _allowed(snapshot, condition, times_as_text=False)
    except ValueError:
        return _allowed(snapshot, condition, times_as_text=True)


def _allowed(snapshot: Snapshot, condition: pc.Expression, *, times_as_text: bool) -> list[np.ndarray]:
    """With ``times_as_text``, what Arrow reads as points in time is what the metadata holds: strings."""
    with_text = "text" in str(condition)
    masks: list[np.ndarray | None] = []
    schemas = []
    for shard in snapshot.shards:
        table = _table(shard, with_text=with_text, times_as_text=times_as_text)
        schemas.append(table.schema)
        try:
            masks.append(_holds(table, condition))
        except _REFUSALS:  # it may lack a field that other shards know
            masks.append(None)
    if any(mask is None for mask in masks):
        schema = _joint(snapshot, schemas)
        for number, shard in enumerate(snapshot.shards):
            if masks[number] is None:
                table = _table(shard, with_text=with_text, schema=schema)
                masks[number] = _holds_with(table, condition)
    return [mask & shard.live_mask() for mask, shard in zip(masks, snapshot.shards, strict=True) if mask is not None]


def _joint(snapshot: Snapshot, schemas: list[pa.Schema]) -> pa.Schema:
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except _REFUSALS as error:
        raise ValueError(
            f"metadata of {snapshot.path} cannot be filtered: a field has values of several types ({_line(error)})"
        ) from None


def _holds_with(table: pa.Table, condition: pc.Expression) -> np.ndarray:
    try:
        return _holds(table, condition)
    except _REFUSALS as error:
        if str(error).startswith("No match for FieldRef"):
            field = str(error).splitlines()[0].partition(" in ")[0].removeprefix("No match for ")
            raise ValueError(
                f"where names {field}, which no document has; fields: {sorted(table.column_names)}"
            ) from None
        raise ValueError(f"where ({condition}) does not apply: {_line(error)}") from None


def _table(shard: Shard, *, with_text: bool, schema: pa.Schema | None = None, times_as_text: bool = False) -> pa.Table:
    """Id, title and the fields of the metadata, of all rows; of ``schema``, if one is given."""
    import pyarrow.json

    columns = ["id", "title", *(["text"] if with_text else [])]
    stored = shard.table([*columns, "metadata"])
    lines = stored.column("metadata").to_pylist()
    # A field of its own keeps rows whose metadata is empty.
    filler = json.dumps(_ROW)
    content = "\n".join(f"{{{filler}: 0" + (", " + line[1:] if len(line) > 2 else "}") for line in lines).encode()

    def read(schema: pa.Schema | None) -> pa.Table:
        return pyarrow.json.read_json(
            io.BytesIO(content),
            read_options=pyarrow.json.ReadOptions(block_size=len(content) + 1),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=schema),
        )

    try:
        table = read(schema)
        if times_as_text:
            table = read(pa.schema([(field.name, _without_times(field.type)) for field in table.schema]))
    except _REFUSALS as error:
        raise ValueError(
            f"metadata of shard {shard.entry.name} in {shard.folder.parent} cannot be filtered: "
            f"a field has values of several types ({_line(error)})"
        ) from None
    table = table.drop_columns([name for name in [_ROW, *columns] if name in table.column_names])
    for name in columns:
        table = table.append_column(name, stored.column(name))
    return table


def _without_times(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _without_times(field.type)) for field in kind])
    return pa.list_(_without_times(kind.value_type)) if pa.types.is_list(kind) else kind


def _holds(table: pa.Table, condition: pc.Expression) -> np.ndarray:
    """Where ``condition`` is true."""
    from pyarrow import acero

    nodes = [
        acero.Declaration(
            "table_source", acero.TableSourceNodeOptions(table.append_column(_ROW, pa.array(np.arange(len(table)))))
        ),
        acero.Declaration("filter", acero.FilterNodeOptions(condition)),
        acero.Declaration("project", acero.ProjectNodeOptions([pc.field(_ROW)], ["row"])),
    ]
    mask = np.zeros(len(table), dtype=bool)
    mask[acero.Declaration.from_sequence(nodes).to_table().column("row").to_numpy()] = True
    return mask


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
