"""Images in a prompt: the vision tower is run when prefill first comes to one.

An image's patches are padded to one of a few lengths, so that no size of an image compiles
anything twice, and its features take the places of its tokens in the chunks of prefill.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lechat_jax.config import MistralConfig, VisionConfig
from lechat_jax.data.rows import Images
from lechat_jax.devices.platform import platform
from lechat_jax.errors import BadInput
from lechat_jax.model.binding import Weights, bind
from lechat_jax.tokenizer.images import FEWEST, Image, image_of, padded


@functools.partial(jax.jit, static_argnums=0)
def image_features(
    config: MistralConfig, weights: Weights, images: Images
) -> Float[Array, "B M D"]:
    """Vision tower and projector: the features of each token of some images."""
    return bind(config, weights).see(images)


@jax.jit
def _put(
    into: Float[Array, "1 T D"], features: Float[Array, "1 M D"], tokens: Int[Array, "T"]
) -> Float[Array, "1 T D"]:
    """Features of an image's tokens at their positions of a chunk; -1 is another's position."""
    return jnp.where((tokens >= 0)[None, :, None], features[:, tokens], into)


def padded_length(n: int, n_merged: int) -> int:
    """Length of the row that has room for so many patches; there are few, since each is compiled.

    On an accelerator 64, 96, 128, 192, 256 and so on. A CPU compiles in 2 s what then takes it ten
    or a hundred, so there are all multiples of 64.

    >>> [padded_length(n, 4) for n in (1, 65, 200, 1025, 12100)]
    [64, 128, 256, 1088, 12160]
    """
    if platform() == "cpu":
        length = -(-n // FEWEST) * FEWEST
    else:
        least = max(n, FEWEST)
        power = 1 << (least - 1).bit_length()
        length = power if least > power * 3 // 4 else power * 3 // 4
    return -(-length // n_merged) * n_merged


def blank_images(vision: VisionConfig) -> list[Image]:
    """Images to compile the tower with before anybody shows one: the smallest, and the largest.

    Most photos are scaled down to about the latter. On a CPU it would take longer to see than to
    compile, so there is the smallest alone.
    """
    token = vision.patch_size * vision.spatial_merge_size
    most = vision.max_image_size // token
    sides = (1,) if platform() == "cpu" else (1, most)
    return [image_of(np.zeros((3, n * token, n * token), np.float32), vision) for n in sides]


def as_images(images: Sequence[Image], length: int) -> Images:
    """Images on the default device, an image a row, each padded to so many patches."""
    patches, places = padded(images, length)
    return Images(jnp.asarray(patches), jnp.asarray(places))


def starts(
    prompt: Sequence[int], images: Sequence[Image], config: MistralConfig, is_cut: bool = False
) -> list[int]:
    """Position in a prompt at which each of its images begins; `is_cut` lets the last ones lack.

    Raises:
        BadInput: the model has no vision tower, or the prompt has not the ids of these images.
    """
    if not images:
        return []
    if config.vision is None:
        raise BadInput("the model has no vision tower, so it cannot be given images")
    found, at, ids = [], 0, [*prompt]
    marker = config.vision.image_token_id
    for image in images:
        at = ids.index(marker, at) if marker in ids[at:] else len(ids)
        if tuple(ids[at : at + len(image.ids)]) != image.ids:
            break
        found.append(at)
        at += len(image.ids)
    is_complete = len(found) == len(images) and marker not in ids[at:]
    if not is_complete and not is_cut:
        raise BadInput(
            f"the prompt has {ids.count(marker)} image tokens, which are not those of the "
            f"{len(images)} images; put the ids of each into the prompt, in their order"
        )
    return found


class PromptImages:
    """The images of one prompt, and their features once they were needed.

    Attributes:
        starts: position at which each begins.

    Raises:
        BadInput: the prompt has the tokens of other images, or the model sees none.
    """

    def __init__(
        self, config: MistralConfig, prompt: Sequence[int], images: Sequence[Image]
    ) -> None:
        self.starts = starts(prompt, images, config)
        self._config, self._images = config, images
        self._features: dict[int, Array] = {}

    def chunk(
        self, weights_for: Callable[[int], Weights], at: int, T: int
    ) -> Float[Array, "1 T D"] | None:
        """Features at T positions of the prompt from `at` on; `None` where no image is."""
        found = None
        for number, (start, image) in enumerate(zip(self.starts, self._images, strict=True)):
            first, last = max(start, at), min(start + len(image.ids), at + T)
            if first >= last:
                continue
            is_token = np.asarray(image.ids) == image.ids[0]
            places = np.where(is_token, np.cumsum(is_token) - 1, -1)
            tokens = np.full(T, -1, np.int32)
            tokens[first - at : last - at] = places[first - start : last - start]
            features = self._seen(number, weights_for)
            if found is None:
                found = jnp.zeros((1, T, features.shape[2]), features.dtype)
            found = _put(found, features, tokens)
            if last == start + len(image.ids):
                del self._features[number]  # it has been read
        return found

    def _seen(self, number: int, weights_for: Callable[[int], Weights]) -> Float[Array, "1 M D"]:
        """Features of an image, which the tower makes once."""
        if number not in self._features:
            assert self._config.vision is not None
            image = self._images[number]
            length = padded_length(len(image.patches), self._config.vision.n_merged)
            self._features[number] = image_features(
                self._config, weights_for(length), as_images([image], length)
            )
        return self._features[number]
