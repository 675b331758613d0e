"""Records of JSON, JSON Lines and Parquet files, with all their errors in one message.

Standard library only; the library `pyarrow` is imported for a `.parquet`.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lechat_jax.errors import BadInput
from lechat_jax.files.parquet import parquet_rows
from lechat_jax.files.text import OnRead, lines_of, plain_name, stream_text

QUOTED = 5  # complaints that a message quotes; the others are counted
DEEPEST = 100  # levels of a record, with room for what pydantic and json need on each
_BEGINNING = re.compile(r"\S")


class Record(NamedTuple):
    """One JSON object of a file or row of a dataset: where it is ("line 3"), and its fields."""

    where: str
    fields: dict[str, Any]


class Complaints:
    """Collects the errors of a data source, so that one message reports all of them.

    >>> complaints = Complaints("chats.jsonl")
    >>> complaints.add("line 3", "is not JSON")
    >>> complaints.raise_any()
    Traceback (most recent call last):
    lechat_jax.errors.BadInput: chats.jsonl, line 3, is not JSON
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._found: list[tuple[str, str]] = []

    def add(self, where: str, what: str) -> None:
        """Adds an error: `where` is the line or row, and `what` continues the sentence."""
        self._found.append((where, what))

    def raise_any(self) -> None:
        """Raises the collected errors, if there are any.

        Raises:
            BadInput: there are errors; the first ones are quoted and the others counted.
        """
        n = len(self._found)
        found = [f"{where}, {what}" for where, what in sorted(self._found, key=_in_order)]
        if n == 1:
            raise BadInput(f"{self.source}, {found[0]}")
        if n:
            more = [f"and {n - QUOTED} more"] if n > QUOTED else []
            raise BadInput(
                f"{self.source} has {n} faults, and nothing was done:\n  "
                + "\n  ".join([*found[:QUOTED], *more])
            )


def _in_order(complaint: tuple[str, str]) -> list[str | int]:
    """Natural sort key: by file and then by line number, line 9 before line 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", complaint[0])]


def holds_records(file: Path) -> bool:
    """Whether a file is JSON (also compressed) or Parquet by its suffix, in any case."""
    return is_parquet(file) or plain_name(file).endswith((".jsonl", ".ndjson", ".json"))


def is_parquet(file: Path) -> bool:
    """Whether a file is Parquet by its suffix."""
    return file.suffix.lower() == ".parquet"


def records_of(
    file: Path,
    complaints: Complaints,
    named: bool = False,
    fields: Sequence[str] | None = None,
    on_read: OnRead = lambda n_bytes: None,
) -> Iterator[Record]:
    """The records of a file, read as they are asked for: rows of Parquet, or JSON objects.

    JSON is JSON Lines, one array, or objects that span several lines. All three occur under each
    suffix that `holds_records` knows, so the content decides; only JSON Lines are read a piece at
    a time. What is not an object is added to `complaints`.

    Args:
        file: its path.
        complaints: takes what is wrong with a record.
        named: whether a record's place has the file's name.
        fields: the columns that are needed, of Parquet, which reads no others; by default all.
        on_read: called with the number of stored bytes that were read since the last call.

    Raises:
        BadInput: the file cannot be read.
    """
    if is_parquet(file):
        values = parquet_rows(file, fields, on_read)
    else:
        values = _values(stream_text(file, numbered=True, on_read=on_read))
    for place, value in values:
        where = f"{file}, {place}" if named else place
        if isinstance(value, dict):
            yield Record(where, value)
        elif isinstance(value, ValueError):
            complaints.add(where, f"is not JSON: {value}")
        else:
            complaints.add(where, "is not a JSON object")


def parsed(text: str) -> Any:
    """Parses a JSON text; returns, and does not raise, the `ValueError` if it is invalid."""
    try:
        return json.loads(text)
    except RecursionError:
        return ValueError("it is nested too deeply")
    except ValueError as error:
        return error


def without_nulls(value: Any, depth: int = DEEPEST) -> Any:
    """Removes null fields from a JSON value, at every depth.

    Arrow, and so the library `datasets`, gives every object all fields that any object has.

    >>> without_nulls({"role": "user", "name": None, "content": [{"text": "Hi", "url": None}]})
    {'role': 'user', 'content': [{'text': 'Hi'}]}

    Raises:
        ValueError: it is nested more than `depth` deep, too deep for recursive functions.
    """
    if depth == 0:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    if isinstance(value, dict):
        given = {name: each for name, each in value.items() if each is not None}
        return {name: without_nulls(each, depth - 1) for name, each in given.items()}
    if isinstance(value, list):
        return [without_nulls(each, depth - 1) for each in value]
    return value


def _values(pieces: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Each value and its place; a `ValueError` in place of a value that is not JSON."""
    kept: list[str] | None = []

    def remembered() -> Iterator[str]:
        for piece in pieces:
            if kept is not None:
                kept.append(piece)
            yield piece

    lines = lines_of(remembered())
    opening, second = next(lines, None), next(lines, None)
    if opening is None:
        return
    first = parsed(opening[1])
    if isinstance(first, list) and second is None:
        yield from _entries(first)
        return
    if isinstance(first, json.JSONDecodeError):
        text = "".join([*kept, *pieces])
        whole = [*_stream(text)]
        end = whole[-1][1]
        if isinstance(end, list) and len(whole) == 1:
            yield from _entries(end)
            return
        if not isinstance(end, ValueError):
            yield from whole
            return
        if first.pos >= len(opening[1].rstrip()):  # values take several lines, as far as they go
            yield whole[-1]
            return
        lines = lines_of([text])
        opening, second = next(lines), next(lines, None)
    kept = None  # JSON Lines, of which each is read and forgotten
    yield f"line {opening[0]}", first
    for number, line in itertools.chain([second] if second else [], lines):
        yield f"line {number}", parsed(line)


def _entries(values: list[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"entry {number}", value) for number, value in enumerate(values, start=1))


def _stream(text: str) -> Iterator[tuple[str, Any]]:
    """Concatenated JSON values over any number of lines, up to the first invalid one."""
    decoder, at, line = json.JSONDecoder(), 0, 1
    while found := _BEGINNING.search(text, at):
        line += text.count("\n", at, found.start())
        try:
            value, at = decoder.raw_decode(text, found.start())
        except RecursionError:
            yield f"line {line}", ValueError("it is nested too deeply")
            return
        except json.JSONDecodeError as error:
            yield f"line {error.lineno}", ValueError(f"{error.msg} (column {error.colno})")
            return
        except ValueError as error:  # a number of more digits than Python reads
            yield f"line {line}", error
            return
        yield f"line {line}", value
        line += text.count("\n", found.start(), at)


def half_pair(text: str) -> str | None:
    """Finds a lone surrogate, which UTF-8 cannot encode: the error message, or `None`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds \\u{ord(text[error.start]):04x}, half of a character pair"
    return None
