"""A mixture of experts in training: lechat beside transformers' Mixtral, and beside itself."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.rows import Rows
from lechat_jax.step import StepOptions, gradient
from parity.learners import initial_weights
from parity.measure import machine_line, read_speed, wait_until_idle
from parity.peer import load_peer
from parity.report import Report, Row, TableText


@dataclasses.dataclass(frozen=True)
class Moe:
    """Tokens a second of a forward and a backward pass, loss included, in float32.

    lechat and transformers take turns with the same weights and rows, transformers with both of its
    ways to compute experts that do not copy kernels for each token. Then lechat alone with other
    numbers of experts, of which a token still meets two: what a pass takes must not follow them.
    """

    dim: int = 512
    """Model width."""
    n_layers: int = 4
    """Number of layers."""
    hidden_dim: int = 1792
    """Width of an expert."""
    n_experts: int = 8
    """Experts in a layer, two of which a token meets."""
    others: tuple[int, ...] = (4, 16)
    """Numbers of experts that lechat is measured with as well."""
    batch: int = 8
    """Rows in a batch."""
    block: int = 128
    """Tokens in a row."""
    turns: int = 5
    """Passes of each that are counted; one before them is not."""
    seed: int = 0
    """Seed of weights and tokens."""
    json: Path | None = None
    """JSON file for the report."""
    read_gb: float = 1.0
    """Size of the array whose reading measures the memory bandwidth, in GB."""

    def __post_init__(self) -> None:
        if self.turns < 1 or min(self.n_experts, *self.others, 2) < 2:
            raise BadInput("--turns must be at least 1 and --n-experts at least 2")

    def run(self, console: Console) -> Report:
        """Measures, and prints the table at the end.

        Raises:
            BadInput: PyTorch is missing.
        """
        peer: Any = load_peer("lechat_jax.train")
        read = read_speed(self.read_gb)
        report = Report(machine_line(), read.gb_s, [], [f"memory was read by {read.how}"])
        config = self.config(self.n_experts)
        shape = (self.batch, self.block + 1)
        rows = np.random.default_rng(self.seed).integers(config.vocab_size, size=shape)
        passes: dict[str, Callable[[], float]] = {"lechat_jax": self.lechat(config, rows)}
        weights = initial_weights(config, self.seed)
        for name in ("eager", "grouped_mm"):
            passes[f"transformers-{name}"] = peer.experts_pass(config, weights, rows, name)
        times = self.in_turn(passes, console)
        ours = times["lechat_jax"]
        for impl, seconds in times.items():
            pairs = zip(seconds, ours, strict=True)
            ratio = statistics.median(theirs / own for theirs, own in pairs)
            report.rows.append(self.row(impl, self.n_experts, seconds, {"ratio": ratio}))
        del passes, weights
        beside = {str(n): self.lechat(self.config(n), rows) for n in (self.n_experts, *self.others)}
        for n, seconds in self.in_turn(beside, console).items():
            report.rows.append(self.row("lechat_jax", int(n), seconds, {}))
        report.show(console, figures(report.rows))
        return report

    def config(self, n_experts: int) -> MistralConfig:
        """The model with so many experts."""
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

    def lechat(self, config: MistralConfig, rows: np.ndarray) -> Callable[[], float]:
        """A pass of lechat's, which gives the loss."""
        options = StepOptions(block=self.block)
        weights = jax.tree.map(jax.numpy.asarray, initial_weights(config, self.seed))
        step = jax.jit(gradient, static_argnums=(0, 1))
        batch = Rows(rows.astype(np.int32))

        def once() -> float:
            return float(jax.block_until_ready(step(config, options, weights, {}, batch))[0])

        return once

    def in_turn(
        self, passes: dict[str, Callable[[], float]], console: Console
    ) -> dict[str, list[float]]:
        """Seconds of each pass, A B A B, after one of each that is not counted."""
        times: dict[str, list[float]] = {name: [] for name in passes}
        for turn in range(self.turns + 1):
            for name, once in passes.items():
                wait_until_idle()
                began = time.perf_counter()
                loss = once()
                if turn:
                    times[name].append(time.perf_counter() - began)
                else:
                    console.print(f"{name}: loss {loss:.5f}", markup=False)
        return times

    def row(self, impl: str, n_experts: int, seconds: list[float], details: dict) -> Row:
        """The figures of one."""
        speed = self.batch * self.block / statistics.median(seconds)
        return Row(
            "moe",
            impl,
            "float32",
            self.batch,
            self.block,
            speed,
            None,
            details={"n_experts": n_experts, "seconds": seconds} | details,
        )


def figures(rows: list[Row]) -> TableText:
    """The rows of the report in words."""
    lines = [
        [
            row.impl,
            str(row.details["n_experts"]),
            f"{row.tokens_per_s:,.0f}",
            f"{row.details['ratio']:.2f}" if "ratio" in row.details else "",
        ]
        for row in rows
    ]
    return TableText(["forward and backward", "experts", "tokens/s", "of lechat's time"], lines)
