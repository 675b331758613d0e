"""Rows of Parquet files, a batch at a time. Standard library only but for `pyarrow`."""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lechat_jax.errors import BadInput
from lechat_jax.files.text import NotText, OnRead

ROWS = 256  # that are read at a time


def parquet_rows(
    file: Path, fields: Sequence[str] | None, on_read: OnRead
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet file as they are asked for, each with its place ("row 0").

    Args:
        file: its path.
        fields: columns to read, of those that there are; all of a file that has none of them.
        on_read: called with the number of stored bytes that were read since the last call.

    Raises:
        NotText: it is no Parquet file, or not whole.
        BadInput: it cannot be read, or `pyarrow` is not installed.
    """
    try:
        pyarrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise BadInput(f"{file} needs a library to be read: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(file) as opened:
            there = opened.schema_arrow.names
            columns = [name for name in there if name in fields] if fields else []
            number, n_rows, done = 0, opened.metadata.num_rows, 0
            for batch in opened.iter_batches(batch_size=ROWS, columns=columns or None):
                at = file.stat().st_size * (number + len(batch)) // n_rows
                on_read(at - done)
                done = at
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
    except IsADirectoryError as error:
        raise BadInput(f"{file} is a folder, where a file is needed") from error
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise BadInput(f"cannot read {file}: {error}") from error
        raise NotText(f"{file} is no Parquet file, or not whole: {error}") from error
    except (ValueError, OverflowError) as error:  # what Arrow holds and Python does not
        raise BadInput(f"{file} holds a value that cannot be read: {error}") from error
