"""Conversion is measured against a copy of the same bytes, in turn, with its memory."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from lechat_jax.errors import BadInput
from parity.bench.command import main
from parity.bench.convert import row
from parity.measure import PeakAnonymous

FLAGS = "--preset lechat-15m --layers 1 --repetitions 2 --read-gb 0.001".split()


def test_the_report_has_the_copy_and_both_directions(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    path = tmp_path / "report.json"
    assert main(["convert", *FLAGS, "--folder", str(tmp_path / "work"), "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["impl"] for row in rows] == ["copy", "hf to lechat", "lechat to hf"]
    for one in rows:
        assert one["work"] == "convert"
        assert 25e6 < one["bytes"] < 27e6  # 12,767,808 weights of two bytes, and the tokenizer
        assert one["gb_s"] == pytest.approx(one["bytes"] / 1e9 / one["seconds"])
        assert len(one["ratios"]) == 2
        assert one["peak_anon_bytes"] is None or one["peak_anon_bytes"] > 1e6
    assert rows[0]["ratio"] == 1
    assert list((tmp_path / "work").iterdir()) == []


def test_the_ratio_is_to_the_copy_of_the_same_repetition() -> None:
    found = row("x", [2.0, 30.0, 3.0], [1.0, 20.0, 2.0], 4_000_000_000, 0).details
    assert (found["ratio"], found["seconds"]) == (1.5, 3.0)
    assert found["gb_s"] == pytest.approx(4 / 3)


def test_anonymous_memory_is_seen_while_it_is_there() -> None:
    with PeakAnonymous() as before:
        time.sleep(0.05)
    with PeakAnonymous() as memory:
        array = np.ones(12_500_000)  # 100 MB
        time.sleep(0.1)
        del array
    if before.bytes is None or memory.bytes is None:
        pytest.skip("only Linux says how much memory is anonymous")
    assert memory.bytes - before.bytes == pytest.approx(100e6, rel=0.2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repetitions", "0"], "--repetitions must be at least 1"),
        (["--shard-gb", "0"], "--shard-gb must be more than 0"),
        (["--folder", "/nowhere/at/all"], "there is no folder"),
    ],
)
def test_bad_flags_are_one_clear_line(flags: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        main(["convert", *flags])
