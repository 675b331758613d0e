"""Tokenising is measured beside the library tokenizers, on the same text, with its memory."""

import json
from pathlib import Path

import pytest

from lechat_jax.errors import BadInput
from parity.bench.command import main

FLAGS = "--gb 0.002 --peer-gb 0.001 --shards 2 --read-gb 0.001".split()


def test_the_report_has_both_on_the_same_text(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    path = tmp_path / "report.json"
    assert main(["tokenize", *FLAGS, "--folder", str(tmp_path / "work"), "--json", str(path)]) == 0
    ours, theirs = json.loads(path.read_text())["rows"]
    assert (ours["impl"], theirs["impl"]) == ("lechat_jax", "tokenizers")
    assert 2e6 <= ours["bytes"] < 2.1e6
    assert 1e6 <= theirs["bytes"] < 1.1e6
    for row in (ours, theirs):
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
        assert 3 < row["bytes"] / row["tokens"] < 6, "as of English"
        assert row["peak_bytes"] is None or row["peak_bytes"] > 1e6
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shards", "0"], "--shards must be at least 1"),
        (["--gb", "0"], "--gb must be more than 0"),
        (["--peer-gb", "-1"], "--peer-gb must be at least 0"),
        (["--folder", "/nowhere/at/all"], "there is no folder"),
    ],
)
def test_bad_flags_are_one_clear_line(flags: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        main(["tokenize", *flags])
