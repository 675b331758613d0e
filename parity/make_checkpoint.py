"""Makes a checkpoint of a released model's exact shapes with random weights, to measure with.

python -m parity.make_checkpoint DIR --preset mistral-7b-v0.1 takes 14.5 GB of disk.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Shaped
from rich.console import Console

from lechat_jax.cli import flags
from lechat_jax.config import MistralConfig, preset
from lechat_jax.config.layout import is_norm
from lechat_jax.errors import BadInput
from lechat_jax.formats.names import Format, shapes
from lechat_jax.formats.source import Source
from lechat_jax.formats.stores import Store, Stored
from lechat_jax.tokenizer.tokenizer import Tokenizer
from parity.convert.command import DTYPES, Convert, Dtype, check_destination, convert

POOL = 1 << 22  # numbers drawn; each weight is cut from them, starting somewhere else


@dataclasses.dataclass(frozen=True)
class MakeCheckpoint:
    """The flags of `python -m parity.make_checkpoint`.

    Attributes:
        dst: Folder to make.
        preset: Model whose shapes are taken.
        layers: Number of its layers; all by default.
        format: Format to write; see parity.convert.
        dtype: Type of the weights.
        shard_gb: Most GB of weights in a file; 0 is one file.
        seed: Of the weights.
        overwrite: Replace a checkpoint at DST.
    """

    dst: tyro.conf.Positional[Path]
    preset: str = "mistral-7b-v0.1"
    layers: int | None = None
    format: Format = "hf"
    dtype: Dtype = "bfloat16"
    shard_gb: float = 5.0
    seed: int = 0
    overwrite: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see `--help`."""
    options = flags.parse(MakeCheckpoint, "parity.make_checkpoint", __doc__ or "", argv)
    config = preset(options.preset)
    if options.layers is not None:
        if isinstance(config.sliding_window, tuple):
            raise BadInput(f"each layer of {options.preset} has a window of its own; no --layers")
        config = dataclasses.replace(config, n_layers=options.layers)
    asked = Convert(
        src="random weights",
        dst=options.dst,
        to=options.format,
        dtype=options.dtype,
        shard_gb=options.shard_gb,
        overwrite=options.overwrite,
    )
    check_destination(asked)
    dtype = DTYPES.get(options.dtype, DTYPES["bfloat16"])
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    meter = convert(random_source(config, dtype, options.seed), asked, console)
    print(f"{options.dst}: {config.n_params:,} weights, {meter.done / 1e9:.2f} GB")
    return 0


def random_source(config: MistralConfig, dtype: np.dtype, seed: int) -> Source:
    """A model whose weights are made when they are read, at the speed of copying memory.

    Kernels have the deviation that keeps a signal's size, norms are about one. The numbers
    repeat after `POOL`, which no measurement of speed or memory can notice.
    """
    pool = np.random.default_rng(seed).standard_normal(POOL, np.float32)
    kernels = (pool * config.dim**-0.5).astype(dtype)
    norms = (1 + 0.1 * pool[: 2 * config.dim]).astype(dtype)
    stored = {}
    for i, (name, shape) in enumerate(shapes(config, "lechat").items()):
        numbers = norms if is_norm(name) else kernels

        def read(
            i: int = i,
            numbers: Shaped[np.ndarray, "..."] = numbers,
            shape: tuple[int, ...] = shape,
        ) -> Shaped[np.ndarray, "..."]:
            return np.resize(np.roll(numbers, -i), shape)

        stored[name] = Stored(dtype, shape, f"{name} of random weights", read)
    files = (Tokenizer.mistral_v1().path,) if config.vocab_size == 32000 else ()
    return Source("run", Path("random"), config, files, {}, stored, Store(stored))


if __name__ == "__main__":
    flags.run(main)
