"""Decoding, lechat beside lechat_torch and transformers: how near to the speed of the memory?"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lechat_jax.errors import BadInput
from lechat_jax.generate.loaded_model import MOST_DRAFT
from parity.bench.decoders.contestants import (
    SEED,
    Contestant,
    Generation,
    Models,
    compare,
    contestant_of,
    tail,
    torch_decoders,
)
from parity.bench.decoders.lechat import (
    Decoder,
    DtypeName,
    Lechat,
    Prompts,
    random_prompts,
    repeating,
)
from parity.bench.decoders.start_and_memory import Folders, first_tokens, with_memory
from parity.bench.pictures import draw_bars
from parity.bench.work import cell
from parity.measure import interleaved, read_speed, wait_until_idle
from parity.peers.installed import cold_torch_compiler
from parity.report import Report, Row, TableText

READ = "read"  # the task that reads memory, in turn with the others
PHRASE = 32  # tokens that the prompt of --speculate repeats
SHORT = 256  # most tokens of a prompt that is read in full: of --speculate and of --first-token


@dataclasses.dataclass(frozen=True)
class Decode(Generation):
    """Tokens a second, one after the other, beside the speed at which memory is read.

    lechat, its PyTorch reference, transformers' Mistral in the fastest of its ways and, where it is
    named, llama.cpp continue the same prompts with the same random weights, greedily, in turn: A B
    A B. Memory is read in each turn as well, and a share of it is that of the same turn.
    """

    context: tuple[int, ...] = (100,)
    """Tokens of a prompt, read before the decoding that is timed; several lengths are measured one
    after the other."""
    tokens: int = 64
    """Tokens that a repetition decodes in each row."""
    compile: bool = True
    """Try transformers under torch.compile too, which may take minutes."""
    speculate: int = 0
    """Tokens a step that lechat's prompt lookup decoding proposes, measured beside plain decoding
    on a prompt that repeats itself; 0 leaves this out."""
    first_token: bool = False
    """Measure also the time to first token of lechat_jax.generate, from the start of the process,
    with an empty compilation cache and with a filled one."""
    plot: Path | None = None
    """PNG file for a bar chart of the tokens a second."""

    COUNTS = ("batch", "context", "tokens", "repetitions")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.speculate <= MOST_DRAFT:
            raise BadInput(f"--speculate must be from 0 (off) to {MOST_DRAFT}")
        if self.speculate and "lechat_jax" not in self.impl:
            raise BadInput("--speculate measures lechat_jax, so name it in --impl")

    def run(self, console: Console) -> Report:
        """See `Work.run`."""
        models, report = self.start()
        with cold_torch_compiler():
            for batch in self.batch:
                for context in self.context:
                    console.print(f"batch {batch}, context {context}", markup=False)
                    report.rows += self.measure(models, batch, context, report)
            if self.speculate:
                console.print(f"guessing {self.speculate} tokens ahead", markup=False)
                for dtype in self.dtype:
                    report.rows += self.guess(models, dtype)
        if self.memory or self.first_token:
            self.measure_processes(models, report, console)
        report.notes += NOTES
        if self.plot:
            draw_bars(report, self.plot)
        report.show(console, figures(report.rows))
        return report

    def measure(self, models: Models, batch: int, context: int, report: Report) -> list[Row]:
        """Rows of decoding at one batch and context: one a contestant, measured in turn."""
        skip = context - tail(models.config, context)
        prompts = random_prompts(models.config, batch, context, SEED)
        decoders = {who: models.decoder(who) for who in self.contestants}
        tried: dict[Contestant, dict[str, float]] = {}
        tasks: dict[Contestant | str, Callable[[], float]] = {}
        for who, decoder in decoders.items():
            if who.impl == "transformers":
                wait_until_idle()
                tried[who] = torch_decoders().settle(decoder, prompts, self.compile)
            tasks[who] = started(decoder, prompts, self.tokens, self.repetitions, skip)
        tasks[READ] = lambda: read_speed(self.read_gb).gb_s
        rates = interleaved(tasks, self.repetitions)
        reads = rates.pop(READ)
        report.read_gb_s = max(report.read_gb_s, *reads)
        ours = decoders.get(Contestant("lechat_jax", "float32"))
        rows = []
        for who, decoder in decoders.items():
            row = figures_of(models, who, batch, context, rates[who], reads)
            row.details["same_ids"] = agreement(ours, decoder) if ours else None
            if who in tried:
                row.details["tried_s_per_token"] = tried[who]
            rows.append(dataclasses.replace(row, note=decoder.note))
        compare(rows, "rates")
        return rows

    def guess(self, models: Models, dtype: DtypeName) -> list[Row]:
        """Rows of prompt lookup decoding beside plain decoding, on a prompt that repeats itself.

        The model goes on with it, as a model does that has learnt to copy: its work is that of
        any other, but its weights are made so that it does.
        """
        config, context = models.config, max(self.context[0], 2 * PHRASE)
        phrase = sorted({*random_prompts(config, 1, PHRASE, SEED)[0]})
        prompt = [phrase[i % len(phrase)] for i in range(context)]
        drafts = (0, self.speculate)
        weights = repeating(models.weights(dtype), phrase)
        decoders = {draft: Lechat(config, weights, draft) for draft in drafts}
        tasks: dict[int | str, Callable[[], float]] = {
            draft: started(decoder, [prompt], self.tokens, self.repetitions)
            for draft, decoder in decoders.items()
        }
        tasks[READ] = lambda: read_speed(self.read_gb).gb_s
        rates = interleaved(tasks, self.repetitions)
        reads = rates.pop(READ)
        rows = []
        for draft, decoder in decoders.items():
            who = Contestant("lechat_jax", dtype)
            row = figures_of(models, who, 1, context, rates[draft], reads)
            ratios = [a / b for a, b in zip(rates[draft], rates[0], strict=True)]
            same = agreement(decoders[0], decoder)
            n = min(len(one.ids[0]) for one in decoders.values())
            row.details.update(
                draft=draft,
                speedup=statistics.median(ratios),
                same_ids=same,
                identical=same == n,
            )
            note = f"{draft} guessed ahead: {row.details['speedup']:.2f} times as fast, " + (
                f"the same {n} tokens" if same == n else f"but other tokens after {same}"
            )
            rows.append(dataclasses.replace(row, note=note if draft else "nothing guessed"))
        return rows

    def measure_processes(self, models: Models, report: Report, console: Console) -> None:
        """Adds peak memory and time to first token to the rows, each from a process of its own."""
        with tempfile.TemporaryDirectory(prefix="parity-") as folder:
            folders = Folders(Path(folder), models)
            starts: dict[str, dict[str, Any]] = {}
            for number, row in enumerate(report.rows):
                who = contestant_of(row)
                if "draft" in row.details:
                    continue
                if self.memory:
                    console.print(f"memory of {who.impl} in {who.dtype}", markup=False)
                    skip = row.context - tail(models.config, row.context)
                    report.rows[number] = row = with_memory(folders, row, self.tokens, skip)
                if self.first_token and who.impl == "lechat_jax":
                    if who.dtype not in starts:
                        console.print(f"first token in {who.dtype}", markup=False)
                        prompt = min(self.context[0], SHORT)
                        starts[who.dtype] = first_tokens(folders, who.dtype, prompt)
                    row.details.update(starts[who.dtype])


NOTES = [
    "share: of the speed at which memory is read, in the same turn, for the weights without the "
    "embedding table and the keys and values of the window",
    "ratio: to transformers in the same type, or to its fastest where it has none, in the same "
    "turn; to llama.cpp: in the same type, its q8_0 and q4_0 for int8 and int4",
]


def started(
    decoder: Decoder, prompts: Prompts, tokens: int, repetitions: int, skip: int = 0
) -> Callable[[], float]:
    """A timed repetition of decoding, in tokens of a row a second; all is read and compiled."""
    decoder.start(prompts, tokens * (1 + repetitions), skip)
    decoder.advance(tokens)

    def rate() -> float:
        wait_until_idle()
        began = time.perf_counter()
        n = decoder.advance(tokens)
        return n / (time.perf_counter() - began)

    return rate


def figures_of(
    models: Models,
    who: Contestant,
    batch: int,
    context: int,
    rates: Sequence[float],
    reads: Sequence[float],
) -> Row:
    """The row of a contestant, from its tokens of a row a second and the GB/s of memory reads."""
    n_bytes = models.bytes_a_step(who.dtype, batch, context)
    shares = [rate * n_bytes / 1e9 / read for rate, read in zip(rates, reads, strict=True)]
    return Row(
        work="decode",
        impl=who.impl,
        dtype=who.dtype,
        batch=batch,
        context=context,
        tokens_per_s=batch * statistics.median(rates),
        peak_bytes=None,
        details={
            "bytes_per_step": n_bytes,
            "share_of_read": statistics.median(shares),
            "limit_tokens_per_s": batch * statistics.median(reads) * 1e9 / n_bytes,
            "rates": [batch * rate for rate in rates],
        },
    )


def agreement(one: Decoder, other: Decoder) -> int:
    """Length of the common prefix of two greedy continuations, the shortest over the rows."""
    n = min(len(row) for row in (*one.ids, *other.ids))
    pairs = list(zip(one.ids, other.ids, strict=True))
    differ = (i for i in range(n) if any(a[i] != b[i] for a, b in pairs))
    return next(differ, n)


def figures(rows: list[Row]) -> TableText:
    """The table of the report."""
    lines = []
    for row in rows:
        details = row.details
        cold, warm = details.get("first_token_cold_s"), details.get("first_token_warm_s")
        lines.append(
            [
                row.impl,
                row.dtype,
                str(row.batch),
                str(row.context),
                cell("{:,.1f}", row.tokens_per_s),
                cell("{:.3g}", details["bytes_per_step"], 1e9),
                cell("{:.0%}", details["share_of_read"]),
                cell("{:.2f}", details.get("ratio")),
                cell("{:.2f}", details.get("ratio_to_llama_cpp")),
                cell("{:.2f} GB", row.peak_bytes, 1e9),
                "" if cold is None else f"{cold:.1f} / {warm:.1f}",
                row.note,
            ]
        )
    header = "decoding,type,batch,context,tokens/s,GB a step,share,ratio".split(",")
    header += ["to llama.cpp", "peak memory"]
    return TableText([*header, "first token cold / warm (s)", "note"], lines)
