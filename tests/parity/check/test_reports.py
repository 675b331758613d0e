"""Every kind of report says the verdict, names the worst, and is well formed whatever it holds."""

import dataclasses
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from lechat_jax.errors import BadInput
from parity.check.reports import write as reports
from parity.check.verdict import STAGES, Fault, FaultReport, Stage, Verdict

Write = Callable[[Path, Verdict | FaultReport], None]
WRITERS: tuple[Write, ...] = (
    *(reports.write_json, reports.write_junit, reports.write_markdown, reports.write_html),
)
TORCH, TRANSFORMERS = ("jax", "torch"), ("jax", "transformers")
HOSTILE = "a|b <script>alert(1)</script> & \"q\" 'q' *x* \x1b[31m \x00 \udcff\nnext\r"


def attn(layer: int, rel: float, position: int | None = None) -> Stage:
    return Stage("attn", layer, "float64", TORCH, rel, 1e-11, position)


EQUAL = Verdict(
    title="tiny model",
    stages=(
        Stage("embed", None, "float64", TORCH, 0.0, 1e-11),
        attn(0, 1.5e-15),
        attn(1, 3.4e-13),
        Stage("logits", None, "float32", TORCH, 2e-6, 1e-5),
        Stage("logits", None, "bfloat16", ("torch", "torch"), 1.2e-2, 2.3e-2),
    ),
    notes=("weights of seed 0",),
    seconds=12.34,
    machine="two cores",
)
DIFFERENT = dataclasses.replace(
    EQUAL,
    stages=(*EQUAL.stages[:1], attn(0, 0.031, 7), attn(1, math.nan), *EQUAL.stages[3:]),
    hint="window off by one",
)
FAULTS = FaultReport(
    faults=(
        Fault("window one wider", "config", True, "attn.0", "attn.0", ("levanter", "EasyDeL")),
        Fault("gate and up swapped", "weights", True, "mlp.2", "mlp.1"),
        Fault("another epsilon", "config", False, "norm", None, ("levanter",)),
    ),
    criteria=("levanter", "EasyDeL"),
    seconds=81.25,
    machine="two cores",
)
HOSTILE_VERDICT = Verdict(
    HOSTILE,
    (Stage("embed", None, "float64", TORCH, 1.0, 1e-11, note=HOSTILE),),
    *((HOSTILE,), HOSTILE, 1.0, HOSTILE),
)
HOSTILE_FAULTS = FaultReport(
    (Fault(HOSTILE, "code", False, "norm", None, (HOSTILE,)),), (HOSTILE,), 1.0, HOSTILE
)
EVERY = [EQUAL, DIFFERENT, FAULTS, Verdict("empty", ()), HOSTILE_VERDICT, HOSTILE_FAULTS]


def shown(report: Verdict | FaultReport, width: int = 200, terminal: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, highlight=False)
    reports.show(console, report)
    return file.getvalue()


def written(tmp_path: Path, write: Write, report: Verdict | FaultReport) -> str:
    path = tmp_path / "report"
    write(path, report)
    return path.read_text(encoding="utf-8")


def wide() -> Verdict:
    """Every stage in three layers, three dtypes and three pairs."""
    pairs = (TORCH, TRANSFORMERS, ("torch", "transformers"))
    return Verdict(
        "tiny",
        tuple(
            Stage(stage, layer, dtype, pair, 1.5e-13, 2.3e-11)
            for dtype in ("float64", "float32", "bfloat16")
            for pair in pairs
            for stage in STAGES
            for layer in ((0, 11) if stage in ("attn", "mlp") else (None,))
        ),
    )


# --- in a terminal ---


def test_equal_is_said_with_how_much_was_compared() -> None:
    lines = shown(EQUAL).splitlines()
    assert "equal: 5 of 5 comparisons within budget" in lines
    assert lines[-3:] == ["weights of seed 0", "took 12.3 s", "two cores"]


def test_different_is_said_with_the_first_place_its_figures_and_the_hint() -> None:
    lines = shown(DIFFERENT, width=80).splitlines()
    first = "attn of layer 0, position 7, float64, jax against torch: rel 3.1e-02, budget 1e-11"
    at = lines.index(f"different: first at {first}")
    assert lines[at + 1 : at + 3] == [
        "looks like: window off by one",
        "2 of 5 comparisons over budget",
    ]


def test_where_nothing_was_compared_nothing_was_shown() -> None:
    assert "not shown: nothing was compared" in shown(Verdict("empty", ()))


def test_layers_are_one_row_that_names_the_worst() -> None:
    (row,) = (line for line in shown(EQUAL).splitlines() if line.startswith("attn"))
    assert row.split() == ["attn", "✓", "ok", "3.4e-13/1e-11", "layer", "1"]


