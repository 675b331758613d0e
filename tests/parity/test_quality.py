"""What int8 costs is measured on held-out text, as an oracle in numpy measures it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Float

from lechat_jax.checkpoint.run import Run
from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.checkpoint.training_state import Checkpoints
from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.cli.display import Display
from lechat_jax.config import MistralConfig
from lechat_jax.data.held_out import HeldOut
from lechat_jax.data.tokens import load_tokens
from lechat_jax.errors import BadInput
from lechat_jax.eval.score import Validator
from lechat_jax.model.binding import bind, weights_of
from lechat_jax.quantize.scheme import dequantize, quantize_weights
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.train.step import StepOptions
from parity import quality as module
from parity.held_out import held_out
from parity.quality import main
from parity.random_models import random_model

Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: MistralConfig) -> Path:
    """A model without a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "model"
    save_weights(folder, tiny, weights_of(random_model(tiny)), None)
    return folder


@pytest.fixture(scope="module")
def int8(folder: Path, tiny: MistralConfig) -> Path:
    made = folder.with_name("int8")
    save_weights(made, tiny, quantize_weights(weights_of(random_model(tiny))), None)
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: MistralConfig) -> Path:
    """A training run on a text of its own."""
    home = tmp_path_factory.mktemp("runs")
    sentences = (f"The {n}th cat sat on mat number {n * n % 97}.\n" for n in range(1500))
    (home / "text.txt").write_text("".join(sentences))
    config = MistralConfig.from_dict(tiny.to_dict() | {"vocab_size": 32000, "n_layers": 1})
    run = Run.create(home / "run")
    data = str(home / "text.txt")
    digest = hashlib.sha256((home / "text.txt").read_bytes()).hexdigest()
    said = {"data": data, "corpus_sha256": digest}
    run.config = {"model": config.to_dict(), "train": said}
    Checkpoints(run.checkpoints).save(1, {"model": weights_of(random_model(config))}, {})
    Tokenizer.mistral_v1().save(run.folder)
    return run.folder


def figures(tmp_path: Path, *flags: object) -> dict[str, Any]:
    report = tmp_path / "report.json"
    assert main([*map(str, flags), "--json", str(report)]) == 0
    return json.loads(report.read_text())


