"""Sliding-window attention of whole sequences: does its time grow with T, or with T * T?"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console

from lechat_jax.config import MistralConfig, preset
from lechat_jax.model.attention import training_attention
from lechat_jax.ops.attention_backend import Backend, choose_backend
from parity.bench.work import Work, cell
from parity.measure import interleaved, wait_until_idle
from parity.peers.installed import load_peer
from parity.report import Report, Row, TableText

PEER = "parity.peers.transformers"  # imported only when it is measured
MULTIPLES = (2, 4, 8, 16)  # of the window: the lengths T
LEAST_SECONDS = 0.02  # of one repetition: what is shorter runs several times in it

Pass = Literal["forward", "forward+backward"]
Kernel = Backend | Literal["sdpa"]
PASSES: tuple[Pass, ...] = ("forward", "forward+backward")
Inputs = tuple[
    Float[np.ndarray, "B T N H"], Float[np.ndarray, "B T K H"], Float[np.ndarray, "B T K H"]
]


class Case(NamedTuple):
    """A case to time: kernel, pass, window and length.

    Attributes:
        kernel: one of lechat's back-ends, or `sdpa` for the peer.
        passes: with or without the gradients of queries, keys and values.
        window: keys a query sees, W.
        context: length T.
    """

    kernel: Kernel
    passes: Pass
    window: int
    context: int


class Prepared(NamedTuple):
    """A compiled case: runs it once and waits, and the bytes it needs if that is known."""

    run: Callable[[], object]
    peak_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Attention(Work):
    """Time of window attention over T = 2W, 4W, 8W and 16W tokens, forward and backward.

    lechat's kernel for this machine beside its dense form, which makes all T * T scores, and
    PyTorch's scaled_dot_product_attention with the window as a mask, as transformers calls
    it. In float32, on all cores, in turn: A B A B.
    """

    preset: str = "lechat-15m"
    """Model whose heads are taken: a name such as lechat-15m or bench-284m."""
    windows: tuple[int, ...] = (64, 256)
    """Sliding windows W, in keys that a query sees; each is measured."""
    batch: int = 1
    """Rows at once."""
    repetitions: int = 9
    """Times that each case is measured; the median counts."""
    sdpa: bool = True
    """Measure PyTorch's scaled_dot_product_attention too."""

    COUNTS = ("windows", "batch", "repetitions")

    def run(self, console: Console) -> Report:
        """See `Work.run`; the report has the largest ratio of a doubling."""
        config = preset(self.preset)
        peer = load_peer(PEER, "--no-sdpa") if self.sdpa else None
        report = self.report()
        for window in self.windows:
            for passes in PASSES:
                console.print(f"{passes}, window {window}")
                report.rows += self.measure(list(self.cases(config, window, passes)), config, peer)
        report.details["largest_doubling"] = largest = largest_doublings(report.rows)
        report.notes += [
            f"{kernel}: twice the tokens take at most {ratio:.2f} times as long "
            "(2 is linear, 4 quadratic)"
            for kernel, ratio in largest.items()
        ]
        report.show(console, figures(report.rows))
        return report

    def cases(self, config: MistralConfig, window: int, passes: Pass) -> Iterator[Case]:
        """The cases that are compared in turn: every kernel at every length."""
        longest = MULTIPLES[-1] * window
        best = choose_backend(jax.default_backend(), np.float32, longest, window, config.head_dim)
        kernels: list[Kernel] = ["dense"] if best == "dense" else [best, "dense"]
        for kernel in (*kernels, "sdpa") if self.sdpa else kernels:
            for multiple in MULTIPLES:
                yield Case(kernel, passes, window, multiple * window)

    def measure(
        self, cases: list[Case], config: MistralConfig, peer: ModuleType | None
    ) -> list[Row]:
        """A row for each case."""
        prepared = {case: self.prepare(case, config, peer) for case in cases}
        tasks = {case: repetition(one.run) for case, one in prepared.items()}
        times = interleaved(tasks, self.repetitions)
        return [
            self.row(case, seconds, times.get(case._replace(context=case.context // 2)), one)
            for (case, seconds), one in zip(times.items(), prepared.values(), strict=True)
        ]

    def row(
        self, case: Case, times: list[float], half: list[float] | None, prepared: Prepared
    ) -> Row:
        """The figures of a case, from the seconds of each repetition at T and at T/2."""
        seconds = statistics.median(times)
        # Of the same repetition, so that drift cancels.
        doubling = half and statistics.median(a / b for a, b in zip(times, half, strict=True))
        return Row(
            work="attention",
            impl="transformers" if case.kernel == "sdpa" else "lechat_jax",
            dtype="float32",
            batch=self.batch,
            context=case.context,
            tokens_per_s=self.batch * case.context / seconds,
            peak_bytes=prepared.peak_bytes,
            details={
                "kernel": case.kernel,
                "pass": case.passes,
                "window": case.window,
                "seconds": seconds,
                "doubling": doubling,
            },
        )

    def prepare(self, case: Case, config: MistralConfig, peer: ModuleType | None) -> Prepared:
        """The case with its inputs, which are the same for all kernels."""
        rng = np.random.default_rng(0)
        q, k, v = (
            rng.standard_normal((self.batch, case.context, heads, config.head_dim), np.float32)
            for heads in (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        )
        is_both = case.passes == "forward+backward"
        if case.kernel != "sdpa":
            return lechat_attention((q, k, v), case.window, case.kernel, is_both)
        assert peer is not None, "sdpa is measured only when the peer is there"
        return Prepared(peer.sdpa(q, k, v, case.window, is_both), None)


def lechat_attention(inputs: Inputs, window: int, kernel: Backend, is_both: bool) -> Prepared:
    """Lechat's attention, compiled. Its bytes are XLA's: inputs, outputs and scratch."""

    def forward(q: Array, k: Array, v: Array) -> Array:
        return training_attention(q, k, v, window, kernel)

    def both(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
        _, pull = jax.vjp(forward, q, k, v)
        return pull(q)  # any direction of its shape, so long as it is no constant

    arrays = tuple(map(jnp.asarray, inputs))
    compiled = jax.jit(both if is_both else forward).lower(*arrays).compile()
    n_bytes = None
    if memory := compiled.memory_analysis():
        n_bytes = memory.argument_size_in_bytes + memory.output_size_in_bytes
        n_bytes += memory.temp_size_in_bytes
    return Prepared(lambda: jax.block_until_ready(compiled(*arrays)), n_bytes)


def repetition(run: Callable[[], object]) -> Callable[[], float]:
    """Measures seconds a run, as the mean of as many as fill `LEAST_SECONDS`."""

    def seconds(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - began) / count

    seconds(1)
    count = math.ceil(LEAST_SECONDS / seconds(1))

    def measured() -> float:
        wait_until_idle()
        run()  # not counted: it takes its memory back from whatever ran before
        return seconds(count)

    return measured


def largest_doublings(rows: list[Row]) -> dict[str, float]:
    """Largest ratio of the time of twice the tokens, by kernel: 2 is linear, 4 quadratic."""
    largest: dict[str, float] = {}
    for row in rows:
        if row.details["doubling"]:
            kernel = row.details["kernel"]
            largest[kernel] = max(largest.get(kernel, 0.0), row.details["doubling"])
    return largest


def figures(rows: list[Row]) -> TableText:
    """The table of the report."""
    lines = [
        [
            f"{row.impl} {row.details['kernel']}",
            row.details["pass"],
            str(row.details["window"]),
            str(row.context),
            f"{row.details['seconds'] * 1e3:.3f}",
            f"{row.tokens_per_s:,.0f}",
            cell("{:,.1f}", row.peak_bytes, 1e6),
            cell("{:.2f}", row.details["doubling"]),
        ]
        for row in rows
    ]
    header = ["attention", "pass", "window", "tokens", "ms", "tokens/s", "MB", "per doubling"]
    return TableText(header, lines)
