"""Images in prompts: what is generated depends on them, and on nothing of how they are read."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.devices.platform import compiling_for
from lechat_jax.errors import BadInput
from lechat_jax.generate import vision
from lechat_jax.generate.command import main
from lechat_jax.generate.generator import Generator, load
from lechat_jax.generate.sampling import Sampling
from lechat_jax.generate.session import Session
from lechat_jax.generate.vision import padded_length, starts
from lechat_jax.model.binding import weights_of
from lechat_jax.tokenizer.images import Image, read_image
from tests.support.images import SEES, TOWER, noise, two_images
from tests.support.models import TINY, random_model

GREEDY = Sampling(temperature=0)
MODEL = random_model(SEES)
A, B = two_images(TOWER)
IDS = [1, 3, *A.ids, 33, 34, 35, *B.ids, 44, 45]


def made(images: list[Image], chunk: int, ids: list[int] = IDS) -> list[int]:
    generator = Generator(MODEL, chunk=chunk)
    return generator.generate(ids, 10, GREEDY, eos_ids=(), images=images).ids


def test_a_text_after_images_is_the_same_in_chunks_of_any_length_as_in_one_pass() -> None:
    at = np.zeros((1, len(IDS), SEES.dim), np.float32)
    features = [np.asarray(MODEL.see(vision.as_images([x], len(x.patches)))[0]) for x in (A, B)]
    at[0, np.array(IDS) == TOWER.image_token_id] = np.concatenate(features)
    logits = MODEL.logits(MODEL.hidden(jnp.asarray([IDS]), features=jnp.asarray(at)))
    texts = [made([A, B], chunk) for chunk in (1, 5, 16, 64)]
    assert all(text == texts[0] for text in texts)
    assert texts[0][0] == int(jnp.argmax(logits[0, -1]))


def test_images_of_one_grid_in_another_order_give_another_text() -> None:
    one, other = (read_image(noise(40, 24, seed), TOWER) for seed in (1, 2))
    assert one.ids == other.ids
    ids = [1, *one.ids, 33, *other.ids, 45]
    assert made([one, other], 16, ids) != made([other, one], 16, ids)


def test_rows_of_a_batch_have_their_own_images() -> None:
    generator = Generator(MODEL, chunk=8)
    prompts = [[1, *A.ids, 45], [1, *B.ids, 45, 46], [1, 45]]
    together = generator.generate(prompts, 8, GREEDY, eos_ids=(), images=[[A], [B], []])
    for prompt, images, sample in zip(prompts, ([A], [B], []), together, strict=True):
        alone = generator.generate(prompt, 8, GREEDY, eos_ids=(), images=images)
        assert alone.ids == sample.ids


def test_no_size_of_an_image_compiles_the_tower_again() -> None:
    tower: Any = vision.image_features
    tower.clear_cache()
    generator = Generator(MODEL, chunk=16)
    for seed, size in enumerate([(8, 8), (40, 24), (17, 33), (48, 12)]):
        image = read_image(noise(*size, seed), TOWER)
        generator.generate([1, *image.ids, 45], 1, GREEDY, eos_ids=(), images=[image])
    assert tower._cache_size() == 1


def test_a_session_goes_on_after_an_image_without_reading_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    right = vision.image_features

    def counted(*arguments: object) -> object:
        seen.append(1)
        return right(*arguments)

    monkeypatch.setattr(vision, "image_features", counted)
    session = Session(Generator(MODEL, chunk=8))
    session.feed([1, *A.ids, 33], [A])
    first = [id_ for piece in session.stream(4, GREEDY, eos_ids=()) for id_ in piece.ids]
    session.feed([*B.ids, 45], [B])
    second = [id_ for piece in session.stream(4, GREEDY, eos_ids=()) for id_ in piece.ids]
    assert len(seen) == 2
    whole = [1, *A.ids, 33, *first, *B.ids, 45]
    assert second == made([A, B], 64, whole)[:4]
    session.reset(len(A.ids) + 2)
    assert [image.digest for image in session.images] == [A.digest]


@pytest.mark.parametrize(
    ("ids", "images"),
    [
        ([1, 45], [A]),
        (IDS, [A]),
        (IDS, [B, A]),
        ([1, *A.ids[:-1], 45], [A]),
        ([1, *A.ids, 10, 45], [A]),
    ],
)
def test_ids_that_are_not_those_of_the_images_are_refused(
    ids: list[int], images: list[Image]
) -> None:
    with pytest.raises(BadInput, match="put the ids of each into the prompt, in their order"):
        Generator(MODEL).generate(ids, 1, GREEDY, images=images)


def test_a_model_without_a_tower_is_given_no_images(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has no vision tower"):
        Generator(random_model(TINY)).generate([1], 1, images=[noise(9, 9)])
    assert starts([1, 10, 2], [], SEES) == []


def test_the_command_refuses_images_that_nobody_would_see(tmp_path: Path) -> None:
    weights = weights_of(MODEL)
    save_weights(tmp_path / "sees", SEES, weights, None)
    save_weights(tmp_path / "blind", TINY, weights_of(random_model(TINY)), None)
    noise(40, 24).save(tmp_path / "a.png")
    loaded = load(tmp_path / "sees")
    assert set(loaded.weights) == set(weights)
    image = ["--image", str(tmp_path / "a.png")]
    with pytest.raises(BadInput, match="blind has no vision tower"):
        main([str(tmp_path / "blind"), *image])
    with pytest.raises(BadInput, match="--image belongs to one --prompt"):
        main([str(tmp_path / "sees"), *image, "--prompt-ids", "1"])


def test_lengths_are_few_and_on_a_cpu_hardly_longer_than_images() -> None:
    sizes = range(1, 12_289)
    here = [padded_length(n, 4) for n in sizes]
    with compiling_for("tpu"):
        there = [padded_length(n, 4) for n in sizes]
    for n, ours, theirs in zip(sizes, here, there, strict=True):
        assert n <= ours <= max(theirs, 128)
        assert n <= theirs
    assert all(length - n < 64 for n, length in zip(sizes, here, strict=True))
    assert len(set(here)) == 192
    assert len(set(there)) == 16


def test_what_is_compiled_before_the_first_image_is_what_the_platform_can_wait_for() -> None:
    def patches() -> list[int]:
        return [len(image.patches) for image in vision.blank_images(TOWER)]

    assert patches() == [4]
    with compiling_for("tpu"):
        assert patches() == [4, 144]
