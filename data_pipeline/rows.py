"""Rows of stages between Python and Arrow. Lists of numbers, which may be one per frame, are numpy arrays in Python."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

Row = dict[str, Any]


def to_rows(table: pa.Table) -> list[Row]:
    """One dict per row; a list of numbers is a numpy array, None where there is none."""
    columns = {name: _values(table[name].combine_chunks()) for name in table.column_names}
    return [{name: values[row] for name, values in columns.items()} for row in range(table.num_rows)]


def _values(column: pa.Array) -> Sequence[Any]:
    if not (pa.types.is_list(column.type) and _is_number(column.type.value_type)):
        found: list[Any] = column.to_pylist()
        return found
    return [None if not item.is_valid else item.values.to_numpy(zero_copy_only=False) for item in column]


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def to_table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """The reverse; a column that no row has is null.

    Raises:
        ValueError: a row has a column that the schema has not.
    """
    unknown = {name for row in rows for name in row} - set(schema.names)
    if unknown:
        raise ValueError(f"columns {', '.join(sorted(unknown))}: not among {', '.join(schema.names)}")
    arrays = [pa.array([_plain(row.get(field.name)) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def feed(digest: Any, value: Any) -> None:
    """A value of a row into a hash, with its type and size, so that no two different rows are fed alike."""
    if isinstance(value, Mapping):
        digest.update(b"{%d" % len(value))
        for key in sorted(value):
            digest.update(key.encode() + b"=")
            feed(digest, value[key])
    elif isinstance(value, np.ndarray):
        digest.update(f"a{value.dtype.str}{value.shape};".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, (list, tuple)):
        digest.update(b"[%d" % len(value))
        for item in value:
            feed(digest, item)
    elif isinstance(value, bytes):
        digest.update(b"b%d:" % len(value) + value)
    else:
        text = repr(value)
        digest.update(f"{type(value).__name__}{len(text)}:{text};".encode())


def to_bytes(table: pa.Table) -> bytes:
    """For a pipe or a journal."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def from_bytes(content: bytes) -> pa.Table:
    """See ``to_bytes``."""
    return pa.ipc.open_stream(content).read_all()
