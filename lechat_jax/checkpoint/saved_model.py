"""A trained model in whichever folder lechat keeps one: a training run's, or weights alone."""

import dataclasses
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lechat_jax.checkpoint.folder import kind_of, read_config, stored_format
from lechat_jax.checkpoint.run import CONFIG, Run
from lechat_jax.checkpoint.safetensors import TensorFiles
from lechat_jax.checkpoint.weights import load_weights, weight_shapes, weights_bytes
from lechat_jax.config import MistralConfig
from lechat_jax.devices.mesh import described, shardings
from lechat_jax.errors import BadInput
from lechat_jax.files.checksums import MANIFEST
from lechat_jax.model.adapters import Adapters
from lechat_jax.model.binding import Weights
from lechat_jax.quantize.scheme import Form, Format, asked, quantize_weights
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.tokenizer.vocabulary import ends


class Loaded(NamedTuple):
    """The weights of a model, and which ones they are.

    Attributes:
        weights: on the default device, or on those of a mesh.
        manifest: the SHA256SUMS that they were checked against.
        refused: a sentence for each newer checkpoint that is damaged.
    """

    weights: Weights
    manifest: Path
    refused: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the manifest, and so of every byte that was loaded."""
        return _sha256(self.manifest)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model's folder: what it is at once, and its weights, which take time, when asked for.

    Attributes:
        folder: the folder.
        config: of the model in it.
        run: the training run that it is, unless it holds weights in lechat's format.
        adapters: those that the run learned, if it did not learn whole weights.
        moved: where the weights are now beside which it learned them, if not where they were.
    """

    folder: Path
    config: MistralConfig
    run: Run | None
    adapters: Adapters | None = None
    moved: Path | None = None

    @classmethod
    def open(cls, folder: Path) -> "Trained":
        """The model of a training run, or of weights in lechat's format.

        Raises:
            BadInput: the folder is neither; for another format the message converts it.
        """
        if kind_of(folder) == "weights":
            return cls(folder, read_config(folder), None)
        run = Run.open(folder)
        fields = run.config
        adapters = Adapters.from_dict(fields["adapters"]) if fields.get("adapters") else None
        return cls(folder, MistralConfig.from_dict(fields["model"]), run, adapters)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer kept with the model, if there is one, and the tokens that were added.

        Raises:
            BadInput: the file is none, or of another model.
        """
        return Tokenizer.beside(self.folder, self.config.vocab_size)

    @property
    def eos_ids(self) -> set[int]:
        """The ids that end a text, where the folder says more of them than its tokenizer does.

        Raises:
            BadInput: what it says is no id.
        """
        return set(ends(self.folder))

    def not_trained_on(self, data: str | None, name: str, sha256: str) -> str:
        """That a text is not the one of the run, in a sentence; nothing, if it is or there is none.

        What would be held out of it may have been learned.

        Args:
            data: as the text was asked for; `None` for that of the run.
            name: of the text, for people.
            sha256: of the text.
        """
        asked = self.run.config["train"] if self.run else {}
        if asked.get("corpus_sha256", sha256) == sha256:
            return ""
        sentence = f"{name} is not the text that {self.folder} was trained on"
        if data is not None and data != asked.get("data"):
            return sentence
        return f"{sentence} any more: some of what is held out of it now was learned"

    @property
    def base(self) -> "Trained":
        """The model beside which this one learned its adapters, or itself.

        Raises:
            BadInput: it is not where it was.
        """
        if self.run is None or self.adapters is None:
            return self
        folder = self.moved or Path(self.run.config["train"]["init_from"])
        try:
            return Trained.open(folder)
        except BadInput as error:
            raise BadInput(
                f"{self.folder} holds adapters, for the weights in {folder}: {error}; if those "
                f'were moved, write where they are now as "init_from" into '
                f"{self.folder / CONFIG}, or say it with --init-from beside --resume"
            ) from None

    @property
    def quantization(self) -> Form | None:
        """How the weights are quantised, if they are: on the disk, or where adapters learned."""
        if self.run is None:
            return stored_format(self.folder)
        if self.adapters is None:
            return None
        quantize = self.run.config["train"].get("quantize")
        return self.base.quantization or asked(quantize, self.config)

    def form(self, quantize: Format | None) -> Form | None:
        """How the weights are quantised once they are loaded: as they are, or else as one says."""
        return self.quantization or asked(quantize, self.config)

    def weights_bytes(self, dtype: DTypeLike | None = None, quantize: Format | None = None) -> int:
        """Memory that it takes to `load` the weights, but for one tensor more on its way.

        A run's float32 is read whole before it is cast or quantised.
        """
        if self.adapters is not None:
            return self.base.weights_bytes(dtype, self.of_base(quantize))
        how = self.form(quantize)
        if self.run is None and how is None and dtype is None:
            return sum(info.nbytes for info in TensorFiles.open(self.folder).values())
        wanted = weights_bytes(self.config, dtype or np.float32, how)
        return max(wanted, weights_bytes(self.config, np.float32)) if self.run else wanted

    def load(
        self,
        dtype: DTypeLike | None = None,
        quantize: Format | None = None,
        mesh: Mesh | None = None,
    ) -> Loaded:
        """The weights, cast to `dtype` if one is given; a run's are of its last good checkpoint.

        What is quantised, on the disk or by `quantize`, is not cast, so mostly the norms are.

        With a mesh each device is given its part, as `sharding` says.

        Raises:
            BadInput: there is no good checkpoint, or as `load_weights` does.
        """
        if self.run is None:
            shapes = weight_shapes(self.config, self.form(quantize))
            places = shardings(mesh, shapes) if mesh else None
            _, weights = load_weights(self.folder, dtype=dtype, quantize=quantize, shardings=places)
            return Loaded(weights, self.folder / MANIFEST)
        if self.adapters is not None:
            base, learned = self.load_base(dtype, quantize), self.load_adapters()
            weights = base.weights | learned.weights | self.adapters.scales(self.config)
            return Loaded(weights, learned.manifest, base.refused + learned.refused)
        from lechat_jax.checkpoint.training_state import (
            Checkpoints,  # Orbax takes 0.2 s, and only runs need it
        )

        form = asked(quantize, self.config)
        template = {"model": described(mesh, weight_shapes(self.config))}
        restored = Checkpoints(self.run.checkpoints).restore(template)
        manifest = self.run.checkpoints / str(restored.step) / MANIFEST
        weights = restored.items["model"]
        if form is not None:
            try:
                weights = quantize_weights(weights, form)
            except BadInput as error:
                raise BadInput(f"{manifest.parent}: {error}") from None
        for name in weights:  # one by one, so that there are not two models in memory
            if dtype is not None and not (form and form.is_fixed(name)):
                weights[name] = weights[name].astype(dtype)
        return Loaded(weights, manifest, restored.refused)

    def load_base(
        self,
        dtype: DTypeLike | None = None,
        quantize: Format | None = None,
        mesh: Mesh | None = None,
    ) -> Loaded:
        """The weights beside which a run learned its adapters, quantised as they were then.

        Raises:
            BadInput: they are others than those, or as `load` does.
        """
        loaded = self.base.load(dtype, self.of_base(quantize), mesh)
        self.check_base(loaded.manifest)
        return loaded

    def of_base(self, quantize: Format | None) -> Format | None:
        """How the base is to be quantised: as one says, or else as it was for the adapters."""
        return quantize or (self.quantization.format if self.quantization else None)

    def check_base(self, manifest: Path) -> None:
        """Raises `BadInput` if the adapters were learned beside weights with another manifest."""
        if self.run is None or self.adapters is None:
            return
        wanted = self.run.config["train"]["init_from_sha256"]
        if _sha256(manifest) != wanted:
            raise BadInput(
                f"the adapters of {self.folder} were learned beside other weights than those that "
                f"are in {self.base.folder} now (the SHA-256 of {manifest} was {wanted}); "
                "restore them"
            )

    def load_adapters(self) -> Loaded:
        """The adapters alone of the last good checkpoint, in float32.

        Raises:
            BadInput: there is none.
        """
        adapters, run = self.adapters, self.run
        if adapters is None or run is None:
            raise BadInput(f"{self.folder} has no adapters; name a run that learned some")
        from lechat_jax.checkpoint.training_state import Checkpoints

        described = adapters.described(self.config)
        learning = {name: described[name] for name in adapters.shapes(self.config)}
        restored = Checkpoints(run.checkpoints).restore({"model": learning})
        manifest = run.checkpoints / str(restored.step) / MANIFEST
        return Loaded(restored.items["model"], manifest, restored.refused)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
