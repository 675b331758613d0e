"""The benchmark of vision: both sides see the same image by the same tower."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lechat_jax.config import PRESETS
from lechat_jax.errors import BadInput
from parity.bench import vision
from parity.bench.command import main
from parity.peers import transformers
from tests.support.images import PIXTRAL, SEES

KINDS = {"merged": SEES, "pixtral": dataclasses.replace(SEES, vision=PIXTRAL)}


@pytest.fixture(params=KINDS, autouse=True)
def seeing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "seeing", KINDS[request.param])


def bench(folder: Path, *flags: str) -> dict[str, Any]:
    report = folder / "report.json"
    common = ("--preset", "seeing", "--read-gb", "0.001", "--repetitions", "2")
    assert main(["vision", *common, *flags, "--json", str(report)]) == 0
    return json.loads(report.read_text(encoding="utf-8"))


def test_both_see_the_same_and_take_turns(tmp_path: Path) -> None:
    report = bench(tmp_path, "--layers", "3", "--sizes", "40x16", "8x32")
    rows = report["rows"]
    assert [(row["impl"], row["size"], row["context"]) for row in rows] == [
        ("lechat_jax", "40x16", 40),
        ("transformers", "40x16", 40),
        ("lechat_jax", "8x32", 16),
        ("transformers", "8x32", 16),
    ]
    for row in rows:
        assert (row["work"], row["dtype"], row["batch"], row["layers"]) == (
            "vision",
            "float32",
            1,
            3,
        )
        assert row["patches_per_s"] == pytest.approx(row["context"] * row["images_per_s"])
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert ours["ratio"] > 0
        assert 0 < ours["error"] < 1e-5
        assert theirs.get("error") is None
    assert report["largest_relative_error"] == max(row["error"] for row in rows[::2])


def test_features_that_differ_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_features = transformers.image_features

    def flipped(*given: Any) -> Any:
        see = image_features(*given)
        return lambda pixels: see(np.flip(pixels, 1).copy())

    monkeypatch.setattr(transformers, "image_features", flipped)
    report = bench(tmp_path, "--layers", "1", "--sizes", "16x16")
    assert report["largest_relative_error"] > 0.1


def test_lechat_alone_computes_in_bfloat16(tmp_path: Path) -> None:
    flags = ("--layers", "1", "--sizes", "16x16", "--dtype", "bfloat16", "--no-transformers")
    (row,) = bench(tmp_path, *flags)["rows"]
    assert (row["impl"], row["dtype"]) == ("lechat_jax", "bfloat16")
    assert "error" not in row


def test_the_whole_tower_is_that_of_the_preset() -> None:
    config = vision.tower_of("mistral-small-24b-2503")
    assert config.vision == PRESETS["mistral-small-24b-2503"].vision
    assert config.dim == PRESETS["mistral-small-24b-2503"].dim


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--preset lechat-15m", "lechat-15m has no vision tower"),
        ("--preset seeing --sizes large", "width and height in pixels, such as 448x672"),
        ("--preset seeing --sizes 16x18", r"multiples of \d pixels up to 48, .* not 16x18"),
        ("--preset seeing --sizes 16x56", "up to 48"),
        ("--preset seeing --sizes 0x16", "not 0x16"),
        ("--layers 0", "--layers must be at least 1"),
    ],
)
def test_bad_flags_are_one_clear_line(flags: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        main(["vision", *flags.split()])