def test_of_several_layers_no_number_is_worse_than_any() -> None:
    (row,) = (line for line in shown(DIFFERENT).splitlines() if line.startswith("attn"))
    assert row.split() == ["attn", "✗", "no", "NaN/1e-11", "layer", "1"]


def test_a_column_names_its_dtype_and_whose_result_is_the_truth() -> None:
    head = shown(EQUAL).splitlines()[2:5]
    assert [re.split(r"\s{2,}", line.strip()) for line in head] == [
        ["float64", "float32", "bfloat16"],
        ["jax against", "jax against", "torch against"],
        ["stage", "torch", "torch float64", "torch float64"],
    ]


def test_what_was_not_compared_stays_empty() -> None:
    (row,) = (line for line in shown(EQUAL).splitlines() if line.startswith("logits"))
    assert row.split() == [
        *("logits", "✓", "ok", "2e-06/1e-05", "✓", "ok", "1.2e-02/2.3e-02"),
    ]
    assert row.index("2e-06") > 30  # below float32, not below float64


@pytest.mark.parametrize("terminal", [True, False])
def test_in_eighty_columns_no_figure_is_broken(terminal: bool) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown(wide(), 80, terminal))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("✓ ok 1.5e-13/2.3e-11") == 9 * len(STAGES)
    assert text.count("layer 0") + text.count("layer 11") == 9 * 2
    assert text.count("stage ") == 3  # a table for each dtype


def test_in_two_hundred_and_twenty_columns_there_is_one_table() -> None:
    assert shown(wide(), 220).count("stage ") == 1


def test_colour_and_rules_are_only_for_a_terminal() -> None:
    assert "\x1b[" in shown(DIFFERENT, terminal=True)
    assert "─" in shown(DIFFERENT, terminal=True)
    assert not re.search("\x1b|─", shown(DIFFERENT))


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("report", [HOSTILE_VERDICT, HOSTILE_FAULTS])
def test_text_does_not_drive_the_terminal(report: Verdict | FaultReport, terminal: bool) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown(report, terminal=terminal).replace("\x1b[31m", ""))
    assert "a|b <script>alert(1)</script>" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\ud800-\udfff]", text)


def test_a_terminal_without_unicode_is_told_in_words() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=120)
    for report in (DIFFERENT, FAULTS):
        reports.show(console, report)
    console.file.flush()
    assert b"NO     NaN/1e-11 layer 1" in raw.getvalue()
    assert b"elsewhere" in raw.getvalue()


def test_faults_are_shown_with_who_would_have_missed_them() -> None:
    lines = shown(FAULTS).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("fault "))
    assert [re.split(r"\s{2,}", line.strip()) for line in lines[start : start + 4]] == [
        ["fault", "where", "detected", "expected", "found", "missed by"],
        ["window one wider", "config", "✓ yes", "attn.0", "attn.0", "levanter, EasyDeL"],
        ["gate and up swapped", "weights", "✗ elsewhere", "mlp.2", "mlp.1"],
        ["another epsilon", "config", "✗ no", "norm", "nowhere", "levanter"],
    ]
    assert lines[-5:] == [
        "1 of 3 faults found at the stage where they are; not gate and up swapped, another epsilon",
        "levanter would have missed 2 of 3",
        "EasyDeL would have missed 1 of 3",
        "took 81.2 s",
        "two cores",
    ]


def test_where_no_published_test_was_tried_nobody_would_have_missed_a_fault() -> None:
    """As in a checkpoint, whose shapes are not those of these tests."""
    report = dataclasses.replace(FAULTS, criteria=(), title="Faults planted in DIR", notes=("so",))
    lines = shown(report).splitlines()
    assert lines[0] == "Faults planted in DIR"
    assert not any("missed" in line or "levanter" in line for line in lines)
    assert lines[-3:] == ["so", "took 81.2 s", "two cores"]


# --- JSON ---


