"""What a parity check says as one web page: no script, and nothing that is fetched."""

import itertools
import math
from collections.abc import Iterable, Sequence
from html import escape

from parity.check.reports.text import (
    FAULT_HEADER,
    Column,
    Report,
    against,
    clean,
    column_of,
    columns,
    describe,
    fault_line,
    good,
    remarks,
    scientific,
    sentence,
    title,
    worst,
)
from parity.check.verdict import FaultReport, Stage, Verdict

# Decades of error over budget. Blue is within and orange is over, since every common kind
# of colour blindness can tell these two apart; each cell bears its number and mark besides.
# Each scale is: background and text by day, background and text by night.
BINS: tuple[tuple[float, str, str, str, str, str], ...] = (
    (1e-3, "to 0.001", "#f1f6fb", "#10202e", "#14202b", "#dbe7f1"),
    (1e-2, "to 0.01", "#d9e8f5", "#10202e", "#1a3145", "#e3edf6"),
    (1e-1, "to 0.1", "#b5d3ec", "#10202e", "#204562", "#ecf3f9"),
    (1e0, "to 1, the budget", "#86b7df", "#0b1823", "#285d86", "#ffffff"),
    (1e1, "over, to 10", "#fdd9a8", "#2b1600", "#553610", "#ffffff"),
    (1e2, "over, to 100", "#fbb062", "#2b1600", "#8f530d", "#ffffff"),
    (1e4, "over, to 10 000", "#e8792b", "#1c0d00", "#d9802e", "#1c0d00"),
    (math.inf, "over, beyond", "#9c3503", "#ffffff", "#ffb56b", "#1c0d00"),
)


KINDS = {"✓": ' class="yes"', "✗": ' class="no"'}  # of a cell, by the mark it begins with


def page(report: Report) -> str:
    """The whole page: the verdict, the maps, every row, the notes and the machine."""
    if isinstance(report, FaultReport):
        body = _fault_table(report)
    else:
        body = _map(report) + _rows(report) if report.stages else ""
    mark, kind = ("✓", "good") if good(report) else ("✗", "bad")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{mark} {_text(title(report))}</title>
<style>{STYLE}{_scale()}</style>
</head>
<body>
<h1>{_text(title(report))}</h1>
<p class="verdict {kind}"><b>{mark}</b> {_text(sentence(report))}</p>
<ul>{"".join(f"<li>{_text(line)}</li>" for line in remarks(report))}</ul>
{body}</body>
</html>
"""


# --- a verdict ---


def _map(verdict: Verdict) -> str:
    """Error over budget at every stage in the order of execution, a column for each pair."""
    names = columns(verdict.stages)
    found: dict[str, dict[Column, list[Stage]]] = {}
    for stage in sorted(verdict.stages, key=lambda stage: stage.order):
        found.setdefault(stage.label, {}).setdefault(column_of(stage), []).append(stage)
    groups = [(dtype, len(list(same))) for dtype, same in itertools.groupby(n[0] for n in names)]
    dtypes = "".join(f'<th scope="colgroup" colspan="{n}">{_text(d)}</th>' for d, n in groups)
    starts = {names.index(next(n for n in names if n[0] == dtype)) for dtype, _ in groups}
    pairs = "".join(f'<th scope="col">{_text(against(name))}</th>' for name in names)
    body = ""
    for label, row in found.items():
        cells = "".join(
            _map_cell(row.get(name, []), "first" if i in starts else "")
            for i, name in enumerate(names)
        )
        body += f'<tr><th scope="row">{_text(label)}</th>{cells}</tr>\n'
    return f"""<h2>Error over budget</h2>
