"""Adapters learned from images: the projector learns beside them, and goes wherever they go."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load_file

from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.eval.command import main as evaluate
from lechat_jax.generate.generator import Generator
from lechat_jax.model.binding import Weights, weights_of
from lechat_jax.train.command import main
from tests.checkpoint.test_peft_vision import close, in_memory, logits, of_transformers
from tests.support.models import random_model
from tests.support.tokenizers import shipped
from tests.train.test_vision import CONFIG, example, moved, written

# peft asks transformers for what that calls by another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

Convert = Callable[[list[str]], int]
FLAGS = "--steps 4 --checkpoint-every 2 --batch 3 --block 95 --max-tokens 4".split()
RATE = ["--learning-rate", "500"]
LORA = ["--lora-rank", "3", "--lora-targets", "q", "o", "down"]
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in Hugging Face's format, with the images and examples beside it."""
    folder = tmp_path_factory.mktemp("sees")
    written(folder)
    texts = [json.dumps(example([], f"number {i}")) for i in range(30)]
    (folder / "text.jsonl").write_text("\n".join(texts) + "\n")
    save_weights(folder / "base", CONFIG, weights_of(random_model(CONFIG)), shipped("v7m1"))
    return folder / "base"


def learn(base: Path, name: str, *flags: str, data: str = "data.jsonl") -> Path:
    run = base.with_name(name)
    asked = ["--init-from", str(base), "--data", str(base.with_name(data)), "--out", str(run)]
    assert main([*asked, *FLAGS, *flags]) == 0
    return run


@pytest.fixture(scope="module")
def run(base: Path) -> Path:
    return learn(base, "run", *LORA, *RATE)


def loaded(folder: Path, **how: Any) -> Weights:
    return SavedModel.open(folder).load(**how).weights


def metrics(run: Path, key: str) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row[key] for row in rows if key in row]


def test_the_projector_learns_and_the_text_and_the_tower_stay(run: Path, base: Path) -> None:
    before, after = loaded(base), loaded(run)
    assert moved(before, after) == {"projector"}
    for name in (name for name in after if name.startswith("projector") or "lora.b" in name):
        assert name not in before or np.abs(after[name] - before[name]).max() > 0, name
        assert np.abs(after[name]).max() > 0, name
    kept = SavedModel.open(run).load_adapters().weights
    assert {name for name in kept if "lora" not in name} == {n for n in after if "projector" in n}


def test_it_goes_on_bit_for_bit(run: Path, base: Path) -> None:
    again = base.with_name("again")
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "4")
    shutil.rmtree(again / "adapter")
    assert main(["--resume", str(again)]) == 0
    assert metrics(again, "train/loss") == metrics(run, "train/loss")
    assert (again / ADAPTER).read_bytes() == (run / ADAPTER).read_bytes()


def test_it_is_evaluated_and_shown_images_with_what_it_learned(run: Path, base: Path) -> None:
    figures = base.with_name("figures.json")
    assert evaluate([str(run), "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())["loss"]
    assert found == pytest.approx(metrics(run, "val/loss")[-1], rel=1e-5)
    generator = Generator.from_checkpoint(run, dtype="bfloat16")
    for name, leaf in loaded(run).items():
        if name.startswith("projector"):
            np.testing.assert_array_equal(generator.weights[name], leaf.astype(jnp.bfloat16))
    assert generator.chat(max_tokens=4).say("What is it?", [base.with_name("1.png")])


def test_merged_and_exported_it_is_the_same_function(
    run: Path, base: Path, convert: Convert
) -> None:
    merged, hf = base.with_name("merged"), base.with_name("hf")
    expected = logits(CONFIG, loaded(run))
    assert convert([str(run), str(merged), "--to", "hf"]) == 0
    close(of_transformers(CONFIG, in_memory(merged, CONFIG)), expected)
    assert convert([str(base), str(hf), "--to", "hf"]) == 0
    adapted = PeftModel.from_pretrained(in_memory(hf, CONFIG), run / "adapter")
    close(of_transformers(CONFIG, adapted), expected)
    assert np.abs(expected - logits(CONFIG, loaded(base))).max() > 0.05 * np.abs(expected).max()


def test_text_alone_leaves_it_out_and_one_that_was_learned_stays(run: Path, base: Path) -> None:
    text = learn(base, "text", *LORA, data="text.jsonl")
    assert moved(loaded(base), loaded(text)) == set()
    assert not [key for key in load_file(text / ADAPTER) if "projector" in key]
    further = learn(base, "further", "--lora-from", str(run / "adapter"), data="text.jsonl")
    assert moved(loaded(run), loaded(further)) == {"blocks"}
    before, after = (load_file(folder / ADAPTER) for folder in (run, further))
    assert [key for key in after if "projector" in key]
    for key in (key for key in after if "projector" in key):
        np.testing.assert_array_equal(before[key], after[key])


@pytest.mark.slow
def test_it_begins_beside_adapters_that_know_none_and_beside_int8(run: Path, base: Path) -> None:
    text = learn(base, "blind", *LORA, data="text.jsonl")
    seen = learn(base, "seen", "--lora-from", str(text / "adapter"), "--quantize", "int8", *RATE)
    before, after = loaded(base), loaded(seen)
    assert after["blocks.0.attn.q.kernel"].dtype == jnp.int8
    for name in (name for name in before if name.startswith(("vision", "projector"))):
        assert np.array_equal(before[name], after[name]) == name.startswith("vision"), name


def test_a_dry_run_counts_it_among_what_learns(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--init-from", str(base), "--data", str(base.with_name("data.jsonl")), "--dry-run"]
    assert main([*asked, *FLAGS, *LORA]) == 0
    assert "the projector" in capsys.readouterr().out
