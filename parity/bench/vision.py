"""Vision tower and projector, lechat beside transformers: how fast is an image seen?"""

import dataclasses
import re
import statistics
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32
from rich.console import Console

from lechat_jax.config import MistralConfig, preset
from lechat_jax.errors import BadInput
from lechat_jax.generate.vision import as_images, image_features, padded_length
from lechat_jax.tokenizer.images import image_of
from parity.bench.work import Work, cell
from parity.measure import interleaved, wait_until_idle
from parity.peers.installed import load_peer
from parity.random_models import random_weights
from parity.report import Report, Row, TableText

PEER = "parity.peers.transformers"  # imported only when it is measured
SEED = 0  # of weights and images

DtypeName = Literal["float32", "bfloat16"]
Pixels = Float32[np.ndarray, "3 _height _width"]
Features = Float[np.ndarray, "M D"]  # of the tokens of an image
See = Callable[[Pixels], Features]


@dataclasses.dataclass(frozen=True)
class Vision(Work):
    """Images a second through a vision tower and its projector, from pixels to features.

    lechat pads an image to one of a few lengths, as it does when it generates; transformers takes
    it as it is, with PyTorch's scaled_dot_product_attention. The same random weights and images of
    noise, one at a time, in turn: A B A B. The text model is left out.
    """

    preset: str = "mistral-small-24b-2503"
    """Model whose tower and projector are taken."""
    layers: int = 4
    """Layers of the tower, the first of all; of a whole one the preset has the number."""
    sizes: tuple[str, ...] = ("224x224", "448x672", "1008x756")
    """Widths and heights of images in pixels, of whole tokens; each is measured."""
    dtype: DtypeName = "float32"
    """Type of the weights and of the arithmetic."""
    repetitions: int = 5
    """Times that each is measured; the median counts."""
    transformers: bool = True
    """Measure transformers too."""

    COUNTS = ("layers", "repetitions")

    def run(self, console: Console) -> Report:
        """See `Work.run`; the report has the largest relative error of the features."""
        config = self.config()
        sizes = [self.pixels(size, config) for size in self.sizes]
        peer = load_peer(PEER, "--no-transformers") if self.transformers else None
        report = self.report()
        weights = {
            name: jnp.asarray(leaf, self.dtype)
            for name, leaf in random_weights(config, SEED).items()
        }
        see: dict[str, See] = {"lechat_jax": lechat(config, weights)}
        if peer:
            see["transformers"] = peer.image_features(config, weights)
        for size in sizes:
            console.print("x".join(map(str, size)), markup=False)
            report.rows += self.measure(config, see, *size)
        errors = [row.details["error"] for row in report.rows if "error" in row.details]
        if errors:
            report.details["largest_relative_error"] = max(errors)
        report.show(console, figures(report.rows))
        return report

    def config(self) -> MistralConfig:
        """The model with so many layers in its tower, and next to nothing behind it."""
        return tower_of(self.preset, self.layers)

    def pixels(self, size: str, config: MistralConfig) -> tuple[int, int]:
        """Width and height of that size.

        Raises:
            BadInput: it is none, or no whole number of tokens, or larger than the model admits.
        """
        assert config.vision is not None
        token = config.vision.patch_size * config.vision.spatial_merge_size
        most = config.vision.max_image_size
        if not (found := re.fullmatch(r"(\d+)x(\d+)", size)):
            raise BadInput(f"--sizes are width and height in pixels, such as 448x672, not {size}")
        width, height = map(int, found.groups())
        if any(side % token or not 0 < side <= most for side in (width, height)):
            raise BadInput(
                f"--sizes must be multiples of {token} pixels up to {most}, a token of "
                f"{self.preset}, not {size}"
            )
        return width, height

    def measure(
        self, config: MistralConfig, see: dict[str, See], width: int, height: int
    ) -> list[Row]:
        """Rows of one size of image: one for each implementation, measured in turn."""
        assert config.vision is not None
        n_patches = width * height // config.vision.patch_size**2
        pixels = np.random.default_rng(SEED).standard_normal((3, height, width), np.float32)
        features = {impl: one(pixels) for impl, one in see.items()}  # compiles, too
        times = interleaved(
            {impl: timed(one, pixels) for impl, one in see.items()}, self.repetitions
        )
        rows = []
        for impl, seconds in times.items():
            details = {
                "size": f"{width}x{height}",
                "layers": self.layers,
                "seconds": statistics.median(seconds),
                "images_per_s": 1 / statistics.median(seconds),
                "patches_per_s": n_patches / statistics.median(seconds),
            }
            if impl == "lechat_jax" and "transformers" in times:
                pairs = zip(times["transformers"], seconds, strict=True)
                details["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
                details["error"] = relative(features[impl], features["transformers"])
            tokens_per_s = len(features[impl]) / details["seconds"]
            shape = (self.dtype, 1, n_patches, tokens_per_s, None)
            rows.append(Row("vision", impl, *shape, details=details))
        return rows


def tower_of(name: str, layers: int | None = None) -> MistralConfig:
    """A preset's tower and projector, with so many layers, and next to nothing behind them.

    Raises:
        BadInput: it sees nothing.
    """
    found = preset(name)
    if found.vision is None:
        raise BadInput(f"{name} has no vision tower")
    vision = dataclasses.replace(found.vision, n_layers=layers or found.vision.n_layers)
    smallest = {"n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 8, "hidden_dim": 8}
    return dataclasses.replace(found, vision=vision, **smallest, vocab_size=32, sliding_window=None)


def lechat(config: MistralConfig, weights: dict[str, jax.Array]) -> See:
    """Lechat's tower as it is used in generation: patches are cut and padded, then seen."""
    assert config.vision is not None
    vision = config.vision

    def see(pixels: Pixels) -> Features:
        image = image_of(pixels, vision)
        length = padded_length(len(image.patches), vision.n_merged)
        features = image_features(config, weights, as_images([image], length))
        return np.asarray(features[0, : image.n_tokens], np.float32)

    return see


def timed(see: See, pixels: Pixels) -> Callable[[], float]:
    """A timed repetition, in seconds."""

    def seconds() -> float:
        wait_until_idle()
        began = time.perf_counter()
        see(pixels)
        return time.perf_counter() - began

    return seconds


def relative(ours: Features, theirs: Features) -> float:
    """Length of the difference over that of the peer's features."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def figures(rows: list[Row]) -> TableText:
    """The table of the report."""
    lines = [
        [
            row.impl,
            row.dtype,
            row.details["size"],
            f"{row.context:,}",
            f"{row.details['seconds']:.3f}",
            f"{row.details['images_per_s']:.2f}",
            f"{row.details['patches_per_s']:,.0f}",
            cell("{:.2f}", row.details.get("ratio")),
            cell("{:.1e}", row.details.get("error")),
        ]
        for row in rows
    ]
    header = ["seeing", "type", "pixels", "patches", "seconds", "images/s", "patches/s"]
    return TableText([*header, "ratio", "error"], lines)