<p>From top to bottom as the model executes; 1 is the budget. A cell's full figures show when
the pointer rests on it, and in the table below.</p>
<p class="legend">{_legend()}</p>
<div class="wide"><table class="map">
<thead><tr><td></td>{dtypes}</tr><tr><th scope="col">stage</th>{pairs}</tr></thead>
<tbody>
{body}</tbody></table></div>
"""


def _map_cell(stages: Sequence[Stage], edge: str) -> str:
    if not stages:
        return f'<td class="{edge} none">not compared</td>'
    stage = worst(stages)
    mark, bad = ("✓", "") if stage.ok else ("✗", "over")
    figures = "; ".join(map(describe, stages))
    classes = f"{edge} {bad} h{_bin(stage)}".strip()
    return f'<td class="{classes}" title="{_text(figures)}">{mark} {_share(stage)}</td>'


def _share(stage: Stage) -> str:
    """Error over budget, short enough for a cell."""
    if not math.isfinite(stage.rel):
        return scientific(stage.rel)
    share = stage.share
    return f"{share:.2g}" if share == 0 or 1e-3 <= share < 1e3 else scientific(share)


def _bin(stage: Stage) -> int:
    """Which colour: that of the first decade the error is within."""
    return next(i for i, scale in enumerate(BINS) if stage.share <= scale[0])


def _rows(verdict: Verdict) -> str:
    """Every comparison, in the order of execution."""
    header = "stage dtype compared rel budget rel/budget position verdict note".split()
    lines = []
    for stage in sorted(verdict.stages, key=lambda stage: stage.order):
        line = [
            *(stage.label, stage.dtype, against(column_of(stage))),
            *(scientific(stage.rel), scientific(stage.budget), _share(stage)),
            "" if stage.position is None else str(stage.position),
            "✓ ok" if stage.ok else "✗ no",
            stage.note,
        ]
        lines.append((stage.ok, line))
    return f"<h2>All comparisons</h2>\n{_table(header, lines)}"


# --- planted faults ---


def _fault_table(report: FaultReport) -> str:
    """What became of each fault here, and what would have under each published criterion."""
    lines = []
    for fault in report.faults:
        said = ("✗ missed" if name in fault.missed_by else "✓ noticed" for name in report.criteria)
        lines.append((fault.ok, [*fault_line(fault), *said]))
    caption = "The last columns say whether a published criterion would have noticed the fault."
    return f"""<h2>Each fault</h2>
<p>{caption if report.criteria else ""}</p>
{_table([*FAULT_HEADER, *report.criteria], lines)}"""


# --- both ---


def _table(header: Sequence[str], lines: Iterable[tuple[bool, Sequence[str]]]) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in header)
    body = ""
    for ok, (first, *rest) in lines:
        kinds = (KINDS.get(cell[:1], "") for cell in rest)
        cells = "".join(map("<td{}>{}</td>".format, kinds, map(_text, rest)))
        row = "<tr>" if ok else '<tr class="over">'
        body += f'{row}<th scope="row">{_text(first)}</th>{cells}</tr>\n'
    return f"""<div class="wide"><table class="rows">
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody></table></div>
"""


def _text(text: str) -> str:
    return escape(clean(text))


def _legend() -> str:
    swatches = (f'<span class="h{i}">{_text(scale[1])}</span>' for i, scale in enumerate(BINS))
    return "".join(swatches)


def _scale() -> str:
    """The colours of `BINS`, by day and by night."""
    day = "".join(f".h{i}{{background:{b[2]};color:{b[3]}}}\n" for i, b in enumerate(BINS))
    night = "".join(f".h{i}{{background:{b[4]};color:{b[5]}}}\n" for i, b in enumerate(BINS))
    return f"{day}@media (prefers-color-scheme: dark) {{\n{night}}}\n"


STYLE = """
:root { color-scheme: light dark; --text: #1b2733; --dim: #566472; --line: #d3dae1;
  --page: #ffffff; --good: #e3effa; --bad: #fde3c4; --edge: #9c3503; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e9ef; --dim: #9eacb9; --line: #34414d;
  --page: #10161c; --good: #173049; --bad: #4d2f0c; --edge: #ffb56b; } }
body { margin: 2rem auto; padding: 0 1.5rem; max-width: 75rem; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p, ul { max-width: 60rem; }
.verdict { padding: .7rem 1rem; border-left: .35rem solid; font-size: 1.1rem; }
.good { background: var(--good); } .bad { background: var(--bad); border-color: var(--edge); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .2rem .6rem; text-align: left; vertical-align: bottom; }
thead th { color: var(--dim); font-weight: 600; }
tbody th { font-weight: 600; white-space: nowrap; }
.rows td, .rows tbody th { border-top: 1px solid var(--line); vertical-align: top; }
.rows .over { background: var(--bad); }
.rows .yes, .rows .no { white-space: nowrap; }
.rows .no { font-weight: 700; }
.map td { border: 1px solid var(--page); white-space: nowrap; }
.map td.first { border-left: .5rem solid var(--page); }
.map td.over { font-weight: 700; }
.map td.none { color: var(--dim); font-style: italic; }
.legend span { padding: .15rem .6rem; font-size: 13px; display: inline-block; }
"""
