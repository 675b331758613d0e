"""A conversion makes int8 kernels, and makes of int8 kernels the numbers they stand for."""

import json
import os
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lechat_jax.checkpoint.weights import load_weights, weight_shapes
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.files.safetensors import TensorFiles
from lechat_jax.formats.names import FORMATS, Format
from lechat_jax.quantize.scheme import Form, dequantize, quantized
from parity.check.command import main as check
from tests.parity.checkpoints import (
    BF16,
    Weights,
    assert_equal,
    convert,
    random_weights,
    spoil,
    write_torch,
)

INT8 = ("--quantize", "int8")


@pytest.fixture
def weights(tiny: MistralConfig) -> Weights:
    return random_weights(tiny)


@pytest.fixture
def start(tiny: MistralConfig, weights: Weights, tmp_path: Path) -> Path:
    return write_torch(tmp_path / "start", tiny, weights)


@pytest.fixture
def int8(start: Path, tmp_path: Path) -> Path:
    return convert(start, tmp_path / "int8", "lechat", *INT8)


@pytest.mark.parametrize("first", ["torch", "hf", "mistral", "lechat"])
def test_int8_is_the_same_from_any_format(
    first: Format, start: Path, weights: Weights, tiny: MistralConfig, tmp_path: Path
) -> None:
    made = convert(convert(start, tmp_path / "one", first), tmp_path / "x", "lechat", *INT8)
    config, found = load_weights(made)
    assert config == tiny
    assert json.loads((made / "config.json").read_text())["quantization"] == {"format": "int8"}
    assert set(found) == set(weight_shapes(tiny, Form("int8")))
    for name, array in weights.items():
        if name.endswith("kernel"):
            expected = quantized(name, array)
            np.testing.assert_array_equal(found[name], expected.kernel, strict=True)
            np.testing.assert_array_equal(found[f"{name}.scale"], expected.scale, strict=True)
        else:
            np.testing.assert_array_equal(found[name], array, strict=True)


def test_a_conversion_to_int8_is_what_loading_as_int8_makes(start: Path, tmp_path: Path) -> None:
    floats = convert(start, tmp_path / "floats", "lechat")
    made = convert(floats, tmp_path / "int8", "lechat", *INT8, "--dtype", "float32")
    stored = TensorFiles.open(made)
    _, loaded = load_weights(floats, dtype="float32", quantize="int8")
    assert set(stored) == set(loaded)
    for name, leaf in loaded.items():
        np.testing.assert_array_equal(stored.read(name), leaf, strict=True)
    files = [name.removesuffix(".scale") for name in stored if name.endswith("kernel.scale")]
    assert files == [name for name in stored if name.endswith("kernel")]


@pytest.mark.parametrize("to", FORMATS)
def test_int8_is_converted_as_the_numbers_it_stands_for(
    to: Format, int8: Path, weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    back = convert(int8, tmp_path / "back", to)
    assert f"{int8} is int8: these are the numbers it stands for" in capsys.readouterr().out
    assert_equal(
        back,
        {
            name: dequantize(*quantized(name, array), BF16) if name.endswith("kernel") else array
            for name, array in weights.items()
        },
    )


def test_what_comes_after_int8_is_to_measure_it(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = convert(start, tmp_path / "a", "lechat", *INT8)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{made}: 30 tensors, 0.00 GB of int8 in ")
    assert said[-2:] == [
        f"measure:   python -m parity.convert {start} {made}-whole --to lechat",
        f"and then:  python -m parity.quality {made}-whole --against {made}",
    ]
    lechat = convert(start, tmp_path / "b", "lechat")
    made = convert(lechat, tmp_path / "c", "lechat", *INT8)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"measure:   python -m parity.quality {lechat} --against {made}"


def test_int8_is_lechats_own_and_made_once(start: Path, int8: Path, tmp_path: Path) -> None:
    for src, to, flags, message in (
        (start, "hf", INT8, "--quantize int8 is for lechat's own format"),
        (start, "lechat", (*INT8, "--allow-nonfinite"), "int8 has no infinite numbers"),
        (int8, "lechat", INT8, "is int8 already; copy the folder"),
    ):
        with pytest.raises(BadInput, match=message):
            convert(src, tmp_path / "out", cast(Format, to), *flags)
    assert sorted(os.listdir(tmp_path)) == ["int8", "start"]


def test_int8_of_what_is_no_number_is_refused(start: Path, tmp_path: Path) -> None:
    spoil(start, "blocks.1.mlp.down.weight", lambda x: x.index_fill(1, torch.tensor(3), torch.inf))
    where = r"^blocks\.1\.mlp\.down\.weight in .*model\.pt is not finite, so it has no int8 form"
    with pytest.raises(BadInput, match=where):
        convert(start, tmp_path / "int8", "lechat", *INT8)
    assert sorted(os.listdir(tmp_path)) == ["start"]


def test_int8_that_lacks_a_scale_is_refused(int8: Path, tmp_path: Path) -> None:
    path = int8 / "model.safetensors"
    arrays = load_file(path)
    del arrays["head.kernel.scale"]
    save_file(arrays, path)
    with pytest.raises(BadInput, match=r"head\.kernel in .* is not int8 with head\.kernel\.scale"):
        convert(int8, tmp_path / "out", "hf")
    assert sorted(os.listdir(tmp_path)) == ["int8", "start"]


def test_the_check_refuses_int8_and_says_what_measures_it(start: Path, int8: Path) -> None:
    for flags in (
        ["--checkpoint", str(int8)],
        ["--checkpoint", str(start), "--against", str(int8)],
    ):
        with pytest.raises(BadInput, match=r"int8 is int8, which differs .*parity\.quality$"):
            check([*flags])
