"""Rows of text from a parquet table, as ``read_csv`` gives those of a csv file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import parsing

BATCH_ROWS = 1024


def read_parquet(
    path: Path, required: Sequence[str], name: str = "", *, optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a parquet table: (number of the row from 1, text of every column that is wanted and there).

    Empty cells are empty text.

    Args:
        required: columns that must be there.
        name: how messages call the file; empty: the path.
        optional: columns that may be there.

    Raises:
        UserError: it cannot be read as parquet; a column is missing, there twice, or not of text.
    """
    import pyarrow as pa
    import pyarrow.parquet as papq

    name = name or str(path)

    def refuse(reason: str) -> UserError:
        return UserError(f"{name}: cannot be read as parquet ({reason}); write it again, or give a csv file")

    with parsing(refuse):
        file = papq.ParquetFile(path)
        schema = file.schema_arrow
    for column in (*required, *optional):
        count = schema.names.count(column)
        if count > 1 or (count == 0 and column in required):
            problem = "is there twice" if count else "is missing"
            raise UserError(f"{name}: column {column!r} {problem}; it has {', '.join(schema.names) or 'none'}")
        found = schema.field(column).type if count else pa.null()
        if not (pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_null(found)):
            raise UserError(f"{name}: column {column!r} is {found}, must be string")
    wanted = [column for column in (*required, *optional) if column in schema.names]
    row, groups = 0, file.iter_batches(BATCH_ROWS, columns=wanted, use_threads=False)
    while True:
        with parsing(refuse):
            batch = next(groups, None)
            cells = batch.to_pylist() if batch is not None else []
        if batch is None:
            return
        for values in cells:
            row += 1
            yield row, {column: values[column] or "" for column in wanted}
