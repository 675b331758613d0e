"""Lines of JSON and rows of datasets, and all that is wrong with them in one message.

Standard library only.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lechat_jax.errors import BadInput

QUOTED = 5  # complaints that a message quotes; the others are counted


class Record(NamedTuple):
    """A line of a file or a row of a dataset: which one it is, and what it says."""

    where: str
    fields: dict[str, Any]


class Complaints:
    """What is wrong with a source, gathered so that one look tells all of it.

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
        """One more: `where` is the line or row, and `what` goes on from there."""
        self._found.append((where, what))

    def raise_any(self) -> None:
        """Nothing, if all is well.

        Raises:
            BadInput: it is not; the first complaints are quoted and the others counted.
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
    """By file and then by line, line 9 before line 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", complaint[0])]


def read_text(file: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        BadInput: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        where = f"line {line}, " if file.suffix == ".jsonl" else ""
        raise BadInput(
            f"{file} is not UTF-8 text: {where}byte {error.start} cannot be decoded; "
            "save it as UTF-8, or name only text files"
        ) from error
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from error


def json_lines(file: Path, complaints: Complaints, named: bool = False) -> Iterator[Record]:
    """The object in each line that is not empty; lines that hold none are complained of.

    `named` lines tell their file, where it is one of several.

    Raises:
        BadInput: the file cannot be read.
    """
    # Only \n ends a line here: JSON strings may hold the others that splitlines knows.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}" if named else f"line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            complaints.add(where, f"is not JSON: {error}")
            continue
        if isinstance(fields, dict):
            yield Record(where, fields)
        else:
            complaints.add(where, "is not a JSON object")


def half_pair(text: str) -> str | None:
    """What is wrong with a text that cannot be written in UTF-8, or `None`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds \\u{ord(text[error.start]):04x}, half of a character pair"
    return None
