"""Images in chat templates: mistral-common places the ids of images that were read already."""

from collections.abc import Sequence

import numpy as np
from mistral_common.protocol.instruct.chunk import ImageChunk, ImageURLChunk
from mistral_common.tokens.tokenizers.image import ImageEncoder, ImageEncoding

from lechat_jax.config import VisionConfig
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.images import DATA_URL, Image, encoder, read_image


class TooManyImages(BadInput):
    """The images of a prompt have more tokens than the context holds."""


class NumberedImages(ImageEncoder):
    """Lets mistral-common's chat templates place images that were read already.

    A chunk's address is the number of an image that is known, or a data URL of another one, of
    which no more are read once they have `most_tokens`; or, if `reads_files`, the path of a file.
    The array beside the ids is its number.

    Attributes:
        sources: addresses of the images that were read, in their order.
    """

    def __init__(
        self,
        vision: VisionConfig,
        known: Sequence[Image] = (),
        most_tokens: int | None = None,
        reads_files: bool = False,
    ) -> None:
        self.sources: list[str] = []
        self._reads_files = reads_files
        mistral = encoder(vision)
        super().__init__(mistral.image_config, mistral.special_ids)
        self._vision, self._images, self._most = vision, [*known], most_tokens
        self._numbers = {str(number): number for number in range(len(known))}

    def __call__(self, content: ImageChunk | ImageURLChunk) -> ImageEncoding:
        """The ids of an image, and its number."""
        assert isinstance(content, ImageURLChunk)
        url = content.get_url()
        number = self._numbers.get(url)
        if number is None:
            if not url.startswith(DATA_URL) and not self._reads_files:
                raise BadInput(
                    f"an image must be sent as a data URL (data:image/png;base64,…), not as "
                    f"{url[:60]!r}, which is not fetched"
                )
            number = len(self._images)
            self._images.append(read_image(url, self._vision))
            self.sources.append(url)
            n_tokens = sum(len(image.ids) for image in self._images)
            if self._most is not None and n_tokens > self._most:
                raise TooManyImages(
                    f"the images have more than the {self._most} tokens that the context holds; "
                    "send fewer or smaller ones"
                )
        return ImageEncoding([*self._images[number].ids], np.array(number))

    def images_of(self, numbers: Sequence[np.ndarray]) -> list[Image]:
        """The images of a prompt, in its order."""
        return [self._images[int(number)] for number in numbers]
