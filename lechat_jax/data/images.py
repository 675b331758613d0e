"""Images of fine-tuning examples, read when a batch needs them."""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Integer

from lechat_jax.config import VisionConfig
from lechat_jax.data.rows import Images, RowImages
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.images import FEWEST, Image, padded, read_image

KEPT = 4096  # images that stay in memory, for the next epochs


class DocumentImages:
    """Images of documents: for rows of one document each, patches in slots of one size.

    Attributes:
        slots: images of a row.
        length: patches of an image.

    Args:
        sources: of each document the files or data URLs of its images, in their order.
        vision: the tower that sees them.
        ids: of each document.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[str]],
        vision: VisionConfig,
        ids: Sequence[Integer[np.ndarray, "_ids"]],
    ) -> None:
        self._sources, self._vision = sources, vision
        sizes = [_tokens_of_images(document, vision) for document in ids]
        self.slots = max(map(len, sizes))
        longest = max((size for of_one in sizes for size in of_one), default=1)
        step = math.lcm(FEWEST, vision.n_merged)
        self.length = -(-longest * vision.n_merged // step) * step
        self._read = functools.lru_cache(KEPT)(lambda source: read_image(source, vision))

    def rows(self, documents: Sequence[int], tokens: Integer[np.ndarray, "rows T"]) -> RowImages:
        """The images of rows, each of which begins with a document.

        Raises:
            BadInput: an image is not there any more, or another one than was tokenised.
        """
        vision, n = self._vision, len(documents)
        p, M = vision.patch_size, self.length // vision.n_merged
        patches = np.zeros((n, self.slots, self.length, 3, p, p), np.float32)
        places = np.full((n, self.slots, self.length, 2), -1, np.int32)
        slots = np.zeros(tokens.shape, np.int32)
        for row, (document, ids) in enumerate(zip(documents, tokens, strict=True)):
            sizes = _tokens_of_images(ids, vision)
            images = [self._read(source) for source in self._sources[document][: len(sizes)]]
            is_cut = int(np.sum(ids == vision.image_end_token_id)) < len(sizes)
            self._check(images, sizes, document, is_cut)
            if images:
                patches[row, : len(images)], places[row, : len(images)] = padded(
                    images, self.length
                )
            at = np.flatnonzero(ids == vision.image_token_id)
            slots[row, at] = np.concatenate(
                [i * M + np.arange(k) for i, k in enumerate(sizes)] or [at]
            )
        return RowImages(Images(patches, places), slots)

    def described(self, tokens: jax.ShapeDtypeStruct) -> RowImages:
        """`jax.ShapeDtypeStruct`s of the images of a batch whose tokens are described."""
        B, p = tokens.shape[0], self._vision.patch_size
        shape = (B, self.slots, self.length)
        images = Images(
            jax.ShapeDtypeStruct((*shape, 3, p, p), np.float32),
            jax.ShapeDtypeStruct((*shape, 2), np.int32),
        )
        return RowImages(images, tokens)

    def _check(
        self, images: Sequence[Image], sizes: Sequence[int], document: int, is_cut: bool
    ) -> None:
        """Raises `BadInput` for images of other sizes; a row may end within the last."""
        found = [image.n_tokens for image in images]
        if is_cut:
            found[-1:] = [min(found[-1], sizes[-1])]
        if found != [*sizes]:
            raise BadInput(
                f"images of an example are not those that it was tokenised with, "
                f"{', '.join(s[:60] for s in self._sources[document])}; restore them, or start anew"
            )


def _tokens_of_images(ids: Integer[np.ndarray, "_ids"], vision: VisionConfig) -> list[int]:
    """Number of image tokens of each image in a text; of the last one it may be some.

    >>> from lechat_jax.config import preset
    >>> vision = preset("ministral-3-3b-2512").vision
    >>> _tokens_of_images(np.array([1, 10, 10, 12, 10, 10, 13, 5, 10, 13]), vision)
    [4, 1]
    """
    is_image, is_end = ids == vision.image_token_id, ids == vision.image_end_token_id
    image = np.cumsum(is_end) - is_end
    counts = np.bincount(image[is_image]) if is_image.any() else np.zeros(0, int)
    return counts[counts > 0].tolist()
