"""Options that all benchmarks have: --json and --read-gb, and how numbers are checked."""

import abc
import dataclasses
from pathlib import Path
from typing import ClassVar

from rich.console import Console

from lechat_jax.errors import BadInput
from parity.measure import machine_line, read_speed
from parity.report import Report


@dataclasses.dataclass(frozen=True)
class Work(abc.ABC):
    """The options of one kind of measurement, and how to do it.

    Attributes:
        COUNTS: names of the options that must be at least 1, or each of several numbers must.
        AMOUNTS: names of those that must be more than 0, if they are given.
    """

    json: Path | None = None
    """JSON file to write the report to."""
    read_gb: float = 1.0
    """Size of the array whose reading measures the memory bandwidth, in GB."""

    COUNTS: ClassVar[tuple[str, ...]] = ()
    AMOUNTS: ClassVar[tuple[str, ...]] = ("read_gb",)

    def __post_init__(self) -> None:
        for name in self.COUNTS:
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or min(numbers) < 1:
                told = ", ".join(map(str, numbers)) or "nothing"
                raise BadInput(f"{flag(name)} must be at least 1, not {told}")
        for name in self.AMOUNTS:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise BadInput(f"{flag(name)} must be more than 0, not {value}")

    @abc.abstractmethod
    def run(self, console: Console) -> Report:
        """Measures, telling what it is about, and prints what it found.

        Raises:
            BadInput: the options or the machine do not fit, or a package is missing.
        """

    def report(self) -> Report:
        """A report without rows yet, with the machine and the bandwidth of its memory."""
        read = read_speed(self.read_gb)
        return Report(machine_line(), read.gb_s, [], [f"memory was read by {read.how}"])


def flag(name: str) -> str:
    """An option as it is written on a command line.

    >>> flag("read_gb")
    '--read-gb'
    """
    return f"--{name.replace('_', '-')}"


def first_line(error: Exception) -> str:
    """Of what an error says, or its kind if it says nothing: compilers say pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def cell(form: str, value: float | None, unit: float = 1.0) -> str:
    """A figure in a table, in that unit; nothing where it is not known.

    >>> cell("{:.2f} GB", 5_140_000_000, 1e9), cell("{:.0%}", None)
    ('5.14 GB', '')
    """
    return "" if value is None else form.format(value / unit)
