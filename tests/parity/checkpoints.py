"""Checkpoints of random weights, and what a conversion makes of them."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from jaxtyping import Shaped

from lechat_jax.config import MistralConfig
from lechat_jax.formats.layouts import unstacked
from lechat_jax.formats.names import Format, names, shapes
from parity.convert.command import main
from parity.convert.open_source import open_source

Weights = dict[str, Shaped[np.ndarray, "..."]]
BF16 = np.dtype(ml_dtypes.bfloat16)


def convert(src: Path | str, dst: Path, to: Format, *flags: str) -> Path:
    assert main([str(src), str(dst), "--to", to, *flags]) == 0
    return dst


def random_weights(config: MistralConfig, dtype: np.dtype = BF16) -> Weights:
    rng = np.random.default_rng(0)
    return {
        name: (rng.standard_normal(shape) * 0.3).astype(dtype)
        for name, shape in shapes(config, "lechat").items()
    }


def write_torch(folder: Path, config: MistralConfig, weights: Weights) -> Path:
    """A folder as lechat_torch has it, made with nothing but PyTorch."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    state = {}
    parts = unstacked(config, weights)
    for ours, theirs in names(config, "torch").items():
        flat = parts[ours].reshape(shapes(config, "torch")[ours])
        state[theirs] = (
            torch.from_numpy(flat.view(np.int16)).view(torch.bfloat16)
            if flat.dtype == BF16
            else torch.from_numpy(flat)
        )
    if config.tied_embeddings:
        state["head.weight"] = state["embed.weight"]
    torch.save(state, folder / "model.pt")
    return folder


def assert_equal(folder: Path, weights: Weights) -> None:
    source = open_source(folder)
    assert set(source.names) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(source.read(name), array, strict=True)


def spoil(folder: Path, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes one tensor of a folder of lechat_torch."""
    state = torch.load(folder / "model.pt", weights_only=True)
    state[key] = change(state[key].clone())
    torch.save(state, folder / "model.pt")
