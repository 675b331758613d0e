"""Drawings to learn to see from: what is drawn is what is said, and a score that can be low."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lechat_jax.data.dataset import open_dataset
from lechat_jax.errors import BadInput
from lechat_jax.generate.generator import load
from parity.drawings import COLOURS, QUESTION, SHAPES, drawing, main


def test_the_colour_of_a_drawing_is_the_one_that_is_said() -> None:
    """What is far from the ground's colour is the shape."""
    draw = np.random.default_rng(0)
    for _ in range(60):
        said, image = drawing(draw)
        _, colour, shape = said.split()
        pixels = np.asarray(image, np.int32)
        is_shape = np.abs(pixels - pixels[0, 0]).max(axis=2) > 25  # a corner is never drawn on
        painted = np.median(pixels[is_shape], axis=0)
        named = min(COLOURS, key=lambda name: np.abs(painted - COLOURS[name]).sum())
        assert named == colour
        assert shape in SHAPES
        assert 30 < is_shape.sum() < 0.6 * is_shape.size


def test_drawings_and_a_model_that_has_not_learned_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shapes"
    assert main([str(folder), "--n-train", "40", "--n-held-out", "3"]) == 0
    model = load(folder / "model")
    assert model.tokenizer is not None
    dataset = open_dataset(
        str(folder / "train.jsonl"),
        model.tokenizer,
        *(48, 4, 0, "auto", lambda done, of: None),
        vision=model.config.vision,
    )
    rows = dataset.rows(0, 1)
    assert rows.images is not None
    assert dataset.opening == QUESTION
    line = json.loads((folder / "held-out.jsonl").read_text().splitlines()[0])
    image = folder / line["messages"][0]["content"][0]["image_url"]
    with Image.open(image) as drawn:
        assert drawn.size == (64, 64)
    assert main([str(folder), "--score", str(folder / "model")]) == 0
    assert "names colour and shape of 0 in 3 held-out drawings" in capsys.readouterr().out
    with pytest.raises(BadInput, match="exists"):
        main([str(folder)])
    with pytest.raises(BadInput, match=r"held-out\.jsonl is not there"):
        main([str(tmp_path / "none"), "--score", str(folder / "model")])
