"""Wording of the parity check's reports, the same in every format."""

import math
import re
from collections.abc import Iterable

from parity.check.verdict import DTYPES, STAGES, Fault, FaultReport, Stage, Verdict

Report = Verdict | FaultReport

Column = tuple[str, tuple[str, str]]
"""Column of a table: a dtype, and the pair that is compared."""

CAPTION = "Relative RMS error / its budget; of several layers, the worst."

# What no terminal should be sent, and no XML may hold: controls and lone surrogates.
UNPRINTABLE = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def clean(text: str) -> str:
    r"""The text without what drives a terminal or is not allowed in XML.

    >>> clean("red: \x1b[31m")
    'red: �[31m'
    """
    return UNPRINTABLE.sub("\ufffd", text)


def scientific(value: float) -> str:
    """Two digits of a number, or one where the second is zero.

    >>> scientific(0.0312), scientific(1e-11), scientific(0.0), scientific(math.nan)
    ('3.1e-02', '1e-11', '0', 'NaN')
    """
    if math.isnan(value):
        return "NaN"
    return f"{value:.1e}".replace(".0e", "e") if value and math.isfinite(value) else f"{value:g}"


def pair_of(column: Column) -> str:
    """Heading of a column's pair.

    >>> pair_of(("float64", ("jax", "torch"))), pair_of(("float32", ("jax", "torch")))
    ('jax against torch', 'jax against torch float64')
    """
    dtype, (judged, oracle) = column
    return f"{judged} against {oracle}" + ("" if dtype == "float64" else " float64")


def column_of(stage: Stage) -> Column:
    """Column of a stage."""
    return stage.dtype, stage.pair


def columns(stages: Iterable[Stage]) -> list[Column]:
    """Columns of all stages, by dtype and then in order of appearance."""
    seen = dict.fromkeys(map(column_of, stages))
    return sorted(seen, key=lambda c: DTYPES.index(c[0]) if c[0] in DTYPES else len(DTYPES))


def worst(stages: Iterable[Stage]) -> Stage:
    """Worst stage by error over budget."""
    return max(stages, key=lambda stage: (not stage.ok, stage.share))


def describe(stage: Stage) -> str:
    """One stage in words.

    >>> describe(Stage("attn", 0, "float64", ("jax", "torch"), 0.031, 1e-11, position=7))
    'attn of layer 0, position 7, float64, jax against torch: rel 3.1e-02, budget 1e-11'
    """
    layer = "" if stage.layer is None else f" of layer {stage.layer}"
    position = "" if stage.position is None else f", position {stage.position}"
    model = f" of {stage.model}" if stage.model else ""
    return (
        f"{stage.stage}{layer}{model}{position}, {stage.dtype}, {pair_of(column_of(stage))}: "
        f"rel {scientific(stage.rel)}, budget {scientific(stage.budget)}"
    )


def sentence(report: Report) -> str:
    """The verdict in one sentence.

    >>> sentence(Verdict("tiny", (Stage("loss", None, "float64", ("jax", "torch"), 0, 1e-12),)))
    'equal: 1 of 1 comparisons within budget'
    """
    if isinstance(report, FaultReport):
        astray = [fault.name for fault in report.faults if not fault.ok]
        found = f"{len(report.faults) - len(astray)} of {len(report.faults)} faults"
        lost = f"; not {', '.join(astray)}" if astray else ""
        return f"{found} found at the stage where they are{lost}"
    first = report.first_divergence
    if first:
        return f"different: first at {describe(first)}"
    if not report.stages:
        return "not shown: nothing was compared"
    n = len(report.stages)
    return f"equal: {n} of {n} comparisons within budget"


def remarks(report: Report) -> list[str]:
    """Sentences after the verdict: hint, counts, notes, time and machine."""
    lines = []
    if isinstance(report, FaultReport):
        n = len(report.faults)
        for name in report.criteria:
            missed = sum(name in fault.missed_by for fault in report.faults)
            lines.append(f"{name} would have missed {missed} of {n}")
        lines += report.notes
    else:
        lines += [f"looks like: {report.hint}"] if report.hint else []
        if over := sum(not stage.ok for stage in report.stages):
            lines.append(f"{over} of {len(report.stages)} comparisons over budget")
        lines += report.notes
    lines.append(f"took {report.seconds:.1f} s")
    return lines + ([report.machine] if report.machine else [])


def fold(stages: Iterable[Stage], by_layer: bool = False) -> dict[str, dict[Column, Stage]]:
    """Worst comparison of each stage, or of each of its layers, in each column."""
    rows: dict[str, dict[Column, Stage]] = {}
    for stage in sorted(stages, key=lambda s: s.order if by_layer else (STAGES.index(s.stage),)):
        row = rows.setdefault(stage.label if by_layer else stage.stage, {})
        column = column_of(stage)
        row[column] = worst([row.get(column, stage), stage])
    return rows


def cell(stage: Stage | None, marks: tuple[str, str] = ("✓ ok", "✗ no")) -> tuple[str, str]:
    """Cell of a folded row: error over budget, and the layer if there is one."""
    if stage is None:
        return "", ""
    figures = f"{scientific(stage.rel):>7}/{scientific(stage.budget)}"
    layer = "" if stage.layer is None else f"layer {stage.layer}"
    return f"{marks[not stage.ok]} {figures}", layer


FAULT_HEADER = ("fault", "where", "detected", "expected", "found")


def fault_line(fault: Fault) -> list[str]:
    """Row of the table of faults."""
    detected = "✓ yes" if fault.ok else "✗ elsewhere" if fault.detected else "✗ no"
    found = fault.found_stage or "nowhere"
    return [fault.name, fault.where, detected, fault.expected_stage, found]


def good(report: Report) -> bool:
    """Whether the report is a success."""
    return report.all_found if isinstance(report, FaultReport) else report.equal


def title(report: Report) -> str:
    """Title of a report."""
    return report.title
