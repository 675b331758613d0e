"""Plots of benchmarks as PNG files: bars of decoding, curves of training."""

import io
from pathlib import Path
from typing import Any

from lechat_jax.files.atomic import write_atomic
from parity.bench.learners.race import Point
from parity.report import Report

GREY = "#808080"  # seen on white and on black
COLOURS = {"lechat_jax": "#e8710a", "lechat_torch": "#5b8def", "transformers": "#8a8f98"}


def draw_bars(report: Report, path: Path) -> None:
    """Tokens a second as bars, each with a line at what reading the memory would allow.

    To be read on a light page and on a dark one.

    Raises:
        BadInput: it cannot be written there.
    """
    rows = [row for row in report.rows if row.tokens_per_s and "draft" not in row.details]
    figure = _figure(height=1.2 + 0.5 * len(rows))
    axes = figure.add_subplot(xlabel="tokens a second")
    for y, row in enumerate(rows):
        speed, limit = row.tokens_per_s or 0.0, row.details["limit_tokens_per_s"]
        axes.barh(y, speed, height=0.7, color=COLOURS.get(row.impl, GREY))
        axes.plot([limit, limit], [y - 0.42, y + 0.42], color="#d62728", linewidth=2)
        text = f"  {speed:,.1f} ({row.details['share_of_read']:.0%})"
        beside = axes.get_yaxis_transform()  # in a column, where no line crosses it
        axes.text(1.0, y, text, va="center", color=GREY, fontsize=9, transform=beside)
    names = [f"{row.impl} {row.dtype}\nbatch {row.batch}, context {row.context}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.plot([], [], color="#d62728", linewidth=2, label="limit: the speed of the memory")
    axes.legend(
        fontsize=8, frameon=False, labelcolor=GREY, loc="lower right", bbox_to_anchor=(1, 1)
    )
    axes.set_title(report.machine.split(";")[0], fontsize=8, color=GREY, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY)
    axes.xaxis.label.set_color(GREY)
    _write(figure, path, transparent=True)


def draw_curves(points: list[Point], machine: str, path: Path) -> None:
    """The curves as a PNG file: bits per byte over each one's own seconds.

    Raises:
        BadInput: it cannot be written there.
    """
    figure = _figure(height=4.5)
    axes = figure.add_subplot(
        xlabel="seconds of its own training, compiling included",
        ylabel="validation (bits per byte)",
    )
    for impl in dict.fromkeys(point.impl for point in points):
        own = [point for point in points if point.impl == impl]
        label = f"{impl}: {own[-1].bpb:.3f} after {own[-1].tokens:,} tokens"
        axes.plot([p.seconds for p in own], [p.bpb for p in own], "o-", markersize=3, label=label)
    axes.set_title(machine, fontsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    _write(figure, path)


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure  # half a second, and only needed here

    return Figure(figsize=(8, height), dpi=150, layout="constrained")


def _write(figure: Any, path: Path, **how: bool) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", **how)
    write_atomic(path, content.getvalue())
