"""The page that compares runs: HTML with curves as SVG, figures, options that differ, samples."""

import dataclasses
import html
import io
import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lechat_jax.checkpoint.run import Run
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput

SMOOTHED = 50  # parts of a curve, each of which is a mean
RECORDED = ("train", "model")  # parts of a run's config that the page compares

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
       color: #222; background: #fff }
h1, h2 { font-weight: 600 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #ddd;
         vertical-align: top }
td { font-variant-numeric: tabular-nums }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1.5rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .75rem }
svg { max-width: 100%; height: auto }
"""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run recorded.

    Attributes:
        name: of its folder.
        config: every option, by part and name.
        rows: of its metrics.
        samples: what it wrote, by step.
    """

    name: str
    config: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    samples: dict[int, str]

    @classmethod
    def of(cls, run: Run) -> "Summary":
        """Reads a run, finished or not.

        Raises:
            BadInput: a file of it cannot be read.
        """
        samples = {}
        for path in run.samples.glob("step-*.txt") if run.samples.is_dir() else ():
            if found := re.fullmatch(r"step-(\d+)\.txt", path.name):
                samples[int(found[1])] = path.read_text(encoding="utf-8")
        try:
            rows = list(run.metrics())
        except OSError as error:
            raise BadInput(f"{error.filename} cannot be read: {error.strerror}") from error
        name = run.folder.resolve().name
        return cls(name, run.config, rows, dict(sorted(samples.items())))

    def curve(self, key: str) -> Float[np.ndarray, "2 points"]:
        """A metric by the tokens that had been trained on."""
        found = [(row["tokens"], row[key]) for row in self.rows if key in row and "tokens" in row]
        return np.array(found, np.float64).reshape(-1, 2).T

    def last(self, key: str) -> float | None:
        """The last value of a metric; `None` if it was never measured."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)

    @property
    def figures(self) -> dict[str, str]:
        """The final figures, as they are shown."""
        rates = [row["train/tokens_per_sec"] for row in self.rows if "train/tokens_per_sec" in row]
        bits, seconds = self.last("val/bpb"), self.last("time_s")
        losses = self.curve("train/loss")[1]
        tail = losses[-max(1, len(losses) // SMOOTHED) :]
        return {
            "parameters": f"{MistralConfig.from_dict(self.config['model']).n_params:,}",
            "steps": f"{self.rows[-1]['step']:,}" if self.rows else "0",
            "tokens": f"{self.rows[-1]['tokens']:,}" if self.rows else "0",
            "training loss (nats per token)": f"{tail.mean():.4f}" if len(tail) else "",
            "held-out bits per byte": "" if bits is None else f"{bits:.4f}",
            "tokens/s (median)": f"{statistics.median(rates):,.0f}" if rates else "",
            "minutes": "" if seconds is None else f"{seconds / 60:.1f}",
        }


def page(runs: Sequence[Summary]) -> str:
    """The HTML of the comparison, complete in itself."""
    names = [html.escape(run.name) for run in runs]
    several = [run.figures for run in runs]
    figures = {key: [each[key] for each in several] for key in several[0]}
    differing, common = options_of(runs)
    if len(runs) > 1:
        options = [
            "<h2>Options that differ</h2>",
            _table(names, differing) if differing else "<p>None.</p>",
        ]
    else:
        options = []
    body = [
        f"<h1>{' · '.join(names)}</h1>",
        _table(names, figures),
        "<div class=side>",
        _drawn(runs, "train/loss", "training loss (nats per token)", SMOOTHED),
        _drawn(runs, "val/bpb", "held-out text (bits per byte)", None),
        "</div>",
        *options,
        "<details><summary>Options in common</summary>",
        _table([""], {key: [value] for key, value in common.items()}),
        "</details>",
        "<h2>Samples</h2>",
        "<div class=side>",
        *(_samples(run, name) for run, name in zip(runs, names, strict=True)),
        "</div>",
    ]
    title = f"<title>{' · '.join(names)}</title>"
    head = f'<!doctype html>\n<html lang=en>\n<meta charset="utf-8">\n{title}\n'
    return f"{head}<style>{STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"


def options_of(runs: Sequence[Summary]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Options in which the runs differ, with each one's value, and those that all of them share."""
    differing, common = {}, {}
    for part in RECORDED:
        for key in dict.fromkeys(key for run in runs for key in run.config[part]):
            values = [str(run.config[part].get(key)) for run in runs]
            if len(set(values)) > 1:
                differing[f"{part}.{key}"] = values
            else:
                common[f"{part}.{key}"] = values[0]
    return differing, common


def _table(names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table with a column for each run; cells are escaped, names are already."""
    header = "".join(f"<th>{name}" for name in ("", *names))
    lines = (
        f"<tr><th>{html.escape(key)}" + "".join(f"<td>{html.escape(cell)}" for cell in cells)
        for key, cells in rows.items()
    )
    return f"<table><tr>{header}\n" + "\n".join(lines) + "</table>"


def _samples(run: Summary, name: str) -> str:
    """The last samples of a run, and the earlier ones to unfold."""
    if not run.samples:
        return f"<section><h3>{name}</h3><p>It wrote none.</p></section>"
    *earlier, (step, text) = run.samples.items()
    parts = [f"<section><h3>{name}, step {step:,}</h3><pre>{html.escape(text)}</pre>"]
    for step, text in reversed(earlier):
        parts.append(f"<details><summary>step {step:,}</summary><pre>{html.escape(text)}</pre>")
        parts.append("</details>")
    return "\n".join([*parts, "</section>"])


def _drawn(runs: Sequence[Summary], key: str, label: str, parts: int | None) -> str:
    """The curves of all runs as an SVG, a line for each; means of so many parts, if given."""
    import matplotlib  # half a second, and only needed here
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lechat"}):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="tokens trained on", ylabel=label)
        heights = []
        for run in runs:
            x, y = run.curve(key)
            if parts and len(y) > 2 * parts:
                ends = np.linspace(0, len(y), parts + 1).astype(int)
                x, y = (
                    np.array([leaf[a:b].mean() for a, b in itertools.pairwise(ends)])
                    for leaf in (x, y)
                )
            heights += y[len(y) // 20 :].tolist()
            axes.plot(x, y, "-" if parts else "o-", label=run.name, linewidth=1.4, markersize=4)
        if heights and parts:  # the first steps fall from far above, and would flatten the rest
            low, high = min(heights), max(heights)
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) or None)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        content = io.StringIO()
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    drawing = content.getvalue()
    return f"<div>{drawing[drawing.index('<svg') :]}</div>"  # without what XML has before it
