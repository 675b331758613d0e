"""Reading a prompt, lechat beside lechat_torch and transformers: how fast, in how much memory?"""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from lechat_jax.config import preset
from lechat_jax.errors import BadInput
from parity.bench.decoders.contestants import (
    SEED,
    Models,
    check_numbers,
    check_packages,
    compare,
    contestant_of,
    contestants,
    torch_decoders,
)
from parity.bench.decoders.fresh_process import Folders, peak_bytes
from parity.bench.decoders.lechat import IMPLS, Decoder, DtypeName, Impl, Prompts, random_prompts
from parity.measure import in_turn, machine_line, read_speed, wait_until_idle
from parity.report import Report, Row, TableText


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Tokens a second of reading a prompt, from nothing until the first new token is there.

    lechat and its PyTorch reference read chunk by chunk into their rings; transformers' Mistral
    reads 4,096 tokens in a forward pass, with the logits of the last position only and with the
    faster of its attentions. The same random weights and prompts, in turn: A B A B.
    """

    preset: str = "bench-284m"
    """Model to run: a name such as bench-284m or lechat-15m."""
    tokens: tuple[int, ...] = (4096,)
    """Lengths of the prompt; several are measured one after the other."""
    batch: tuple[int, ...] = (1,)
    """Prompts at once; several likewise."""
    dtype: tuple[DtypeName, ...] = ("float32",)
    """Types of the weights. int8 and int4 are lechat's alone."""
    impl: tuple[Impl, ...] = IMPLS
    """Whom to measure."""
    repetitions: int = 3
    """Times that each is measured; the median counts."""
    memory: bool = False
    """Measure the peak memory of fresh processes that load the weights and read the prompt."""
    json: Path | None = None
    """JSON file for the report."""
    read_gb: float = 1.0
    """Size of the array whose reading measures the memory bandwidth, in GB."""

    def __post_init__(self) -> None:
        check_numbers({"batch": self.batch, "tokens": self.tokens})
        check_numbers({"repetitions": [self.repetitions]})
        if not self.read_gb > 0:
            raise BadInput(f"--read-gb must be more than 0, not {self.read_gb}")
        if not contestants(self.impl, self.dtype):
            raise BadInput(
                "int8 and int4 are lechat's alone: name it in --impl, or another --dtype"
            )

    def run(self, console: Console) -> Report:
        """Measures, telling what it is about, and prints a table.

        Raises:
            BadInput: the options do not fit, or a package is missing.
        """
        models = Models(preset(self.preset))
        check_packages(self.impl)
        read = read_speed(self.read_gb)
        report = Report(machine_line(), read.gb_s, [], [f"memory was read by {read.how}"])
        for batch in self.batch:
            for tokens in self.tokens:
                console.print(f"batch {batch}, {tokens} tokens", markup=False)
                report.rows += self.measure(models, batch, tokens)
        if self.memory:
            with tempfile.TemporaryDirectory(prefix="parity-") as folder:
                folders = Folders(Path(folder), models)
                report.rows = [self.with_memory(folders, row, console) for row in report.rows]
        report.show(console, figures(report.rows))
        return report

    def measure(self, models: Models, batch: int, tokens: int) -> list[Row]:
        """A row for each contestant, all in turn."""
        prompts = random_prompts(models.config, batch, tokens, SEED)
        decoders = {who: models.decoder(who) for who in contestants(self.impl, self.dtype)}
        with contextlib.ExitStack() as settled:
            for who, decoder in decoders.items():
                if who.impl == "transformers":
                    settled.enter_context(torch_decoders().reading(decoder, prompts))
                decoder.start(prompts, 1)  # compiles
            tasks = {who: repetition(decoder, prompts) for who, decoder in decoders.items()}
            times = in_turn(tasks, self.repetitions)
            notes = {who: decoder.note for who, decoder in decoders.items()}
        rows = [
            Row(
                work="prefill",
                impl=who.impl,
                dtype=who.dtype,
                batch=batch,
                context=tokens,
                tokens_per_s=batch * tokens / statistics.median(seconds),
                peak_bytes=None,
                note=notes[who],
                details={
                    "seconds": statistics.median(seconds),
                    "rates": [batch * tokens / one for one in seconds],
                },
            )
            for who, seconds in times.items()
        ]
        compare(rows, "rates")
        return rows

    def with_memory(self, folders: Folders, row: Row, console: Console) -> Row:
        """The row with the peak memory of a process of its own."""
        who = contestant_of(row)
        console.print(f"memory of {who.impl} in {who.dtype}", markup=False)
        peak = peak_bytes(folders, who, row.batch, row.context, 1, whole=True)
        own = folders.weight_bytes(who.dtype)
        details = {"weight_bytes": own, "peak_over_weights": peak / own if peak else None}
        return dataclasses.replace(row, peak_bytes=peak, details=row.details | details)


def repetition(decoder: Decoder, prompts: Prompts) -> Callable[[], float]:
    """Measures the seconds until the first token of each prompt."""

    def seconds() -> float:
        wait_until_idle()
        began = time.perf_counter()
        decoder.start(prompts, 1)
        return time.perf_counter() - began

    return seconds


def figures(rows: list[Row]) -> TableText:
    """The rows of the report in words."""
    lines = []
    for row in rows:
        peak, details = row.peak_bytes, row.details
        lines.append(
            [
                row.impl,
                row.dtype,
                str(row.batch),
                str(row.context),
                f"{row.tokens_per_s or 0:,.0f}",
                f"{details['seconds']:.2f}",
                f"{details['ratio']:.2f}" if "ratio" in details else "",
                "" if peak is None else f"{peak / 1e9:.2f} GB",
                "" if peak is None else f"{details['peak_over_weights']:.2f}",
                row.note,
            ]
        )
    header = ["reading", "type", "batch", "tokens", "tokens/s", "seconds", "ratio"]
    return TableText([*header, "peak memory", "of the weights", "note"], lines)
