"""A trained model in whichever folder lechat keeps one: a training run's, or weights alone."""

import dataclasses
import hashlib
from pathlib import Path
from typing import NamedTuple

from jax.typing import DTypeLike

from lechat_jax.checkpoint import Checkpoints
from lechat_jax.config import MistralConfig
from lechat_jax.manifest import MANIFEST
from lechat_jax.model import Weights
from lechat_jax.run import Run
from lechat_jax.tokenizer import Tokenizer, preferred
from lechat_jax.weights import kind_of, load_weights, read_config, weight_shapes


class Loaded(NamedTuple):
    """The weights of a model, and which ones they are.

    Attributes:
        weights: on the default device.
        manifest: the SHA256SUMS that they were checked against.
        refused: a sentence for each newer checkpoint that is damaged.
    """

    weights: Weights
    manifest: Path
    refused: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the manifest, and so of every byte that was loaded."""
        return hashlib.sha256(self.manifest.read_bytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model's folder: what it is at once, and its weights, which take time, when asked for.

    Attributes:
        folder: the folder.
        config: of the model in it.
        run: the training run that it is, unless it holds weights in lechat's format.
    """

    folder: Path
    config: MistralConfig
    run: Run | None

    @classmethod
    def open(cls, folder: Path) -> "Trained":
        """The model of a training run, or of weights in lechat's format.

        Raises:
            BadInput: the folder is neither; for another format the message converts it.
        """
        if kind_of(folder) == "weights":
            return cls(folder, read_config(folder), None)
        run = Run.open(folder)
        return cls(folder, MistralConfig.from_dict(run.config["model"]), run)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer kept with the model, if there is one; of several as `preferred` says.

        Raises:
            BadInput: the file is none.
        """
        path = preferred(self.folder.iterdir())
        return Tokenizer.from_file(path) if path else None

    def load(self, dtype: DTypeLike | None = None) -> Loaded:
        """The weights, cast to `dtype` if one is given; a run's are of its last good checkpoint.

        Raises:
            BadInput: there is no good checkpoint, or as `load_weights` does.
        """
        if self.run is None:
            _, weights = load_weights(self.folder, dtype=dtype)
            return Loaded(weights, self.folder / MANIFEST)
        restored = Checkpoints(self.run.checkpoints).restore({"model": weight_shapes(self.config)})
        weights = restored.items["model"]
        if dtype is not None:
            for name in weights:  # one by one, so that there are not two models in memory
                weights[name] = weights[name].astype(dtype)
        manifest = self.run.checkpoints / str(restored.step) / MANIFEST
        return Loaded(weights, manifest, restored.refused)
