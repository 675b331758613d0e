"""Pictures of benchmarks, to be read on a light page and on a dark one."""

import io
from pathlib import Path

from lechat_jax.files.atomic import write_whole
from parity.report import Report

GREY = "#808080"  # seen on white and on black
COLOURS = {"lechat_jax": "#e8710a", "lechat_torch": "#5b8def", "transformers": "#8a8f98"}


def draw_bars(report: Report, path: Path) -> None:
    """Tokens a second as bars, and what reading the memory would allow as a line over each.

    Raises:
        BadInput: it cannot be written there.
    """
    from matplotlib.figure import Figure  # half a second, and only needed here

    rows = [row for row in report.rows if row.tokens_per_s and "draft" not in row.details]
    height = 1.2 + 0.5 * len(rows)
    figure = Figure(figsize=(8, height), dpi=150, layout="constrained")
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
    content = io.BytesIO()
    figure.savefig(content, format="png", transparent=True)
    write_whole(path, content.getvalue())
