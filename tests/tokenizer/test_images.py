"""Images become the tokens and patches that mistral-common makes of them."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.chunk import ImageChunk
from PIL import Image as Pillow

from lechat_jax.config import VisionConfig, preset
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.images import encoder, read_image
from tests.support.images import PIXTRAL, TOWER, data_url, noise, png


def vision(name: str) -> VisionConfig:
    found = preset(name).vision
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["mistral-small-24b-2503", "pixtral-12b-2409"])
def test_the_grid_of_ten_thousand_random_sizes_is_mistral_commons(name: str) -> None:
    """By its own arithmetic, without the pixels; sides of up to three times the largest."""
    tower = vision(name)
    sides = np.random.default_rng(0).integers(1, 3 * tower.max_image_size, size=(10_000, 2))
    for width, height in sides.tolist():
        ratio = max(1.0, width / tower.max_image_size, height / tower.max_image_size)
        cell = tower.patch_size * tower.spatial_merge_size
        wanted = tuple(-(-max(1, round(side / ratio)) // cell) for side in (width, height))
        blank = Pillow.new("1", (width, height))
        assert encoder(tower)._image_to_num_tokens(blank) == wanted


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from([TOWER, PIXTRAL]))
def test_patches_are_those_of_mistral_commons_pixels_at_their_places(
    width: int, height: int, tower: VisionConfig
) -> None:
    picture = noise(width, height)
    image, theirs = read_image(picture, tower), encoder(tower)(ImageChunk(image=picture))
    assert [*image.ids] == theirs.tokens
    assert image.n_tokens * tower.n_merged == len(image.patches) == len(image.places)
    p = tower.patch_size
    for patch, (row, column) in zip(image.patches, image.places, strict=True):
        where = slice(row * p, (row + 1) * p), slice(column * p, (column + 1) * p)
        np.testing.assert_array_equal(patch, theirs.image[:, *where])
    g = tower.spatial_merge_size
    squares = image.places.reshape(image.n_tokens, g * g, 2)
    assert (squares // g == squares[:, :1] // g).all(), "patches of a token lie side by side"
    assert (np.diff(squares[:, 0, 0]) >= 0).all(), "tokens are row by row"


def test_ids_mark_the_end_of_each_row_and_of_the_image() -> None:
    cell = TOWER.patch_size * TOWER.spatial_merge_size
    image = read_image(noise(3 * cell, 2 * cell), TOWER)
    assert image.ids == (10, 10, 10, 12, 10, 10, 10, 13)


def test_a_file_its_bytes_a_data_url_and_an_open_image_are_the_same(tmp_path: Path) -> None:
    picture = noise(30, 20)
    data = png(picture)
    path = tmp_path / "noise.png"
    path.write_bytes(data)
    sources = (path, str(path), data, data_url(data), picture)
    images = [read_image(source, TOWER) for source in sources]
    assert len({image.digest for image in images}) == 1
    other = read_image(noise(30, 20, seed=1), TOWER)
    assert other.ids == images[0].ids
    assert other.digest != images[0].digest


def test_a_photograph_that_a_phone_took_sideways_is_upright() -> None:
    picture = noise(30, 20)
    exif = Pillow.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    upright = read_image(picture.transpose(Pillow.Transpose.ROTATE_270), TOWER)
    assert read_image(file.getvalue(), TOWER).digest == upright.digest


def test_what_is_transparent_is_white() -> None:
    clear, white = Pillow.new("RGBA", (9, 9)), Pillow.new("RGB", (9, 9), "white")
    assert read_image(clear, TOWER).digest == read_image(white, TOWER).digest


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("https://example.org/cat.png", "is not fetched; download the image"),
        ("missing.png", "missing.png is not there"),
        (b"no image", "the image is no image that can be read"),
        (png(noise(40, 40))[:200], "the image is no image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
        (data_url(b"no image"), "^the data URL is no image that can be read: cannot identify"),
        ("data:image/png,abc", "must be base64"),
        ("data:image/png;base64,%%%", "is no base64"),
    ],
)
def test_what_is_no_image_is_one_sentence(source: str | bytes, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        read_image(source, TOWER)


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    bomb = Pillow.new("1", (20_000, 20_000))
    with pytest.raises(BadInput, match="too many pixels"):
        read_image(png(bomb), TOWER)
