"""Benchmark of one accelerator: decoding and prefill in a few minutes, most important first."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

from rich.console import Console

from lechat_jax.config import preset
from lechat_jax.errors import BadInput
from parity.bench import isolated
from parity.bench.decode import figures_of as decode_figures
from parity.bench.decode import started
from parity.bench.decoders.contestants import SEED, Contestant, Models, tail, torch_decoders
from parity.bench.decoders.lechat import IMPLS, Impl, Prompts, random_prompts
from parity.bench.prefill import figures_of as prefill_figures
from parity.bench.prefill import prefill
from parity.bench.work import Work, cell, first_line
from parity.measure import machine_line, read_speed
from parity.report import Report, Row, TableText

GRACE_S = 20.0  # that a part which has begun may take longer than there is time
REPETITIONS = 3
COMPILING_S = 60.0  # torch.compile is tried only if there is so much time
LATE = "not measured: there was no time left"


class Part(NamedTuple):
    """One thing to measure.

    Attributes:
        work: tokens one after the other, or a prompt.
        batch: rows at once.
        context: tokens read before, or those of the prompt.
    """

    work: Literal["decode", "prefill"]
    batch: int
    context: int


class Process(NamedTuple):
    """An isolated process, so that its memory is free for the next.

    Attributes:
        who: is measured in it.
        share: of all the time, by which it has to be over.
        parts: most important first.
    """

    who: Contestant
    share: float
    parts: list[Part]


@dataclasses.dataclass(frozen=True)
class Card(Work):
    """Decoding and prefill by all, on one card, in a limited time: the figures to begin with.

    Random weights, made on the card, a process for each model. Whatever fails becomes a row
    that says why, and what there was no time for is listed. Processes do not take turns, since
    a card holds only one such model: compare what differs by more than a card drifts.
    """

    preset: str = "mistral-7b-v0.1"
    """Model to run: a name such as mistral-7b-v0.1 or lechat-15m."""
    minutes: float = 8.0
    """Minutes for everything."""
    context: tuple[int, ...] = (128, 4096)
    """Tokens of a prompt, read before the decoding that is timed; each length is measured."""
    rows: int = 32
    """Prompts at once in the larger batch, which is measured beside a single one."""
    prompt: tuple[int, ...] = (4096, 32768)
    """Tokens of the prompts whose prefill is timed; each length is measured."""
    tokens: int = 64
    """Tokens that a repetition decodes in each row."""
    impl: tuple[Impl, ...] = IMPLS
    """Implementations to measure."""
    int8: bool = True
    """Measure lechat with int8 weights too."""
    read_gb: float = 4.0
    """Size of the array whose reading measures the memory bandwidth, in GB."""

    COUNTS = ("context", "rows", "prompt", "tokens")
    AMOUNTS = ("minutes", "read_gb")

    def run(self, console: Console) -> Report:
        """See `Work.run`; what fails becomes a row."""
        preset(self.preset)
        began = time.time()
        report = Report("", 0.0, [])
        for process in self.processes():
            console.print(f"{process.who.impl} in {process.who.dtype}", markup=False)
            report.rows += self.take(process, began, console)
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

    def processes(self) -> list[Process]:
        """All processes, most important first."""
        alone = [Part("decode", 1, context) for context in self.context]
        many = Part("decode", self.rows, self.context[0])
        short, *long = (Part("prefill", 1, prompt) for prompt in self.prompt)
        parts = [*alone, short, many, *long]
        processes = [
            Process(Contestant("lechat_jax", "bfloat16"), 0.35, parts),
            Process(Contestant("transformers", "bfloat16"), 0.7, parts),
            Process(Contestant("lechat_jax", "int8"), 0.88, [*alone, many]),
            Process(Contestant("lechat_torch", "bfloat16"), 1.0, [*alone, short, many]),
        ]
        return [
            process
            for process in processes
            if process.who.impl in self.impl and (self.int8 or process.who.dtype != "int8")
        ]

    def take(self, process: Process, began: float, console: Console) -> list[Row]:
        """A row for each part of a process, measured or not."""
        until = began + process.share * self.minutes * 60
        limit, rows, missing = until + GRACE_S, [], LATE
        try:
            for row in isolated.run("not measured", measured, self, process, until, until=limit):
                told = cell("{:,.1f} tokens/s", row.tokens_per_s) or row.note
                console.print(f"  {row.work} {row.batch} x {row.context}: {told}", markup=False)
                rows.append(row)
        except BadInput as error:
            missing = str(error)
        return rows + [
            not_measured(process.who, part, missing) for part in process.parts[len(rows) :]
        ]


def measured(card: Card, process: Process, until: float) -> Iterator[Row]:
    """The job of an isolated process: a row for each part of a process, as soon as it is over.

    So what was measured is kept when the rest fails or there is no time left for it: after
    `until`, in seconds since the epoch, no part begins.
    """
    bandwidth = read_speed(card.read_gb).gb_s
    who, models = process.who, Models(preset(card.preset).text)
    if who.dtype == "int8":
        models.weights("bfloat16")  # what it is made of, and computed in
    decoder = models.decoder(who)
    is_settled = who.impl != "transformers"
    for part in process.parts:
        if time.time() > until:
            yield not_measured(who, part, LATE)
            continue
        try:
            prompts = random_prompts(models.config, part.batch, part.context, SEED)
            if part.work == "decode" and not is_settled:
                torch_decoders().settle(decoder, prompts, until - time.time() > COMPILING_S)
                is_settled = True  # the other parts are decoded in the same way
            work = decoded if part.work == "decode" else read
            row = work(models, who, prompts, card.tokens, bandwidth)
        except Exception as error:  # such as too little memory: the next part may fit
            yield not_measured(who, part, f"not measured: {first_line(error)[:200]}")
        else:
            row.details["read_gb_s"] = bandwidth
            yield dataclasses.replace(row, peak_bytes=device_peak(models, who))


def decoded(
    models: Models, who: Contestant, prompts: Prompts, tokens: int, bandwidth: float
) -> Row:
    """The row of decoding after these prompts."""
    batch, context = len(prompts), len(prompts[0])
    decoder, skip = models.decoder(who), context - tail(models.config, context)
    rate = started(decoder, prompts, tokens, REPETITIONS, skip)
    rates = [rate() for _ in range(REPETITIONS)]
    row = decode_figures(models, who, batch, context, rates, [bandwidth] * REPETITIONS)
    return dataclasses.replace(row, note=decoder.note)


def read(models: Models, who: Contestant, prompts: Prompts, tokens: int, bandwidth: float) -> Row:
    """The row of the prefill of these prompts."""
    decoder = models.decoder(who)
    with prefill(who, decoder, prompts) as seconds:
        times = [seconds() for _ in range(REPETITIONS)]
        return prefill_figures(who, len(prompts), len(prompts[0]), times, decoder.note)


def device_peak(models: Models, who: Contestant) -> int | None:
    """Bytes of the device so far, weights included; not of int8, which is made of the others."""
    peak = models.decoder(who).device_bytes()
    if peak is None or who.dtype == "int8":
        return None
    if who.impl == "lechat_jax":
        return peak
    # PyTorch computes with JAX's memory, and does not count it.
    return peak + sum(leaf.nbytes for leaf in models.weights(who.dtype).values())


def not_measured(who: Contestant, part: Part, why: str) -> Row:
    """The row of a part without a figure."""
    return Row(part.work, who.impl, who.dtype, part.batch, part.context, None, None, note=why)


def _name(row: Row) -> str:
    return f"{row.work} {row.impl} {row.dtype} {row.batch} x {row.context}"


def figures(rows: list[Row]) -> TableText:
    """The table of the report."""
    lines = [
        [
            row.work,
            row.impl,
            row.dtype,
            str(row.batch),
            str(row.context),
            cell("{:,.1f}", row.tokens_per_s),
            cell("{:.0%}", row.details.get("share_of_read")),
            cell("{:.2f} GB", row.peak_bytes, 1e9),
            row.note,
        ]
        for row in rows
    ]
    header = ["work", "", "type", "batch", "context", "tokens/s", "share of the bandwidth"]
    return TableText([*header, "peak memory so far", "note"], lines)
