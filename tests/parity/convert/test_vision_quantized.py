"""Quantised checkpoints of models that see: the text part is, and the tower is in floats."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.config import MistralConfig
from lechat_jax.formats.layouts import from_format
from lechat_jax.formats.names import Format, rows
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.sampling import Sampling
from parity.convert.command import main as convert
from parity.convert.open_source import open_source
from tests.parity.convert import test_fp8, test_gptq
from tests.parity.convert.test_vision import prompt
from tests.support.images import PIXTRAL, SEES, two_images

KINDS: dict[str, MistralConfig] = {
    "mistral-small-3.1": dataclasses.replace(SEES, n_layers=1),
    "pixtral-12b": dataclasses.replace(SEES, n_layers=1, vision=PIXTRAL),
}
WAYS = [
    ("mistral-small-3.1", "blocks"),
    ("mistral-small-3.1", "mistral"),
    ("mistral-small-3.1", "gptq act-order"),
    ("mistral-small-3.1", "compressed-tensors"),
    ("pixtral-12b", "ministral-3"),
    ("pixtral-12b", "awq"),
]


def written(kind: str, way: str, folder: Path) -> dict[str, np.ndarray]:
    """A checkpoint stored in that way, and the weights that it stands for in lechat's shapes."""
    config = KINDS[kind]
    fmt: Format = "mistral" if way == "mistral" else "hf"
    meant: dict[str, Any] = {}
    if way in test_gptq.WAYS:
        meant |= test_gptq.write(folder, config, test_gptq.WAYS[way])
    else:
        meant |= test_fp8.write(folder, config, test_fp8.WAYS[way])
    return {
        name: from_format(np.asarray(meant[getattr(row, fmt)]), config, fmt, row)
        for name, row in rows(config).items()
    }


def said(model: Path, config: MistralConfig) -> list[int]:
    """What it greedily says to two images."""
    assert config.vision is not None
    images = two_images(config.vision)
    generator = Generator.from_checkpoint(model, dtype="float32")
    ids = prompt(images)
    return generator.generate(ids, 6, Sampling(temperature=0), eos_ids=(), images=images).ids


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_the_text_is_what_its_bytes_stand_for_and_the_tower_stays_as_it_is(
    kind: str, way: str, tmp_path: Path
) -> None:
    src, config = tmp_path / "src", KINDS[kind]
    meant = written(kind, way, src)
    source = open_source(src, dequantize=True)
    assert source.config == config
    for name, array in meant.items():
        np.testing.assert_array_equal(source.read(name), array, err_msg=name)
    kept, plain = tmp_path / "kept", tmp_path / "plain"
    assert convert([str(src), str(kept), "--to", "lechat"]) == 0
    weights = SavedModel.open(kept).load().weights
    if way in test_gptq.WAYS:
        assert weights["blocks.0.attn.q.kernel"].dtype == np.uint8
    for name in (name for name in meant if name.startswith(("vision.", "projector."))):
        np.testing.assert_array_equal(np.asarray(weights[name], np.float32), meant[name])
    flags = ["--dequantize", "--dtype", "float32"]
    assert convert([str(src), str(plain), "--to", "lechat", *flags]) == 0
    assert said(src, config) == said(plain, config)


@pytest.mark.parametrize("text_only", [False, True])
def test_the_quantisation_may_be_said_of_the_text_alone(text_only: bool, tmp_path: Path) -> None:
    meant = written("mistral-small-3.1", "blocks", tmp_path / "src")
    path = tmp_path / "src" / "config.json"
    fields = json.loads(path.read_text())
    fields["text_config"]["quantization_config"] = fields.pop("quantization_config")
    path.write_text(json.dumps(fields))
    source = open_source(tmp_path / "src", dequantize=True, text_only=text_only)
    for name in source.names:
        np.testing.assert_array_equal(source.read(name), meant[name], err_msg=name)
