"""Training on images: what learns, what stays, and that the loss is that of the images shown."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.cli.display import Display
from lechat_jax.config import MistralConfig, VisionConfig
from lechat_jax.data.dataset import open_dataset
from lechat_jax.devices.mesh import make_mesh
from lechat_jax.errors import BadInput
from lechat_jax.eval.command import EvalConfig, measure
from lechat_jax.eval.command import main as evaluate
from lechat_jax.generate.generator import Generator
from lechat_jax.model.binding import Weights, bind, weights_of
from lechat_jax.tokenizer.chat_template import Conversation
from lechat_jax.train.command import run
from lechat_jax.train.options import TrainConfig
from lechat_jax.train.step import StepOptions, gradient
from tests.support.images import SEES, TOWER, noise
from tests.support.models import random_model
from tests.support.tokenizers import shipped, tokenizer

V7 = tokenizer("v7m1")
CONFIG: MistralConfig = dataclasses.replace(SEES, n_layers=2, vocab_size=V7.vocab_size)
SIZES = [(16, 8), (40, 24), (24, 48), (8, 8)]


def example(images: list[str], answer: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": i}} for i in images]
    content = [*parts, {"type": "text", "text": "What is it?"}]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
    }


def written(folder: Path) -> Path:
    """Thirty examples of no, one or two images, whose files lie beside them."""
    for number, size in enumerate(SIZES):
        noise(*size, number).save(folder / f"{number}.png")
    lines = []
    for i in range(30):
        names = [f"{k % 4}.png" for k in range(i, i + i % 3)]
        lines.append(json.dumps(example(names, f"number {i}")))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return written(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sees") / "model"
    save_weights(folder, CONFIG, weights_of(random_model(CONFIG)), shipped("v7m1"))
    return folder


def opened(data: Path, vision: VisionConfig | None = TOWER, batch: int = 3) -> Any:
    return open_dataset(str(data), V7, 95, batch, 0, "auto", lambda done, of: None, vision=vision)


def test_ids_are_those_of_the_chat_template_and_answers_alone_count(data: Path) -> None:
    dataset = opened(data)
    rows = jax.tree.map(lambda leaf: leaf[0], dataset.rows(0, 1))
    documents = {}
    for line in data.read_text().splitlines():
        question, answer = json.loads(line)["messages"]
        names = [part["image_url"]["url"] for part in question["content"][:-1]]
        chat = Conversation(V7, vision=TOWER)
        asked = chat.ask("What is it?", chat.read_images([data.parent / name for name in names]))
        documents[tuple(asked), answer["content"]] = names
    for tokens, counted in zip(rows.tokens, rows.counted, strict=True):
        first = int(np.flatnonzero(counted)[0])
        said = V7.decode(tokens[counted].tolist())
        assert (tuple(tokens[:first].tolist()), said) in documents


def test_a_row_is_shown_its_own_images(data: Path) -> None:
    """Features that the step gathers are those of each image alone, at its own tokens."""
    weights = weights_of(random_model(CONFIG))
    made = bind(CONFIG, weights)
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), opened(data).rows(0, 1))
    found = np.asarray(made.see_rows(rows.images))
    for row, tokens in enumerate(rows.tokens):
        at = np.flatnonzero(tokens == TOWER.image_token_id)
        patches, places = (leaf[row] for leaf in rows.images.images)
        n_tokens = (places[..., 0] >= 0).sum(axis=1) // TOWER.n_merged
        alone = made.see(type(rows.images.images)(patches, places))
        expected = [features[:n] for features, n in zip(alone, n_tokens, strict=True)]
        np.testing.assert_allclose(found[row, at], np.concatenate(expected), atol=1e-5)


def gradients(data: Path, batch: int = 3, **options: Any) -> tuple[float, Weights]:
    weights = weights_of(random_model(CONFIG))
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), opened(data, batch=batch).rows(0, 1))
    loss, grads = jax.jit(gradient, static_argnums=(0, 1))(
        CONFIG, StepOptions(**options), weights, {}, rows
    )
    return float(loss), grads


def test_parts_of_a_batch_add_up_and_a_frozen_tower_has_no_gradient(data: Path) -> None:
    loss, grads = gradients(data)
    again, parts = gradients(data, accumulate=3)
    assert again == pytest.approx(loss, rel=1e-5)
    for name, leaf in grads.items():
        np.testing.assert_allclose(parts[name], leaf, atol=2e-5 * (1 + np.abs(leaf).max()))
    _, frozen = gradients(data, frozen_tower=True)
    for name, leaf in grads.items():
        is_still = name.startswith("vision.")
        assert np.abs(leaf).max() > 0, name
        assert (np.abs(frozen[name]).max() == 0) == is_still, name


@pytest.mark.parametrize("mesh", ["fsdp=2", "fsdp=4,tp=2"])
def test_devices_that_share_the_rows_share_their_images(mesh: str, data: Path) -> None:
    loss, grads = gradients(data, batch=4)
    shared, parts = gradients(data, batch=4, mesh=make_mesh(mesh))
    assert shared == pytest.approx(loss, rel=1e-5)
    for name, leaf in grads.items():
        np.testing.assert_allclose(parts[name], leaf, atol=2e-5 * (1 + np.abs(leaf).max()))


def trained(model: Path, data: Path, out: Path, **options: Any) -> tuple[Weights, Weights]:
    """The weights before and after a short run."""
    run(
        TrainConfig(init_from=model, data=str(data), out=out, steps=4, block=95, batch=3, **options)
    )
    return SavedModel.open(model).load().weights, SavedModel.open(out).load().weights


def moved(before: Weights, after: Weights) -> set[str]:
    """Which parts of a model are other than before."""
    names = [name for name in before if not np.array_equal(before[name], after[name])]
    return {name.partition(".")[0] for name in names}


def test_the_projector_learns_and_the_tower_only_if_it_is_asked_to(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"embed", "blocks", "norm", "head"}
    assert moved(*trained(model, data, tmp_path / "frozen")) == {*text, "projector"}
    out = tmp_path / "trained"
    assert moved(*trained(model, data, out, vision_tower="trained")) == {
        *text,
        "projector",
        "vision",
    }
    generator = Generator.from_checkpoint(out)
    chat = generator.chat(max_tokens=4)
    chat.say("What is it?", [data.parent / "1.png"])
    assert len(chat.conversation.images) == 1


def test_eval_scores_examples_with_images_as_the_run_has_validated_them(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    trained(model, data, out)
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    validated = [row for row in rows if "val/loss" in row][-1]
    assert evaluate([str(out), "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert found["loss"] == pytest.approx(validated["val/loss"], rel=1e-5)
    assert (found["tokens"], found["bytes"]) == (validated["val/tokens"], validated["val/bytes"])
    with pytest.raises(BadInput, match="scored in one window") as refused:
        measure(EvalConfig(out, block=20), Display(None))
    longest = int(str(refused.value).rpartition(" ")[2])
    assert evaluate([str(out), "--block", str(longest), "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_text_alone_leaves_the_tower_and_its_projector_as_they_are(
    model: Path, data: Path, tmp_path: Path
) -> None:
    lines = [json.dumps(example([], f"number {i}")) for i in range(30)]
    data.write_text("\n".join(lines) + "\n")
    before, after = trained(model, data, tmp_path / "out", weight_decay=0.1)
    assert moved(before, after) == {"embed", "blocks", "norm", "head"}
    with pytest.raises(BadInput, match="has no images; leave it out"):
        trained(model, data, tmp_path / "no", vision_tower="trained")


def test_a_tower_that_cannot_learn_is_not_asked_to(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the model has no tower; leave it out"):
        run(TrainConfig(vision_tower="trained", data=None, out=tmp_path / "no", steps=1))
    with pytest.raises(BadInput, match="does not learn beside adapters"):
        TrainConfig(vision_tower="trained", init_from=tmp_path, lora_rank=2)


def test_images_that_are_held_out_alone_leave_no_room_in_the_rows_to_train_on(data: Path) -> None:
    lines = [json.dumps(example(["1.png"] * (i % 10 == 9), f"number {i}")) for i in range(30)]
    data.write_text("\n".join(lines) + "\n")
    dataset = opened(data)
    assert dataset.rows(0, 1).images is None
    assert dataset.held_out().images_of(np.arange(3)).images.patches.shape[:2] == (3, 1)


@pytest.mark.parametrize("dialect", ["conversations", "prompt"])
def test_files_are_beside_the_data_whatever_the_dialect(dialect: str, data: Path) -> None:
    expected = opened(data).rows(0, 1)
    lines = []
    for line in data.read_text().splitlines():
        asked, answered = json.loads(line)["messages"]
        if dialect == "prompt":
            lines.append({"prompt": [asked], "completion": [answered]})
        else:
            pairs = ("human", asked["content"]), ("gpt", answered["content"])
            lines.append({dialect: [{"from": who, "value": said} for who, said in pairs]})
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")
    jax.tree.map(np.testing.assert_array_equal, opened(data).rows(0, 1), expected)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (["missing.png"], "missing.png is not there"),
        (["data.jsonl"], "is no image that can be read"),
        (["https://example.org/a.png"], "is not fetched; download the image"),
    ],
)
def test_an_image_that_is_none_is_told_with_its_line(
    images: list[str], said: str, data: Path
) -> None:
    data.write_text("\n".join(json.dumps(example(x, "a")) for x in ([], images)) + "\n")
    with pytest.raises(BadInput, match="line 2") as refused:
        opened(data)
    assert said in str(refused.value)


def test_a_message_that_is_none_is_told_with_its_line(data: Path) -> None:
    bad = {"messages": [5, {"role": "user", "content": 5}]}
    data.write_text("\n".join(map(json.dumps, (example([], "a"), bad))) + "\n")
    with pytest.raises(BadInput, match="line 2"):
        opened(data)


def test_a_blind_model_is_given_no_images(data: Path) -> None:
    with pytest.raises(BadInput, match="has images, and the model has no vision tower"):
        opened(data, vision=None)


def test_an_image_that_was_changed_since_is_refused(data: Path) -> None:
    dataset = opened(data)
    for number in range(4):
        noise(48, 48).save(data.parent / f"{number}.png")
    with pytest.raises(BadInput, match="are not those that it was tokenised with"):
        dataset.rows(0, 4)


def test_examples_that_differ_in_their_images_alone_are_no_duplicates(data: Path) -> None:
    same = [example([f"{i % 2}.png"], "a") for i in range(20)]
    noise(*SIZES[0], seed=9).save(data.parent / "1.png")  # of the size of the other
    data.write_text("\n".join(map(json.dumps, same)) + "\n")
    assert opened(data).reader.windows >= 5
