"""The page that compares runs: complete in itself, with what they measured and wrote."""

import html.parser
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.report.command import main

SCRIPT = "<script>alert('&')</script>"


def run(folder: Path, model: MistralConfig, losses: list[float], sample: str, **train: Any) -> Path:
    """The folder of a run that has measured these losses."""
    (folder / "samples").mkdir(parents=True)
    fields = {"model": model.to_dict(), "train": {"seed": 0, "learning_rate": 1.0} | train}
    (folder / "config.json").write_text(json.dumps(fields))
    rows = [
        {"step": step, "tokens": 100 * step, "time_s": 6.0 * step, "train/loss": loss}
        for step, loss in enumerate(losses, 1)
    ]
    if rows:
        rows[-1] |= {"val/bpb": losses[-1] / 2, "train/tokens_per_sec": 1234.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (1, 20):
        (folder / "samples" / f"step-{step:06}.txt").write_text(f"{sample} after {step}\n")
    return folder


class Read(html.parser.HTMLParser):
    """The text of a page, the cells of its tables, and all that it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.loads, self.tags = "", list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def rows_of(page: str) -> dict[str, list[str]]:
    """The cells of each row of the tables, by what heads it."""
    lines = re.findall(r"<tr><th>([^<]+)((?:<td>[^<]*)+)", page)
    return {head: cells.strip().split("<td>")[1:] for head, cells in lines}


@pytest.fixture
def compared(tiny: MistralConfig, tmp_path: Path) -> str:
    losses = [5.0 - step / 50 for step in range(120)]
    a = run(tmp_path / "a", tiny, losses, SCRIPT)
    b = run(tmp_path / "b&c", tiny, losses[:40], "Our fathers", learning_rate=2.0)
    assert main([str(a), str(b), "--out", str(tmp_path / "page.html")]) == 0
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_figures_stand_side_by_side(compared: str, tiny: MistralConfig) -> None:
    rows = rows_of(compared)
    assert rows["parameters"] == [f"{tiny.n_params:,}"] * 2
    assert rows["steps"] == ["120", "40"]
    assert rows["tokens"] == ["12,000", "4,000"]
    assert rows["held-out bits per byte"] == ["1.3100", "2.1100"]
    assert rows["minutes"] == ["12.0", "4.0"]


def test_options_that_differ_are_apart_from_those_in_common(compared: str) -> None:
    differing, common = compared.split("<details><summary>Options in common")
    assert rows_of(differing)["train.learning_rate"] == ["1.0", "2.0"]
    assert "train.seed" not in differing
    assert rows_of(common)["train.seed"] == ["0"]


def test_what_a_model_wrote_is_text_and_nothing_is_loaded(compared: str) -> None:
    read = Read(compared)
    assert f"{SCRIPT} after 20" in read.text
    assert "script" not in read.tags
    assert [link for link in read.loads if not link.startswith("#")] == []
    assert "Our fathers after 1\n" in read.text


def test_both_curves_are_drawn_with_names(compared: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", compared, re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        texts = {"".join(node.itertext()).strip() for node in ET.fromstring(drawing).iter()}
        assert {"a", "b&c", "tokens trained on"} <= texts


def test_a_run_alone_that_has_just_begun_is_drawn(tiny: MistralConfig, tmp_path: Path) -> None:
    folder = run(tmp_path / "new", tiny, [], "")
    for path in (folder / "samples").iterdir():
        path.unlink()
    assert main([str(folder), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert rows_of(page)["train.learning_rate"] == ["1.0"]
    assert "It wrote none." in page


def test_the_same_runs_give_the_same_page(compared: str, tmp_path: Path) -> None:
    again = tmp_path / "again.html"
    assert main([str(tmp_path / "a"), str(tmp_path / "b&c"), "--out", str(again)]) == 0
    assert again.read_text(encoding="utf-8") == compared


def test_what_is_no_run_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    with pytest.raises(BadInput, match="is not a training run"):
        main([str(tmp_path), "--out", str(out)])
    with pytest.raises(BadInput, match="name its folder"):
        main(["--out", str(out)])
    assert not out.exists()
