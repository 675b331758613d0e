"""A run that learns adapters: what it holds, how it goes on, and what becomes of it."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.generate.generator import Generator
from lechat_jax.model.binding import bind, weights_of
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.train.command import main
from tests.support.models import random_model

# peft asks transformers for what that calls by another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

Convert = Callable[[list[str]], int]
TOKENS = np.random.default_rng(3).integers(32000, size=(2, 11), dtype=np.int32)
LONG = "--steps 8 --checkpoint-every 4 --eval-every 8 --sample-every 8 --batch 2 --block 16".split()
LONG += "--max-tokens 4 --learning-rate 500".split()


@pytest.fixture(scope="module")
def config(tiny: MistralConfig) -> MistralConfig:
    return dataclasses.replace(tiny, n_layers=1, vocab_size=32000)


@pytest.fixture(scope="module")
def base(config: MistralConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune") / "base"
    save_weights(folder, config, weights_of(random_model(config)), Tokenizer.mistral_v1().path)
    lines = (f"The square of {i} is {i * i}, and twice {i} is {2 * i}.\n" for i in range(200))
    (folder.parent / "text.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def learn(base: Path, name: str, *flags: str) -> Path:
    run = base.with_name(name)
    asked = ["--init-from", str(base), "--data", str(base.parent / "text.txt"), "--out", str(run)]
    assert main([*asked, *LONG, *flags]) == 0
    return run


@pytest.fixture(scope="module")
def run(base: Path) -> Path:
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    folder = learn(base, "run", "--lora-rank", "3", "--lora-targets", "q", "o", "up", "down")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    return folder


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def logits_of(run: Path) -> np.ndarray:
    trained = SavedModel.open(run)
    return np.asarray(bind(trained.config, trained.load().weights)(jnp.asarray(TOKENS)))


def of_transformers(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_it_learns_and_holds_the_adapters_alone(run: Path) -> None:
    assert losses(run)[-1] < losses(run)[0] - 0.5
    names = set(SavedModel.open(run).load_adapters().weights)
    maps = ("attn.q", "attn.o", "mlp.up", "mlp.down")
    assert names == {f"blocks.0.{word}.lora.{half}" for word in maps for half in "ab"}
    n_bytes = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert n_bytes < 1_000_000  # the base has 10 MB


def test_it_goes_on_bit_for_bit(run: Path, base: Path) -> None:
    again = base.with_name("again")
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "8")
    shutil.rmtree(again / "adapter")
    assert main(["--resume", str(again)]) == 0
    assert losses(again) == losses(run)
    name = "adapter/adapter_model.safetensors"
    assert (again / name).read_bytes() == (run / name).read_bytes()


def test_merged_and_exported_it_is_the_same_function(
    run: Path, base: Path, convert: Convert
) -> None:
    assert convert([str(run), str(base.with_name("merged")), "--to", "hf"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(base.with_name("merged"))
    expected = logits_of(run)
    close(of_transformers(merged), expected)
    assert np.abs(expected - logits_of(base)).max() > 0.05 * np.abs(expected).max()
    assert convert([str(base), str(base.with_name("hf")), "--to", "hf"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(base.with_name("hf"))
    close(of_transformers(PeftModel.from_pretrained(plain, run / "adapter")), expected)


@pytest.mark.parametrize("fmt", ["mistral", "lechat"])
def test_an_adapter_is_merged_into_any_format(
    run: Path, base: Path, fmt: str, convert: Convert
) -> None:
    """Of queries Mistral's own format has the rows in another order."""
    source, merged, back = (base.with_name(f"{fmt}-{word}") for word in ("base", "merged", "back"))
    assert convert([str(base), str(source), "--to", fmt]) == 0
    adapter = ["--adapter", str(run / "adapter")]
    assert convert([str(source), str(merged), "--to", fmt, *adapter]) == 0
    assert convert([str(merged), str(back), "--to", "lechat"]) == 0
    close(logits_of(back), logits_of(run))


@pytest.mark.slow
def test_beside_int8_it_is_what_it_is_merged_with_what_int8_stands_for(
    base: Path, convert: Convert
) -> None:
    run = learn(base, "int8", "--lora-rank", "2", "--quantize", "int8")
    weights = SavedModel.open(run).load().weights
    assert weights["blocks.0.attn.q.kernel"].dtype == jnp.int8
    merged = base.with_name("int8-merged")
    assert convert([str(run), str(merged), "--to", "lechat"]) == 0
    close(logits_of(merged), logits_of(run))


def test_an_adapter_goes_on_from_a_folder(run: Path, base: Path) -> None:
    """One step with a rate of nearly nothing leaves it as it was read."""
    flags = ["--lora-from", str(run / "adapter"), "--steps", "1", "--learning-rate", "1e-9"]
    close(logits_of(learn(base, "further", *flags)), logits_of(run))


def test_other_weights_in_the_place_of_the_base_are_refused(
    run: Path, base: Path, config: MistralConfig
) -> None:
    away = base.rename(base.with_name("away"))
    try:
        with pytest.raises(BadInput, match=r"run holds adapters, for the weights in .*base: .*not"):
            Generator.from_checkpoint(run)
        save_weights(base, config, weights_of(random_model(config, seed=1)), None)
        with pytest.raises(BadInput, match="learned beside other weights"):
            Generator.from_checkpoint(run)
    finally:
        shutil.rmtree(base, ignore_errors=True)
        away.rename(base)


def test_a_run_of_adapters_is_no_base(run: Path, base: Path) -> None:
    with pytest.raises(BadInput, match="merge them first"):
        main(["--init-from", str(run), "--out", str(base.with_name("none"))])
