"""What a parity check says: to a person in a terminal, to scripts, and to a CI system.

Every file is written whole or not at all.
"""

import io
import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from lechat_jax.files.atomic import write_atomic
from parity.check.reports.text import (
    CAPTION,
    FAULT_HEADER,
    Column,
    Report,
    cell,
    clean,
    column_of,
    columns,
    describe,
    fault_line,
    fold,
    good,
    pair_of,
    remarks,
    scientific,
    sentence,
    title,
)
from parity.check.verdict import STAGES, FaultReport, Stage, Verdict

CELL = len("✗ no 3.1e-02/2.3e-03")  # what must not be broken; a layer goes below it
GAP = 2  # between two columns
MOST_ROWS = 200  # over budget that are listed where a summary must stay short
WRAPPED = ("fault", "missed by", "note")  # columns whose text may take several lines
COMPARED = ("dtype", "compared", "rel", "budget", "position", "note")

# Decades of error over budget, each with its colours, which every common kind of colour blindness
# can tell apart: blue within, orange over.
BINS = (
    (1e-3, "to 0.001", "#10202e on #f1f6fb"),
    (1e-2, "to 0.01", "#10202e on #d9e8f5"),
    (1e-1, "to 0.1", "#10202e on #b5d3ec"),
    (1e0, "to 1, the budget", "#0b1823 on #86b7df"),
    (1e1, "over, to 10", "bold #2b1600 on #fdd9a8"),
    (1e2, "over, to 100", "bold #2b1600 on #fbb062"),
    (1e4, "over, to 10 000", "bold #1c0d00 on #e8792b"),
    (math.inf, "over, beyond", "bold #ffffff on #9c3503"),
)
PAGE_WIDTH = 150  # characters of a table on a web page
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{mark} {title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 2rem; font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
pre {{ overflow-x: auto; font: 12px/1.4 monospace; }}
.good {{ border-left: .4rem solid #86b7df; padding: .7rem; font-size: 1.1rem; }}
.bad {{ border-left: .4rem solid #e8792b; padding: .7rem; font-size: 1.1rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="{kind}"><b>{mark} {sentence}</b></p>
<ul>{remarks}</ul>
<pre>{tables}</pre>
</body>
</html>
"""


def show(console: Console, report: Report) -> None:
    """The tables, the verdict and what follows it; colour and rules only in a terminal."""
    console.print(Text(f"{clean(title(report))}\n", "bold"))
    if isinstance(report, FaultReport):
        console.print(_fault_table(console, report), Text())
    else:
        for table in _stage_tables(console, report):
            console.print(table, Text())
        console.print(Text(f"{CAPTION}\n", "dim"))
    style = "bold green" if good(report) else "bold red"
    lines = [Text(clean(sentence(report)), style), *map(Text, map(clean, remarks(report)))]
    for line in lines:  # where no one reads along, a sentence stays a line
        console.print(line, soft_wrap=not console.is_terminal)


def write_json(path: Path, report: Report) -> None:
    """The report for scripts, in strict JSON.

    Raises:
        BadInput: it cannot be written there.
    """
    write_atomic(path, json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")


def write_html(path: Path, report: Report) -> None:
    """The report as one web page: no script, and nothing that is fetched.

    Raises:
        BadInput: it cannot be written there.
    """
    console = Console(
        file=io.StringIO(),
        record=True,
        force_terminal=True,
        width=PAGE_WIDTH,
        theme=Theme({"red": BINS[-1][2]}),  # which is legible by day and by night
    )
    if isinstance(report, FaultReport):
        console.print(_fault_table(console, report))
    elif report.stages:
        legend = (Text(f" {label} ", style) for _, label, style in BINS)
        console.print(Text("Error over budget: ").append_text(Text(" ").join(legend)), Text())
        console.print(_error_map(console, report), Text(), _all_comparisons(console, report))
    mark, kind = ("✓", "good") if good(report) else ("✗", "bad")
    page = PAGE.format(
        mark=mark,
        kind=kind,
        title=escape(clean(title(report))),
        sentence=escape(clean(sentence(report))),
        remarks="".join(f"<li>{escape(clean(line))}</li>" for line in remarks(report)),
        tables=console.export_html(code_format="{code}", inline_styles=True),
    )
    write_atomic(path, page)


def write_junit(path: Path, report: Report) -> None:
    """The report as JUnit XML: a test case for each comparison, or for each fault.

    Raises:
        BadInput: it cannot be written there.
    """
    cases = list(_fault_cases(report) if isinstance(report, FaultReport) else _cases(report))
    if not cases:  # no test at all would count as passed
        cases = [_Case("parity", "anything", "nothing was compared")]
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(bool(case.failure) for case in cases)),
        "errors": "0",
        "skipped": "0",
        "time": f"{report.seconds:.3f}",
    }
    suites = ET.Element("testsuites", counts)
    suite = ET.SubElement(suites, "testsuite", {"name": clean(title(report)), **counts})
    properties = ET.SubElement(suite, "properties")
    ET.SubElement(properties, "property", name="machine", value=clean(report.machine))
    for case in cases:
        names = {"classname": clean(case.group), "name": clean(case.name), "time": "0"}
        element = ET.SubElement(suite, "testcase", names)
        if case.failure:
            message = clean(case.failure)
            failure = ET.SubElement(element, "failure", message=message, type="divergence")
            failure.text = clean("\n".join(filter(None, (case.failure, case.note))))
    said = "\n".join([sentence(report), *remarks(report)])
    ET.SubElement(suite, "system-out").text = clean(said)
    ET.indent(suites)
    text = ET.tostring(suites, encoding="unicode")
    write_atomic(path, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n')


def write_markdown(path: Path, report: Report) -> None:
    """The report as a page of Markdown in GitHub's flavour, short enough for a job summary.

    Raises:
        BadInput: it cannot be written there.
    """
    mark = "✅" if good(report) else "❌"
    parts = [f"## {_escape(title(report))}", f"{mark} **{_escape(sentence(report))}**"]
    if isinstance(report, FaultReport):
        parts.append(_markdown_table(*_fault_lines(report)))
    elif report.stages:
        names = columns(report.stages)
        header = ["stage", *(f"{dtype}: {pair_of((dtype, pair))}" for dtype, pair in names)]
        lines = (
            [stage, *(" ".join(cell(row.get(name))) for name in names)]
            for stage, row in fold(report.stages).items()
        )
        parts += [_markdown_table(header, lines), CAPTION]
        parts += _markdown_over(report)
    parts.append("\n".join(f"- {_escape(line)}" for line in remarks(report)))
    write_atomic(path, "\n\n".join(parts) + "\n")


# --- a verdict ---


def _stage_tables(console: Console, verdict: Verdict) -> Iterator[Table]:
    """One table where it fits, else one for each dtype, else as wide as the console."""
    rows = fold(verdict.stages)
    marks = ("ok", "NO") if console.options.ascii_only else ("✓ ok", "✗ no")
    for names in _pages(columns(verdict.stages), console.width):
        table = _table(console, ["stage"])
        for name in names:
            lines = f"{name[0]}\n{pair_of(name)}".replace("against ", "against\n")
            table.add_column(Text(lines))
        for stage, row in rows.items():
            cells = []
            for compared in map(row.get, names):
                style = "" if compared is None or compared.ok else "red"
                cells.append(Text(" ".join(cell(compared, marks)).strip(), style))
            table.add_row(stage, *cells)
        yield table


def _pages(names: Sequence[Column], width: int) -> Iterator[Sequence[Column]]:
    """The columns of each table, if there are any."""
    fit = max(1, (width - max(map(len, STAGES))) // (CELL + GAP))
    if 0 < len(names) <= fit:
        yield names
        return
    for _, group in itertools.groupby(names, lambda name: name[0]):
        same = list(group)
        yield from (same[i : i + fit] for i in range(0, len(same), fit))


def _cases(verdict: Verdict) -> Iterator["_Case"]:
    for stage in _as_executed(verdict):
        group = f"parity.{stage.dtype}.{pair_of(column_of(stage))}"
        group += f".{stage.model}" if stage.model else ""
        note = "\n".join(filter(None, (stage.note, verdict.hint)))
        yield _Case(group, stage.label, "" if stage.ok else describe(stage), note)


def _markdown_over(verdict: Verdict) -> list[str]:
    """What is over budget, row by row, in the order of execution."""
    over = [stage for stage in _as_executed(verdict) if not stage.ok]
    if not over:
        return []
    table = _markdown_table(["over budget", *COMPARED], map(_comparison, over[:MOST_ROWS]))
    rest = len(over) - MOST_ROWS
    return [table] + ([f"… and {rest} more"] if rest > 0 else [])


def _as_executed(verdict: Verdict) -> list[Stage]:
    return sorted(verdict.stages, key=lambda stage: stage.order)


def _comparison(stage: Stage) -> list[str]:
    """One comparison: where it is, and then what `COMPARED` names."""
    return [
        *(stage.label, stage.dtype, pair_of(column_of(stage))),
        *(scientific(stage.rel), scientific(stage.budget)),
        "" if stage.position is None else str(stage.position),
        stage.note,
    ]


def _error_map(console: Console, verdict: Verdict) -> Table:
    """Heat map of error over budget, a row for each layer's stages and a column for each pair."""
    names = columns(verdict.stages)
    table = _table(console, ["stage"])
    for name in names:
        table.add_column(Text(f"{name[0]}\n{pair_of(name)}"))
    for label, row in fold(verdict.stages, by_layer=True).items():
        table.add_row(label, *(_share(row[name]) if name in row else "" for name in names))
    return table


def _all_comparisons(console: Console, verdict: Verdict) -> Table:
    table = _table(console, ["stage", "rel/budget", *COMPARED])
    for stage in _as_executed(verdict):
        label, *rest = (Text(clean(text)) for text in _comparison(stage))
        table.add_row(label, _share(stage), *rest)
    return table


def _share(stage: Stage) -> Text:
    """Error over budget, in the colour of its decade."""
    mark = "✓" if stage.ok else "✗"
    value = f"{stage.share:.2g}" if math.isfinite(stage.rel) else scientific(stage.rel)
    return Text(f" {mark} {value} ", next(c for most, _, c in BINS if stage.share <= most))


# --- planted faults ---


def _fault_table(console: Console, report: FaultReport) -> Table:
    header, lines = _fault_lines(report)
    table = _table(console, header)
    for fault, words in zip(report.faults, lines, strict=True):
        line = [Text(clean(word)) for word in words]
        if console.options.ascii_only:
            line[2] = Text(line[2].plain[2:])
        line[2].stylize("" if fault.ok else "red")
        table.add_row(*line)
    return table


def _fault_lines(report: FaultReport) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of faults; who missed them, where published tests were tried."""
    if not report.criteria:
        return [*FAULT_HEADER], [fault_line(fault) for fault in report.faults]
    lines = [[*fault_line(fault), ", ".join(fault.missed_by)] for fault in report.faults]
    return [*FAULT_HEADER, "missed by"], lines


def _fault_cases(report: FaultReport) -> Iterator["_Case"]:
    for fault in report.faults:
        found = f"found at {fault.found_stage}" if fault.detected else "not detected"
        failure = "" if fault.ok else f"{found}, expected at {fault.expected_stage}"
        yield _Case(f"parity.check.faults.suite.{fault.where}", fault.name, failure)


# --- both ---


class _Case(NamedTuple):
    """A JUnit test case; without a failure it has passed."""

    group: str
    name: str
    failure: str
    note: str = ""


def _table(console: Console, header: Sequence[str]) -> Table:
    """Ruled in a terminal and bare columns elsewhere."""
    ruled = console.is_terminal
    padding = (0, GAP - ruled, 0, 0)  # a rule has a blank of its own between columns
    box = SIMPLE_HEAD if ruled else None
    table = Table(box=box, padding=padding, pad_edge=False, show_edge=False)
    for name in header:  # what is short stays whole, and leaves the wrapping to the others
        table.add_column(name, overflow="fold", no_wrap=name not in WRAPPED)
    return table


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, in one line and inside a cell."""
    one_line = " ".join(clean(text).split())
    return re.sub(r"([\\`*_\[\]|~#<>&])", r"\\\1", one_line)


def _markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [list(map(_escape, line)) for line in (header, *lines)]
    rows.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
