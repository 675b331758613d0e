"""What a benchmark says: rows of figures, for a person as a table and for a script as JSON."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import ROUNDED
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lechat_jax.files.atomic import write_atomic


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure: how fast one implementation did one work.

    Attributes:
        work: `train`, `attention` or `convert`.
        impl: whose code it was.
        dtype: of the arithmetic.
        batch: rows at once, B; 0 where there are none.
        context: tokens in a row, T; 0 where there are none.
        tokens_per_s: median of the repetitions; `None` when it did not run.
        peak_bytes: most memory it took; `None` where that is not known.
        losses: of the first steps, in nats a token.
        note: what a reader of the figure should know, or nothing.
        details: further keys that only this work has.
    """

    work: str
    impl: str
    dtype: str
    batch: int
    context: int
    tokens_per_s: float | None
    peak_bytes: int | None
    losses: list[float] = dataclasses.field(default_factory=list)
    note: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON types, its details beside the keys that every work has."""
        fields = dataclasses.asdict(self)
        return fields | fields.pop("details")


@dataclasses.dataclass
class Report:
    """What one run of a benchmark found, with the machine it ran on.

    Attributes:
        machine: in one line; see `machine_line`.
        read_gb_s: memory bandwidth in the same run, 1e9 bytes a second; see `read_speed`.
        rows: the figures.
        notes: sentences for the reader.
        details: further top-level keys that only this work has.
    """

    machine: str
    read_gb_s: float
    rows: list[Row]
    notes: list[str] = dataclasses.field(default_factory=list)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            "machine": self.machine,
            "read_gb_s": self.read_gb_s,
            "rows": [row.to_dict() for row in self.rows],
            "notes": self.notes,
            **self.details,
        }

    def show(self, console: Console, *tables: "TableText") -> None:
        """The tables, then the notes and the machine."""
        for table in tables:
            console.print(table.rich(console.is_terminal))
        console.print(f"memory is read at {self.read_gb_s:.1f} GB/s", markup=False)
        for note in (*self.notes, self.machine):
            console.print(note, markup=False)

    def write(self, path: Path) -> None:
        """The report as a JSON file: all of it, or the old file.

        Raises:
            BadInput: it cannot be written there.
        """
        write_atomic(path, json.dumps(self.to_dict(), indent=1) + "\n")


class TableText(NamedTuple):
    """A table in words: the names of its columns, and its lines."""

    header: Sequence[str]
    lines: Iterable[Sequence[str]]

    def rich(self, framed: bool) -> Table:
        """Ready to print; plain columns when not `framed`."""
        table = Table(box=ROUNDED if framed else None, pad_edge=framed)
        for i, name in enumerate(self.header):
            table.add_column(Text(name), justify="right" if i else "left", overflow="fold")
        for line in self.lines:
            table.add_row(*map(Text, line))
        return table
