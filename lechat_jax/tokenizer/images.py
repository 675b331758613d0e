"""Image preprocessing: pixels to the patches and the token ids that a model reads.

mistral-common scales an image and lays the grid of its tokens, so both are Mistral's own. It
rounds where transformers' image processor cuts, and scales by OpenCV's bicubic filter without
antialiasing: another grid for some of the images that are too large, and other pixels in most.
"""

import base64
import binascii
import dataclasses
import functools
import hashlib
import importlib.util
import io
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
from jaxtyping import Float, Float32, Int32

from lechat_jax.config import VisionConfig
from lechat_jax.errors import BadInput

if TYPE_CHECKING:  # they take a while to load, which most prompts need not wait for
    from mistral_common.tokens.tokenizers.image import ImageEncoder
    from PIL.Image import Image as PillowImage

DATA_URL = "data:"
FEWEST = 64  # patches of the shortest row, of which others are multiples
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # for others Pillow may start Ghostscript


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """An image as a model reads it.

    Attributes:
        ids: token ids: `[IMG]` for each token, `[IMG_BREAK]` behind a row, `[IMG_END]` at the end.
        patches: normalised pixels of each patch, those of one token next to each other.
        places: row and column of each patch.
        digest: SHA-256 of the patches and the grid.
        source: what it was read from; `None` of pixels that were scaled already.
    """

    ids: tuple[int, ...]
    patches: Float32[np.ndarray, "P c p p"]
    places: Int32[np.ndarray, "P 2"]
    digest: bytes
    source: Union[str, bytes, "PillowImage", None] = None

    @property
    def address(self) -> str:
        """The address of what it was read from: a file's absolute path, or a data URL.

        Raises:
            BadInput: it was read from nothing that has one.
        """
        if isinstance(self.source, str):
            return self.source
        if self.source is None:
            raise BadInput("the image was given as pixels, which have no address; give its file")
        data = self.source
        if not isinstance(data, bytes):
            file = io.BytesIO()
            data.save(file, "PNG")
            data = file.getvalue()
        return f"{DATA_URL}image/png;base64,{base64.b64encode(data).decode()}"

    @property
    def n_tokens(self) -> int:
        """Number of `[IMG]` tokens, whose embeddings the vision tower makes."""
        return self.ids.count(self.ids[0])


# What an image is read from: a file, its bytes, a data URL, what Pillow has opened, or was read.
ImageSource = Union[Path, str, bytes, "PillowImage", Image]


def read_image(source: ImageSource, vision: VisionConfig) -> Image:
    """Reads an image for a vision tower; one that was read already is itself.

    Raises:
        BadInput: there is none, it is damaged, or its address is one of the web's, from which
            nothing is fetched.
    """
    from mistral_common.protocol.instruct.chunk import ImageChunk

    if isinstance(source, Image):
        return source
    image = image_of(encoder(vision)(ImageChunk(image=opened(source))).image, vision)
    if isinstance(source, str | Path) and not str(source).startswith(DATA_URL):
        source = str(Path(source).absolute())
    return dataclasses.replace(image, source=source)


@functools.lru_cache
def encoder(vision: VisionConfig) -> "ImageEncoder":
    """mistral-common's image encoder with the sizes and ids of a vision tower.

    Raises:
        BadInput: OpenCV is not installed, with which it scales images.
    """
    from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs

    if importlib.util.find_spec("cv2") is None:
        raise BadInput('images need OpenCV: pip install "lechat-jax[vision]"')
    return ImageEncoder(
        ImageConfig(vision.patch_size, vision.max_image_size, vision.spatial_merge_size),
        SpecialImageIDs(
            vision.image_token_id, vision.image_break_token_id, vision.image_end_token_id
        ),
    )


def image_of(pixels: Float[np.ndarray, "3 _height _width"], vision: VisionConfig) -> Image:
    """The ids and patches of an image that was scaled to whole tokens, and normalised."""
    p, g = vision.patch_size, vision.spatial_merge_size
    rows, columns = (size // (p * g) for size in pixels.shape[1:])
    patches = pixels.reshape(-1, rows, g, p, columns, g, p)
    patches = patches.transpose(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns * g * g, -1, p, p)
    patches = np.ascontiguousarray(patches, np.float32)
    places = np.indices((rows * g, columns * g), np.int32).reshape(2, rows, g, columns, g)
    places = np.ascontiguousarray(places.transpose(1, 3, 2, 4, 0).reshape(-1, 2))
    digest = hashlib.sha256(patches.tobytes() + places.tobytes()).digest()
    row = [vision.image_token_id] * columns
    ids = [*row, vision.image_break_token_id] * rows
    ids[-1] = vision.image_end_token_id
    return Image(tuple(ids), patches, places, digest)


def opened(source: Union[Path, str, bytes, "PillowImage"]) -> "PillowImage":
    """The image of a file, its bytes, or a data URL, decoded.

    Raises:
        BadInput: there is none, or it is damaged.
    """
    from PIL import Image as Pillow
    from PIL import ImageOps

    if isinstance(source, Pillow.Image):
        return source
    said = str(source) if isinstance(source, str | Path) else "the image"
    if said.startswith(DATA_URL):
        said = "the data URL"
    if said.startswith(("http://", "https://")):
        raise BadInput(f"{said} is not fetched; download the image and name its file")
    try:
        data = source if isinstance(source, bytes) else _bytes_of(str(source))
        with warnings.catch_warnings():
            warnings.simplefilter("error", Pillow.DecompressionBombWarning)
            image = Pillow.open(io.BytesIO(data), formats=FORMATS)
            image.load()
            image = ImageOps.exif_transpose(image)  # upright, as a phone's viewer shows it
    except FileNotFoundError:
        raise BadInput(f"{said} is not there") from None
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning) as error:
        raise BadInput(f"{said} has too many pixels: {error}") from None
    except (OSError, ValueError, SyntaxError, struct.error) as error:  # what Pillow makes of damage
        why = str(error).partition("<")[0].strip() or type(error).__name__
        raise BadInput(f"{said} is no image that can be read: {why}") from None
    return image


def _bytes_of(source: str) -> bytes:
    """The bytes of a data URL or a file."""
    if not source.startswith(DATA_URL):
        return Path(source).read_bytes()
    kind, _, data = source.partition(",")
    if not kind.endswith(";base64"):
        raise BadInput("an image's data URL must be base64: data:image/png;base64,…")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise BadInput(f"the data URL of an image is no base64: {error}") from None


def padded(
    images: Sequence[Image], length: int
) -> tuple[Float32[np.ndarray, "B P c p p"], Int32[np.ndarray, "B P 2"]]:
    """Patches and places of images, an image a row, each padded to one length."""
    n = len(images)
    patches = np.zeros((n, length, *images[0].patches.shape[1:]), np.float32)
    places = np.full((n, length, 2), -1, np.int32)
    for row, image in enumerate(images):
        patches[row, : len(image.patches)] = image.patches
        places[row, : len(image.places)] = image.places
    return patches, places
