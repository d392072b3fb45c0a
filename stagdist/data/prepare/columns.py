"""The column of text of a parquet or Arrow file, in parts that processes can read on their own."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from stagdist.data.prepare.formats import damage_named, is_decompressed, open_seekable
from stagdist.errors import DataError

Columnar = Literal["parquet", "arrow"]
_ROWS = 2000
_BATCH_ROWS = 256
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def column_parts(path: str, kind: Columnar) -> list[tuple[int, int, int]]:
    """First and end of the row groups or batches of each part, and its size: bytes of parquet, rows of Arrow.

    Raises:
        DataError: the file is damaged.
    """
    with damage_named(path), _opened(path, kind) as file:
        if kind == "parquet":
            groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
            _check_rows(sum(group.num_rows for group in groups), file.metadata.num_rows)
            return [(index, index + 1, max(group.total_byte_size, 0)) for index, group in enumerate(groups)]
        parts, first, rows = [], 0, 0
        for index, batch in enumerate(_arrow_batches(file, 0, None)):
            rows += batch.num_rows
            if rows >= _ROWS:
                parts.append((first, index + 1, rows))
                first, rows = index + 1, 0
        return [*parts, (first, index + 1, rows)] if rows else parts


def column_texts(path: str, kind: Columnar, start: int, stop: int | None, key: str) -> Iterator[bytes | None]:
    """Texts of some row groups or batches, None where a row has none; `stop` None reads to the end.

    Raises:
        DataError: the file is damaged, or the column is missing or of another type.
    """
    with damage_named(path), _opened(path, kind) as file:
        _check_column(path, file.schema_arrow if kind == "parquet" else file.schema, key)
        if kind == "arrow":
            for batch in _arrow_batches(file, start, stop):
                yield from _bytes_of(batch.column(batch.schema.get_field_index(key)))
            return
        groups = range(start, file.num_row_groups if stop is None else stop)
        rows = 0
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[key]):
            rows += batch.num_rows
            yield from _bytes_of(batch.column(0))
        _check_rows(rows, sum(file.metadata.row_group(index).num_rows for index in groups))


def _check_rows(found: int, stated: int) -> None:
    """The headers have no checksum, but they repeat the number of rows."""
    if found != stated:
        raise ValueError(f"{found} rows of {stated}")


def _check_column(path: str, schema: Any, key: str) -> None:
    import pyarrow

    if schema.names.count(key) != 1:
        columns = ", ".join(schema.names)
        raise DataError(f"{path} has no column {key!r} but {columns}; choose with --text-key")
    found = schema.field(key).type
    values = found.value_type if pyarrow.types.is_dictionary(found) else found
    if values not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null()):
        raise DataError(
            f"{path}: the column {key!r} is of type {found}, not string; write it as string, or choose another of "
            f"{', '.join(schema.names)} with --text-key"
        )


def _bytes_of(column: Any) -> list[bytes | None]:
    import pyarrow

    # damage may be in the offsets: reading such an array without a check could end the process
    views = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
    }
    column = column.view(views.get(column.type, column.type))
    column.validate(full=True)
    return column.cast(pyarrow.large_binary()).to_pylist()


@contextmanager
def _opened(path: str, kind: Columnar) -> Iterator[Any]:
    import pyarrow.parquet

    with open_seekable(path) as stream:
        if kind == "parquet":
            yield pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False)
            return
        random_access = stream.read(6) == b"ARROW1"
        if not random_access:
            stream.seek(max(stream.seek(0, os.SEEK_END) - len(_STREAM_END), 0))
            if stream.read() != _STREAM_END:
                raise DataError(f"{path} is damaged: its end is missing; fetch it again")
        stream.seek(0)
        mapped = "://" not in path and not is_decompressed(stream)
        source = pyarrow.memory_map(path) if mapped else stream
        yield pyarrow.ipc.open_file(source) if random_access else pyarrow.ipc.open_stream(source)


def _arrow_batches(file: Any, start: int, stop: int | None) -> Iterator[Any]:
    if not hasattr(file, "num_record_batches"):
        return itertools.islice(file, start, stop)
    numbers = range(start, file.num_record_batches if stop is None else stop)
    return map(file.get_batch, numbers)
