"""Prefill, lechat beside lechat_torch and transformers: how fast, in how much memory?"""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from parity.bench.decoders.contestants import (
    SEED,
    Contestant,
    Generation,
    Models,
    compare,
    torch_decoders,
)
from parity.bench.decoders.lechat import Decoder, Prompts, random_prompts
from parity.bench.decoders.start_and_memory import Folders, with_memory
from parity.bench.work import cell
from parity.measure import interleaved, wait_until_idle
from parity.report import Report, Row, TableText


@dataclasses.dataclass(frozen=True)
class Prefill(Generation):
    """Tokens a second of reading a prompt, from nothing until the first new token is there.

    lechat and its PyTorch reference read chunk by chunk into their rings; transformers' Mistral
    reads 4,096 tokens in a forward pass, with the logits of the last position only and with the
    faster of its attentions. The same random weights and prompts, in turn: A B A B.
    """

    tokens: tuple[int, ...] = (4096,)
    """Tokens of a prompt; several lengths are measured one after the other."""
    repetitions: int = 3
    """Times that each is measured; the median counts."""

    COUNTS = ("batch", "tokens", "repetitions")

    def run(self, console: Console) -> Report:
        """See `Work.run`."""
        models, report = self.start()
        for batch in self.batch:
            for tokens in self.tokens:
                console.print(f"batch {batch}, {tokens} tokens", markup=False)
                report.rows += self.measure(models, batch, tokens)
        if self.memory:
            with tempfile.TemporaryDirectory(prefix="parity-") as folder:
                folders = Folders(Path(folder), models)
                for number, row in enumerate(report.rows):
                    console.print(f"memory of {row.impl} in {row.dtype}", markup=False)
                    report.rows[number] = with_memory(folders, row, 1)
        report.show(console, figures(report.rows))
        return report

    def measure(self, models: Models, batch: int, tokens: int) -> list[Row]:
        """Rows of prefill at one batch and length: one a contestant, measured in turn."""
        prompts = random_prompts(models.config, batch, tokens, SEED)
        decoders = {who: models.decoder(who) for who in self.contestants}
        with contextlib.ExitStack() as stack:
            tasks = {
                who: stack.enter_context(prefill(who, decoder, prompts))
                for who, decoder in decoders.items()
            }
            times = interleaved(tasks, self.repetitions)
            rows = [
                figures_of(who, batch, tokens, times[who], decoder.note)
                for who, decoder in decoders.items()
            ]
        compare(rows, "rates")
        return rows


@contextlib.contextmanager
def prefill(who: Contestant, decoder: Decoder, prompts: Prompts) -> Iterator[Callable[[], float]]:
    """A timed repetition of prefill, in seconds until the first token; all is compiled."""

    def seconds() -> float:
        wait_until_idle()
        began = time.perf_counter()
        decoder.start(prompts, 1)
        return time.perf_counter() - began

    is_peer = who.impl == "transformers"
    with (
        torch_decoders().fastest_prefill(decoder, prompts) if is_peer else contextlib.nullcontext()
    ):
        decoder.start(prompts, 1)  # compiles
        yield seconds


def figures_of(who: Contestant, batch: int, tokens: int, times: Sequence[float], note: str) -> Row:
    """The row of a contestant, from the seconds of each repetition."""
    seconds = statistics.median(times)
    return Row(
        work="prefill",
        impl=who.impl,
        dtype=who.dtype,
        batch=batch,
        context=tokens,
        tokens_per_s=batch * tokens / seconds,
        peak_bytes=None,
        note=note,
        details={"seconds": seconds, "rates": [batch * tokens / one for one in times]},
    )


def figures(rows: list[Row]) -> TableText:
    """The table of the report."""
    lines = [
        [
            row.impl,
            row.dtype,
            str(row.batch),
            str(row.context),
            cell("{:,.0f}", row.tokens_per_s),
            cell("{:.2f}", row.details["seconds"]),
            cell("{:.2f}", row.details.get("ratio")),
            cell("{:.2f} GB", row.peak_bytes, 1e9),
            cell("{:.2f}", row.details.get("peak_over_weights")),
            row.note,
        ]
        for row in rows
    ]
    header = ["reading", "type", "batch", "tokens", "tokens/s", "seconds", "ratio"]
    return TableText([*header, "peak memory", "of the weights", "note"], lines)
