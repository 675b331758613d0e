"""All that is to be known of a card, in one run of a few minutes, most important first."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from lechat_jax.config import preset
from lechat_jax.errors import BadInput
from parity.bench.card_worker import Part
from parity.bench.decoders.contestants import Contestant, check_numbers
from parity.bench.decoders.lechat import IMPLS, Impl
from parity.measure import machine_line
from parity.report import Report, Row, TableText

GRACE_S = 20.0  # that a part which has begun may take longer than there is time


class Turn(NamedTuple):
    """A process of its own, so that its memory is free for the next.

    Attributes:
        who: is measured in it.
        share: of all the time, by which it has to be over.
        parts: most important first.
    """

    who: Contestant
    share: float
    parts: list[Part]


@dataclasses.dataclass(frozen=True)
class Card:
    """Decoding and reading by all, on one card, in a limited time: the figures to begin with.

    Random weights, made on the card, a process for each model. Whatever fails becomes a row
    that says why, and what there was no time for is listed. Processes do not take turns, since
    a card holds only one such model: compare what differs by more than a card drifts.
    """

    preset: str = "mistral-7b-v0.1"
    """Model to run."""
    minutes: float = 8.0
    """Time for everything."""
    context: tuple[int, ...] = (128, 4096)
    """Tokens read before those that are decoded."""
    rows: int = 32
    """Rows at once, beside one alone."""
    prompt: tuple[int, ...] = (4096, 32768)
    """Lengths of the prompts that are read."""
    tokens: int = 64
    """Tokens of each row in a repetition."""
    impl: tuple[Impl, ...] = IMPLS
    """Whom to measure."""
    int8: bool = True
    """Measure lechat with int8 weights too."""
    read_gb: float = 4.0
    """Size of the array whose reading measures the memory bandwidth, in GB."""
    json: Path | None = None
    """JSON file for the report."""

    def __post_init__(self) -> None:
        check_numbers({"context": self.context, "rows": [self.rows], "prompt": self.prompt})
        check_numbers({"tokens": [self.tokens]})
        if not self.minutes > 0:
            raise BadInput(f"--minutes must be more than 0, not {self.minutes}")
        if not self.read_gb > 0:
            raise BadInput(f"--read-gb must be more than 0, not {self.read_gb}")

    def run(self, console: Console) -> Report:
        """Measures, telling each figure as it comes, and prints a table.

        Raises:
            BadInput: the options do not fit.
        """
        preset(self.preset)
        began = time.time()
        report = Report("", 0.0, [])
        for turn in self.turns():
            console.print(f"{turn.who.impl} in {turn.who.dtype}", markup=False)
            report.rows += self.take(turn, began, console)
        report.machine = machine_line()  # last, since it takes some of the memory
        report.read_gb_s = max(row.details.get("read_gb_s", 0.0) for row in report.rows)
        left_out = [row for row in report.rows if row.tokens_per_s is None]
        report.details["not_measured"] = [_name(row) for row in left_out]
        report.details["seconds"] = time.time() - began
        report.notes.append(f"{time.time() - began:.0f} s for all; one process after the other")
        if left_out:
            report.notes.append(f"not measured: {'; '.join(map(_name, left_out))}")
        report.show(console, figures(report.rows))
        return report

    def turns(self) -> list[Turn]:
        """All processes, most important first."""
        alone = [Part("decode", 1, context) for context in self.context]
        many = Part("decode", self.rows, self.context[0])
        short, *long = (Part("prefill", 1, prompt) for prompt in self.prompt)
        parts = [*alone, short, many, *long]
        turns = [
            Turn(Contestant("lechat_jax", "bfloat16"), 0.35, parts),
            Turn(Contestant("transformers", "bfloat16"), 0.7, parts),
            Turn(Contestant("lechat_jax", "int8"), 0.88, [*alone, many]),
            Turn(Contestant("lechat_torch", "bfloat16"), 1.0, [*alone, short, many]),
        ]
        return [
            turn
            for turn in turns
            if turn.who.impl in self.impl and (self.int8 or turn.who.dtype != "int8")
        ]

    def take(self, turn: Turn, began: float, console: Console) -> list[Row]:
        """A row for each part of a process, measured or not."""
        until = began + turn.share * self.minutes * 60
        job = {
            "impl": turn.who.impl,
            "dtype": turn.who.dtype,
            "preset": self.preset,
            "tokens": self.tokens,
            "read_gb": self.read_gb,
            "until": until,
            "parts": turn.parts,
        }
        found: dict[Part, dict[str, Any]] = {}
        missing = "not measured: there was no time left"
        for line in lines_of(job, until + GRACE_S):
            fields = json.loads(line)
            if "error" in fields:
                missing = fields["error"]
                continue
            part = Part(*fields.pop("part"))
            found[part] = fields
            speed = fields.get("tokens_per_s")
            told = f"{speed:,.1f} tokens/s" if speed else fields["note"]
            console.print(f"  {part.work} {part.batch} x {part.context}: {told}", markup=False)
        return [row(turn.who, part, found.get(part, {"note": missing})) for part in turn.parts]


def lines_of(job: dict[str, Any], until: float) -> Iterator[str]:
    """What a process of `card_part` writes, until it ends or there is no more time.

    If it fails, the last line has the reason as `error`.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "parity.bench.card_worker"],
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=told,
            encoding="utf-8",
            errors="replace",
        )
        assert process.stdin is not None
        assert process.stdout is not None
        is_late = threading.Event()

        def stop() -> None:
            is_late.set()  # before the end of its output can be seen
            process.kill()

        clock = threading.Timer(max(1.0, until - time.time()), stop)
        clock.start()
        try:
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            yield from (line for line in process.stdout if line.startswith("{"))
            process.wait()
        finally:
            clock.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
        if process.returncode and not is_late.is_set():
            told.seek(0)
            last = (told.read().strip().splitlines() or ["it said nothing"])[-1]
            yield json.dumps({"error": f"not measured: {last[:200]}"})


def row(who: Contestant, part: Part, found: dict[str, Any]) -> Row:
    """The figures of a part."""
    own = ("tokens_per_s", "peak_bytes", "note")
    return Row(
        work=part.work,
        impl=who.impl,
        dtype=who.dtype,
        batch=part.batch,
        context=part.context,
        tokens_per_s=found.get("tokens_per_s"),
        peak_bytes=found.get("peak_bytes"),
        note=found["note"],
        details={key: value for key, value in found.items() if key not in own},
    )


def _name(row: Row) -> str:
    return f"{row.work} {row.impl} {row.dtype} {row.batch} x {row.context}"


def figures(rows: list[Row]) -> TableText:
    """The rows of the report in words."""
    lines = []
    for row in rows:
        share = row.details.get("share_of_read")
        lines.append(
            [
                row.work,
                row.impl,
                row.dtype,
                str(row.batch),
                str(row.context),
                "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.1f}",
                "" if share is None else f"{share:.0%}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f} GB",
                row.note,
            ]
        )
    header = ["work", "", "type", "batch", "context", "tokens/s", "share of the bandwidth"]
    return TableText([*header, "peak memory so far", "note"], lines)