def log_softmax(logits: Float[np.ndarray, "B T V"]) -> Float[np.ndarray, "B T V"]:
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("chunk", [256, 7])
def test_the_figures_are_those_of_all_logits_at_once(
    chunk: int,
    folder: Path,
    tiny: MistralConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    found = figures(tmp_path, folder, "--tokens", 64)
    with Display(None) as display:
        text = held_out(SavedModel.open(folder), None, 64, display)
    assert text.rows.tokens.shape == (1, 65)
    inputs, targets = text.rows.tokens[:, :-1], text.rows.tokens[:, 1:]
    model = random_model(tiny)
    in_int8 = quantize_weights(weights_of(model))
    back = {
        name: jnp.asarray(dequantize(np.asarray(leaf), np.asarray(in_int8[f"{name}.scale"])))
        if name.endswith("kernel")
        else leaf
        for name, leaf in in_int8.items()
        if not name.endswith("kernel.scale")
    }
    ids = jnp.asarray(inputs, jnp.int32)
    a, b = (
        log_softmax(np.asarray(nnx.jit(one)(ids))) for one in (random_model(tiny), bind(tiny, back))
    )
    losses = [-np.take_along_axis(x, targets[..., None], 2).mean() for x in (a, b)]
    kl = (np.exp(a) * (a - b)).sum(axis=-1)
    assert [row["loss"] for row in found["rows"]] == pytest.approx(losses, rel=1e-5)
    assert [row["perplexity"] for row in found["rows"]] == pytest.approx(np.exp(losses), rel=1e-4)
    assert found["loss_rise"] == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert found["kl_mean"] == pytest.approx(kl.mean(), rel=1e-2)
    assert found["kl_p99"] == pytest.approx(np.percentile(kl, 99), rel=1e-2)
    assert found["top1_agreement"] == (a.argmax(-1) == b.argmax(-1)).mean()
    assert found["tokens"] == 64
    assert [row["weights"] for row in found["rows"]] == ["float32", "int8"]
    assert 1e-5 < found["kl_mean"] < 1e-2, "int8 is near, but not the same"


def test_a_folder_in_int8_has_the_figures_of_quantising(
    folder: Path, int8: Path, tmp_path: Path
) -> None:
    one = figures(tmp_path, folder, "--tokens", 50, "--quantize", "int8")
    other = figures(tmp_path, folder, "--tokens", 50, "--against", int8)
    assert other["against"] == str(int8)
    assert other | {"against": None} == one


def test_a_model_does_not_differ_from_itself(folder: Path, tmp_path: Path) -> None:
    found = figures(tmp_path, folder, "--tokens", 50, "--against", folder)
    assert (found["loss_rise"], found["loss_rise_error"], found["top1_agreement"]) == (0, 0, 1)
    assert found["kl_mean"] == found["kl_p99"] == 0
    assert [row["weights"] for row in found["rows"]] == ["float32", "float32"]


def test_a_wrong_scale_is_seen(folder: Path, tiny: MistralConfig, tmp_path: Path) -> None:
    good = figures(tmp_path, folder, "--tokens", 50)
    weights = quantize_weights(weights_of(random_model(tiny)))
    name = "blocks.1.mlp.gate.kernel.scale"
    weights[name] = weights[name][::-1]
    save_weights(tmp_path / "wrong", tiny, weights, None)
    found = figures(tmp_path, folder, "--tokens", 50, "--against", tmp_path / "wrong")
    assert found["kl_mean"] > 10 * good["kl_mean"]


def test_a_run_reads_what_was_held_out_when_it_was_trained(run: Path, tmp_path: Path) -> None:
    found = figures(tmp_path, run, "--tokens", 100_000)
    trained, tokenizer = SavedModel.open(run), Tokenizer.mistral_v1()
    assert trained.run
    tokens = load_tokens(trained.run.config["train"]["data"], tokenizer)
    held = HeldOut.of_text(tokens, tokenizer)
    validator = Validator(trained.config, StepOptions(), held)
    score = validator.full(trained.load().weights, lambda done, of: None)
    reference = found["rows"][0]
    assert (found["text"], found["note"]) == (tokens.name, "")
    assert found["tokens"] == score.tokens > 1024
    assert reference["loss"] == pytest.approx(score.loss, rel=1e-5)
    assert found["bytes"] == pytest.approx(score.n_bytes, rel=1e-3)
    assert reference["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-3)
    assert reference["weight_bytes"] == 4 * trained.config.n_params


def test_another_text_is_read_when_asked_and_it_says_so(
    run: Path, tmp_path: Path, capsys: Output
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Dogs bark at the moon, and the moon is silent.\n" * 400)
    found = figures(tmp_path, run, "--tokens", 100, "--data", other)
    assert found["text"] == str(other)
    assert f"{other} is not the text that {run} was trained on" in capsys.readouterr().out


def test_examples_are_no_text(run: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(BadInput, match=r"holds examples and no text; name a text with --data"):
        main([str(run), "--data", str(chats)])


def test_without_a_tokenizer_it_says_that_the_ids_are_random(
    folder: Path, tmp_path: Path, capsys: Output
) -> None:
    found = figures(tmp_path, folder, "--tokens", 50)
    said = capsys.readouterr().out
    assert f"{folder} has no tokenizer: the ids are random, no text that anyone wrote" in said
    assert found["bytes"] is None
    assert [row["bits_per_byte"] for row in found["rows"]] == [None, None]


def test_the_table_has_a_line_for_each_model(folder: Path, capsys: Output) -> None:
    assert main([str(folder), "--tokens", "50", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if " GB " in line] == ["bfloat16", "int8"]
    for part in ("loss rises by ", "KL(bfloat16 || int8): ", "the likeliest token is the same at "):
        assert part in said


def test_what_cannot_be_compared_is_one_sentence(
    folder: Path, int8: Path, run: Path, tmp_path: Path
) -> None:
    for flags, message in (
        ([int8], "int8 is int8 itself; name the folder that it was made from, and this one with"),
        ([folder, "--against", run], "model and .*run are not the same model"),
        ([folder, "--against", int8, "--quantize", "int8"], "two ways to say the same"),
        ([folder, "--tokens", 0], "--tokens must be at least 1, not 0"),
        (
            [folder, "--data", run.with_name("text.txt")],
            "has no tokenizer of Mistral's, so --data cannot be read",
        ),
        ([folder, "--json", tmp_path / "no" / "x.json"], "there is no folder .*no to write x"),
        ([tmp_path / "nowhere"], "nowhere is not there"),
    ):
        with pytest.raises(BadInput, match=message):
            main([*map(str, flags)])
