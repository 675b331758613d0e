"""A model in another format is loaded as it is, and is what its conversion would be."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lechat_jax as lechat
from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.checkpoint.weights import load_weights, save_weights
from lechat_jax.config import MistralConfig
from lechat_jax.devices.mesh import make_mesh
from lechat_jax.errors import BadInput
from lechat_jax.eval.command import main as evaluate
from lechat_jax.generate.command import main as generate
from lechat_jax.model.binding import Weights, weights_of
from lechat_jax.quantize.scheme import Format
from lechat_jax.train.command import main as train
from parity.convert.command import main as convert
from tests.support import tokenizers
from tests.support.models import TINY, TINY_MIXTURE, random_model

SHORT = "--batch 2 --block 16 --max-tokens 4 --lora-rank 2".split()
FORMATS = ("hf", "mistral", "gguf")
TAUGHT = dataclasses.replace(TINY, n_layers=2, vocab_size=300)


def saved(folder: Path, config: MistralConfig, fmt: str, tokenizer: Path, seed: int = 0) -> Path:
    """Random weights in a format, and in lechat's beside them."""
    weights = weights_of(random_model(config, seed=seed))
    save_weights(folder / "lechat", config, weights, tokenizer)
    dst = folder / ("model.gguf" if fmt == "gguf" else fmt)
    assert convert([str(folder / "lechat"), str(dst), "--to", fmt]) == 0
    return dst


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizers.taught(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=FORMATS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, taught: Path
) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return saved(folder, TAUGHT, request.param, taught)


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_weights_are_those_of_lechats_own_folder(model: Path) -> None:
    before = sorted(model.parent.rglob("*"))
    config, weights = load_weights(model)
    assert config == TAUGHT
    assert_same(weights, load_weights(model.parent / "lechat")[1])
    assert sorted(model.parent.rglob("*")) == before


@pytest.mark.parametrize("fmt", FORMATS)
def test_experts_are_put_together(fmt: str, taught: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY_MIXTURE, vocab_size=300)
    path = saved(tmp_path, config, fmt, taught)
    assert_same(load_weights(path)[1], load_weights(tmp_path / "lechat")[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_kernels_are_quantised_on_the_way(model: Path, quantize: Format, dtype: str) -> None:
    found, expected = (
        SavedModel.open(path).load(dtype, quantize).weights
        for path in (model, model.parent / "lechat")
    )
    assert_same(found, expected)


def test_each_device_has_its_slices(model: Path) -> None:
    found = SavedModel.open(model).load(mesh=make_mesh("fsdp=2,tp=2")).weights
    assert_same(found, load_weights(model.parent / "lechat")[1])
    kernel = found["blocks.0.attn.q.kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_text_ends_and_scores_are_those_of_lechats_own_folder(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, other = (SavedModel.open(path) for path in (model.parent / "lechat", model))
    assert other.eos_ids | {2} == own.eos_ids | {2}
    said: list[Any] = []
    for path in (model.parent / "lechat", model):
        assert generate([str(path), "--prompt", "The square", "--max-tokens", "20"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    (model.parent / "text.txt").write_text(
        " ".join(f"The square of {i} is {i * i}." for i in range(20))
    )
    for path in (model.parent / "lechat", model):
        assert evaluate([str(path), "--data", str(model.parent / "text.txt")]) == 0
        said.append(capsys.readouterr().out.splitlines()[1:])  # the first says how fast
    assert said[2] == said[3]


@pytest.mark.parametrize(
    "model",
    ["mistral", *(pytest.param(fmt, marks=pytest.mark.slow) for fmt in ("hf", "gguf"))],
    indirect=True,
)
def test_adapters_are_learned_beside_it_and_know_it_again(
    model: Path, taught: Path, tmp_path: Path
) -> None:
    """A base of another format is known by the SHA-256 of its weights."""
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("".join(f"The square of {i} is {i * i}.\n" for i in range(200)))
    flags = ["--init-from", str(model), "--data", str(text), "--out", str(run), *SHORT]
    assert train([*flags, "--steps", "2"]) == 0
    assert train(["--resume", str(run), "--steps", "3"]) == 0
    merged = tmp_path / "merged"
    assert convert([str(run), str(merged), "--to", "lechat"]) == 0
    found = lechat.load(run).generate("The square", max_tokens=8, sampling=lechat.Sampling(0.0))
    assert (
        found.ids
        == lechat.load(merged)
        .generate("The square", max_tokens=8, sampling=lechat.Sampling(0.0))
        .ids
    )
    other = saved(tmp_path / "other", TAUGHT, model.suffix[1:] or model.name, taught, seed=1)
    away = model.rename(model.with_name("away"))
    try:
        os.symlink(other, model)
        with pytest.raises(BadInput, match="learned beside other weights than those"):
            lechat.load(run)
    finally:
        model.unlink()
        away.rename(model)


def test_pytorch_is_not_imported(model: Path) -> None:
    code = (
        "import sys, lechat_jax as lechat\n"
        f"lechat.load({str(model)!r}).generate('a', max_tokens=1)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'parity')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    config = dataclasses.replace(TAUGHT, n_layers=1)
    save_weights(tmp_path / "start", config, weights_of(random_model(config)), None)
    pickled = tmp_path / "pickled"
    assert convert([str(tmp_path / "start"), str(pickled), "--to", "torch"]) == 0
    with pytest.raises(
        BadInput, match=rf"convert it with: .*parity.convert {pickled} {pickled}-le"
    ):
        lechat.load(pickled)