@pytest.mark.parametrize("report", EVERY)
def test_json_is_what_the_report_says_without_nan(
    tmp_path: Path, report: Verdict | FaultReport
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = written(tmp_path, reports.write_json, report)
    assert json.loads(text, parse_constant=refuse) == report.to_dict()


# --- JUnit ---


def test_junit_has_a_case_for_each_comparison(tmp_path: Path) -> None:
    root = ET.fromstring(written(tmp_path, reports.write_junit, DIFFERENT))
    (suite,) = root
    assert [child.tag for child in suite] == ["properties", *["testcase"] * 5, "system-out"]
    assert suite.attrib == {
        "name": "tiny model",
        "tests": "5",
        "failures": "2",
        "errors": "0",
        "skipped": "0",
        "time": "12.340",
    }
    cases = [(case.get("classname"), case.get("name")) for case in suite.iter("testcase")]
    assert cases == [
        ("parity.float64.jax against torch", "embed"),
        ("parity.float64.jax against torch", "attn.0"),
        ("parity.float64.jax against torch", "attn.1"),
        ("parity.float32.jax against torch float64", "logits"),
        ("parity.bfloat16.torch against torch float64", "logits"),
    ]
    failures = {case.get("name"): case.find("failure") for case in suite.iter("testcase")}
    assert [name for name, failure in failures.items() if failure is not None] == [
        "attn.0",
        "attn.1",
    ]
    first = failures["attn.0"]
    assert first is not None
    message = "attn of layer 0, position 7, float64, jax against torch: rel 3.1e-02, budget 1e-11"
    assert first.attrib == {"message": message, "type": "divergence"}
    assert first.text == f"{message}\nwindow off by one"


def test_junit_has_a_case_for_each_fault(tmp_path: Path) -> None:
    root = ET.fromstring(written(tmp_path, reports.write_junit, FAULTS))
    messages = [
        failure.get("message") if (failure := case.find("failure")) is not None else None
        for case in root.iter("testcase")
    ]
    assert messages == [None, "found at mlp.1, expected at mlp.2", "not detected, expected at norm"]


@pytest.mark.parametrize("report", [Verdict("empty", ()), FaultReport(())])
def test_junit_fails_where_nothing_was_compared(
    tmp_path: Path, report: Verdict | FaultReport
) -> None:
    root = ET.fromstring(written(tmp_path, reports.write_junit, report))
    assert (root.get("tests"), root.get("failures")) == ("1", "1")


@pytest.mark.parametrize("report", EVERY)
def test_junit_counts_what_it_holds(tmp_path: Path, report: Verdict | FaultReport) -> None:
    root = ET.fromstring(written(tmp_path, reports.write_junit, report))
    assert root.tag == "testsuites"
    for element in (root, *root.iter("testsuite")):
        assert element.get("tests") == str(len(list(root.iter("testcase"))))
        assert element.get("failures") == str(len(list(root.iter("failure"))))


# --- Markdown ---


def cells(line: str) -> list[str]:
    """A row as GitHub splits it: at each bar that is not escaped."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.parametrize("report", EVERY)
def test_markdown_tables_are_rectangular(tmp_path: Path, report: Verdict | FaultReport) -> None:
    for block in written(tmp_path, reports.write_markdown, report).split("\n\n"):
        rows = [cells(line) for line in block.splitlines() if block.startswith("|")]
        assert len({len(row) for row in rows}) <= 1
        assert not rows or set(rows[1]) == {"---"}


def test_markdown_says_the_verdict_the_worst_layers_and_what_is_over(tmp_path: Path) -> None:
    blocks = written(tmp_path, reports.write_markdown, DIFFERENT).split("\n\n")
    first = "attn of layer 0, position 7, float64, jax against torch: rel 3.1e-02, budget 1e-11"
    assert blocks[:2] == ["## tiny model", f"❌ **different: first at {first}**"]
    table, over = (
        [cells(line) for line in block.splitlines()] for block in blocks if block.startswith("|")
    )
    assert table[0] == [
        "stage",
        "float64: jax against torch",
        "float32: jax against torch float64",
        "bfloat16: torch against torch float64",
    ]
    assert table[3] == ["attn", "✗ no NaN/1e-11 layer 1", "", ""]
    assert over[2:] == [
        ["attn.0", "float64", "jax against torch", "3.1e-02", "1e-11", "7", ""],
        ["attn.1", "float64", "jax against torch", "NaN", "1e-11", "", ""],
    ]
    assert "- looks like: window off by one" in blocks[-1].splitlines()


def test_markdown_names_who_would_have_missed_a_fault(tmp_path: Path) -> None:
    text = written(tmp_path, reports.write_markdown, FAULTS)
    row = "| window one wider | config | ✓ yes | attn.0 | attn.0 | levanter, EasyDeL |"
    assert row in text.splitlines()


def test_markdown_escapes_what_would_be_markup(tmp_path: Path) -> None:
    text = written(tmp_path, reports.write_markdown, HOSTILE_VERDICT)
    assert not re.search(r"(?<!\\)[<>&]", text)
    assert r"a\|b \<script\>" in text
    assert r"\*x\*" in text
    assert "\nnext" not in text


def test_a_summary_stays_short(tmp_path: Path) -> None:
    stages = tuple(attn(layer, 1.0) for layer in range(1000))
    text = written(tmp_path, reports.write_markdown, Verdict("deep", stages))
    assert "… and 800 more" in text
    assert len(text) < 20_000


# --- HTML ---


class Page(HTMLParser):
    """What a browser would find: that tags match, and the text."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def lines(self) -> list[list[str]]:
        """The words of each line of the tables."""
        return [line.split() for line in self.text.splitlines()]


@pytest.mark.parametrize("report", EVERY)
def test_a_page_is_well_formed_and_fetches_nothing(
    tmp_path: Path, report: Verdict | FaultReport
) -> None:
    text = written(tmp_path, reports.write_html, report)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "a"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name in ("src", "href") or name.startswith("on")}
    assert not re.search(r"https?:|url\(|@import", text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_a_page_shows_each_error_over_its_budget_and_all_its_figures(tmp_path: Path) -> None:
    page = Page(written(tmp_path, reports.write_html, DIFFERENT))
    first = "attn of layer 0, position 7, float64, jax against torch: rel 3.1e-02, budget 1e-11"
    assert f"✗ different: first at {first}" in page.text
    error_map = page.lines.index(["embed", "✓", "0"])
    assert page.lines[error_map - 3 : error_map + 4] == [
        ["float64", "float32", "bfloat16"],
        "stage jax against torch jax against torch float64 torch against torch float64".split(),
        ["─" * 81],
        ["embed", "✓", "0"],
        ["attn.0", "✗", "3.1e+09"],
        ["attn.1", "✗", "NaN"],
        ["logits", "✓", "0.2", "✓", "0.52"],
    ]
    assert "attn.0 ✗ 3.1e+09 float64 jax against torch 3.1e-02 1e-11 7".split() in page.lines
    for line in ("looks like: window off by one", "weights of seed 0", "took 12.3 s", "two cores"):
        assert line in page.text


@pytest.mark.parametrize(
    ("rel", "colour"),
    [
        *((0.0, 0), (9e-4, 0), (9e-3, 1), (0.09, 2), (1.0, 3)),  # within
        *((1.001, 4), (99.0, 5), (1e3, 6), (1e5, 7), (math.nan, 7), (math.inf, 7)),
    ],
)
def test_a_cell_is_coloured_by_the_decade(tmp_path: Path, rel: float, colour: int) -> None:
    stage = Stage("loss", None, "float64", TORCH, rel, budget=1.0)
    text = written(tmp_path, reports.write_html, Verdict("tiny", (stage,)))
    colours = re.findall(r"background-color: (#\w+)[^>]*> [✓✗] ", text)
    assert colours == 2 * [reports.BINS[colour][2].split(" on ")[1]]  # on the map and in the table


def luminance(colour: str) -> float:
    """Relative luminance, as the accessibility guidelines (WCAG 2.1) define it."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_numbers_can_be_read_on_every_colour() -> None:
    for _, _, style in reports.BINS:
        dark, light = sorted(map(luminance, style.removeprefix("bold ").split(" on ")))
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG level AA


def test_a_page_says_who_would_have_missed_a_fault(tmp_path: Path) -> None:
    lines = Page(written(tmp_path, reports.write_html, FAULTS)).lines
    at = lines.index(["fault", "where", "detected", "expected", "found", "missed", "by"])
    assert lines[at + 2 : at + 5] == [
        "window one wider config ✓ yes attn.0 attn.0 levanter, EasyDeL".split(),
        "gate and up swapped weights ✗ elsewhere mlp.2 mlp.1".split(),
        "another epsilon config ✗ no norm nowhere levanter".split(),
    ]


def test_a_page_shows_markup_as_text(tmp_path: Path) -> None:
    for report in (HOSTILE_VERDICT, HOSTILE_FAULTS):
        page = Page(written(tmp_path, reports.write_html, report))
        assert page.text.count("a|b <script>alert(1)</script> & \"q\" 'q'") >= 3
        assert "\x1b" not in page.text


# --- every file ---


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("report", EVERY)
def test_a_file_is_plain_text_whatever_the_report_was_told(
    tmp_path: Path, write: Write, report: Verdict | FaultReport
) -> None:
    text = written(tmp_path, write, report)
    assert text.endswith("\n")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("write", WRITERS[1:])
def test_the_order_is_that_of_execution_whatever_came_first(tmp_path: Path, write: Write) -> None:
    backwards = dataclasses.replace(DIFFERENT, stages=DIFFERENT.stages[::-1])
    assert written(tmp_path, write, backwards) == written(tmp_path, write, DIFFERENT)


@pytest.mark.parametrize("write", WRITERS)
def test_where_nothing_can_be_written_is_one_clear_line(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "missing" / "report"
    with pytest.raises(BadInput, match=r"^cannot write .*report \(No such file .*another file$"):
        write(path, EQUAL)


@pytest.mark.parametrize("write", WRITERS)
def test_a_folder_in_the_way_is_kept_and_nothing_is_left_beside_it(
    tmp_path: Path, write: Write
) -> None:
    (tmp_path / "report").mkdir()
    with pytest.raises(BadInput, match="cannot write"):
        write(tmp_path / "report", EQUAL)
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
