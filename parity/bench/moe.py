"""Mixture of experts in training: lechat beside transformers' Mixtral and beside itself."""

import dataclasses
import functools
import statistics

import numpy as np
from rich.console import Console

from lechat_jax.config import MistralConfig
from lechat_jax.data.batches import Batches
from lechat_jax.errors import BadInput
from lechat_jax.train.flops import peak_flops
from lechat_jax.train.unused_ids import UnusedIds
from parity.bench.learners.lechat import AdamW, LechatAdamW, Setup, first_weights
from parity.bench.learners.race import PEER, Runner
from parity.bench.work import Work, cell
from parity.measure import wait_until_idle
from parity.peers.installed import load_peer
from parity.report import Report, Row, TableText

STEPS_PER_CALL = 2


@dataclasses.dataclass(frozen=True)
class Moe(Work):
    """Tokens a second in training, in float32 and by AdamW.

    lechat and transformers take turns with the same weights and rows, transformers with both of its
    ways to compute experts that do not copy kernels for each token. Then lechat alone with other
    numbers of experts, of which a token still meets two: the time must not follow their number.
    """

    dim: int = 512
    """Model width."""
    n_layers: int = 4
    """Number of layers."""
    hidden_dim: int = 1792
    """Feed-forward width of an expert."""
    n_experts: int = 8
    """Experts in a layer, two of which a token meets."""
    others: tuple[int, ...] = (4, 16)
    """Further numbers of experts, with which lechat alone is measured in turn."""
    batch: int = 8
    """Rows in a batch."""
    block: int = 128
    """Tokens in a row."""
    turns: int = 5
    """Turns of two steps that are counted; one before them compiles and is not."""
    seed: int = 0
    """Seed of weights and tokens."""

    COUNTS = ("turns",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.n_experts, *self.others) < 2:
            raise BadInput("--n-experts and --others must be at least 2")

    def run(self, console: Console) -> Report:
        """See `Work.run`."""
        peer = load_peer(PEER, "lechat_jax.train")
        report, peak = self.report(), peak_flops("float32")
        adamw = AdamW(rate=3e-4)
        setup = self.setup(self.n_experts)
        runners = [Runner("lechat_jax", functools.partial(LechatAdamW, setup, adamw), setup)]
        for experts in ("eager", "grouped_mm"):
            make = functools.partial(peer.transformers, setup, adamw, "sdpa", False, experts)
            runners.append(Runner(f"transformers-{experts}", make, setup))
        self.interleave(runners, console)
        peak = peak and max(peak, peak_flops("float32") or 0.0)
        ours = runners[0].times
        for runner in runners:
            pairs = zip(runner.times, ours, strict=True)
            ratio = statistics.median(theirs / own for theirs, own in pairs)
            report.rows.append(self.row(runner, peak, ratio))
        del runners, setup
        setups = [self.setup(n) for n in (self.n_experts, *self.others)]
        alone = [
            Runner("lechat_jax", functools.partial(LechatAdamW, one, adamw), one) for one in setups
        ]
        self.interleave(alone, console)
        report.rows += [self.row(runner, peak) for runner in alone]
        report.show(console, figures(report.rows))
        return report

    def config(self, n_experts: int) -> MistralConfig:
        """The Mixtral-like model with so many experts in each layer."""
        return MistralConfig(
            dim=self.dim,
            n_layers=self.n_layers,
            n_heads=self.dim // 64,
            n_kv_heads=max(1, self.dim // 256),
            head_dim=64,
            hidden_dim=self.hidden_dim,
            vocab_size=32000,
            norm_eps=1e-5,
            rope_theta=1e6,
            sliding_window=None,
            n_experts=n_experts,
            n_experts_per_token=2,
        )

    def setup(self, n_experts: int) -> Setup:
        """The training setup: random tokens, since only the time counts."""
        config = self.config(n_experts)
        per_step = self.batch * self.block
        stream = np.random.default_rng(self.seed).integers(config.vocab_size, size=8 * per_step)
        batches = Batches(len(stream), self.block, self.batch, self.seed)
        unused = UnusedIds.none(config.vocab_size)
        weights = first_weights(config, self.seed, unused)
        stream = stream.astype(np.int32)
        return Setup(config, batches, stream, self.seed, weights, unused, STEPS_PER_CALL)

    def interleave(self, runners: list[Runner], console: Console) -> None:
        """Trains all in turn, A B A B, after a first turn that compiles and is not counted."""
        total = STEPS_PER_CALL * (self.turns + 1)
        for turn in range(self.turns + 1):
            for runner in runners:
                wait_until_idle()
                runner.call(STEPS_PER_CALL, total)
                if not turn:
                    n = runner.setup.config.n_experts
                    console.print(f"{runner.impl}, {n} experts: loss {runner.losses[0]:.5f}")

    def row(self, runner: Runner, peak: float | None, ratio: float | None = None) -> Row:
        """The row of a learner; `peak` is of the device, in FLOP/s."""
        n_experts = runner.setup.config.n_experts
        return runner.row("moe", peak, n_experts=n_experts, seconds=runner.times, ratio=ratio)


def figures(rows: list[Row]) -> TableText:
    """The table of the report."""
    lines = [
        [
            row.impl,
            str(row.details["n_experts"]),
            cell("{:,.0f}", row.tokens_per_s),
            cell("{:.0f} %", row.details["mfu"], 0.01),
            cell("{:.2f}", row.details["ratio"]),
        ]
        for row in rows
    ]
    return TableText(["training", "experts", "tokens/s", "MFU", "of lechat's time"], lines)
