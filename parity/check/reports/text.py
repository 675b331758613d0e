"""How a finding of the parity check is said, the same in every kind of report."""

import math
import re
from collections.abc import Iterable

from parity.check.verdict import DTYPES, STAGES, Fault, FaultReport, Stage, Verdict

Report = Verdict | FaultReport

Column = tuple[str, tuple[str, str]]
"""What stands side by side in a table: a dtype, and who is compared with whom."""

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
    """Two digits of a number, or one where the second is nought.

    >>> scientific(0.0312), scientific(1e-11), scientific(0.0), scientific(math.nan)
    ('3.1e-02', '1e-11', '0', 'NaN')
    """
    if math.isnan(value):
        return "NaN"
    return f"{value:.1e}".replace(".0e", "e") if value and math.isfinite(value) else f"{value:g}"


def pair_of(column: Column) -> str:
    """Who is judged by whom.

    >>> pair_of(("float64", ("jax", "torch"))), pair_of(("float32", ("jax", "torch")))
    ('jax against torch', 'jax against torch float64')
    """
    dtype, (judged, oracle) = column
    return f"{judged} against {oracle}" + ("" if dtype == "float64" else " float64")


def column_of(stage: Stage) -> Column:
    """Where a comparison stands in a table."""
    return stage.dtype, stage.pair


def columns(stages: Iterable[Stage]) -> list[Column]:
    """Every dtype and pair that was compared: by dtype, pairs as they came."""
    seen = dict.fromkeys(map(column_of, stages))
    return sorted(seen, key=lambda c: DTYPES.index(c[0]) if c[0] in DTYPES else len(DTYPES))


def worst(stages: Iterable[Stage]) -> Stage:
    """The comparison furthest over its budget, or nearest to it."""
    return max(stages, key=lambda stage: (not stage.ok, stage.share))


def describe(stage: Stage) -> str:
    """One comparison in words.

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
    """What follows the verdict: hint, counts, notes, time and machine, a sentence each."""
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
    """The worst comparison of each stage, or of each layer of it, in each column; as executed."""
    rows: dict[str, dict[Column, Stage]] = {}
    for stage in sorted(stages, key=lambda s: s.order if by_layer else (STAGES.index(s.stage),)):
        row = rows.setdefault(stage.label if by_layer else stage.stage, {})
        column = column_of(stage)
        row[column] = worst([row.get(column, stage), stage])
    return rows


def cell(stage: Stage | None, marks: tuple[str, str] = ("✓ ok", "✗ no")) -> tuple[str, str]:
    """What a folded row says in one column: the figures, and the layer if there is one."""
    if stage is None:
        return "", ""
    figures = f"{scientific(stage.rel):>7}/{scientific(stage.budget)}"
    layer = "" if stage.layer is None else f"layer {stage.layer}"
    return f"{marks[not stage.ok]} {figures}", layer


FAULT_HEADER = ("fault", "where", "detected", "expected", "found")


def fault_line(fault: Fault) -> list[str]:
    """What became of one fault, but for who would have missed it."""
    detected = "✓ yes" if fault.ok else "✗ elsewhere" if fault.detected else "✗ no"
    found = fault.found_stage or "nowhere"
    return [fault.name, fault.where, detected, fault.expected_stage, found]


def good(report: Report) -> bool:
    """Whether the verdict is yes."""
    return report.all_found if isinstance(report, FaultReport) else report.equal


def title(report: Report) -> str:
    """What was checked."""
    return report.title
