"""A saved model: a training run's folder, or weights of any format."""

import dataclasses
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lechat_jax.checkpoint.run import Run
from lechat_jax.checkpoint.stored_weights import StoredWeights
from lechat_jax.checkpoint.weights import load_weights, weight_shapes, weights_bytes
from lechat_jax.config import MistralConfig
from lechat_jax.devices.mesh import Placing, described, shardings
from lechat_jax.errors import BadInput
from lechat_jax.files.checksums import MANIFEST
from lechat_jax.formats.folder import CONFIG, kind_of
from lechat_jax.formats.hub import local_model
from lechat_jax.model.adapters import Adapters
from lechat_jax.model.binding import Weights
from lechat_jax.quantize.scheme import Form, Format, quantize_weights, scheme_for
from lechat_jax.tokenizer.tokenizer import Tokenizer, preferred
from lechat_jax.tokenizer.vocabulary import ends


class Loaded(NamedTuple):
    """Loaded weights of a model.

    Attributes:
        weights: the weights, on the default device or sharded over a mesh.
        step: of a run's checkpoint, its step.
        refused: a sentence for each newer checkpoint that is damaged.
    """

    weights: Weights
    step: int | None = None
    refused: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A saved model: config, tokenizer and format at once, weights on request.

    Attributes:
        folder: the folder, or the GGUF file.
        config: config of the model.
        run: the training run; `None` for weights of any format.
        stored: the weights; `None` for a run.
        adapters: LoRA adapters that the run trained; `None` if it trained all weights.
        moved: new folder of the adapters' base model, if it has moved.
    """

    folder: Path
    config: MistralConfig
    run: Run | None = None
    stored: StoredWeights | None = None
    adapters: Adapters | None = None
    moved: Path | None = None

    @classmethod
    def open(cls, path: Path | str) -> "SavedModel":
        """Opens a training run, or weights of any format, also by their name on the Hub.

        Args:
            path: a folder, also of Hugging Face's or Mistral's; a GGUF file; or `org/name`.

        Raises:
            BadInput: there is no model that can be read.
        """
        folder, _ = local_model(path)
        if kind_of(folder) != "run":
            stored = StoredWeights.open(folder)
            return cls(folder, stored.config, stored=stored)
        run = Run.open(folder)
        fields = run.config
        adapters = Adapters.from_dict(fields["adapters"]) if fields.get("adapters") else None
        return cls(folder, MistralConfig.from_dict(fields["model"]), run, adapters=adapters)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer's files, if there are any."""
        return self.stored.tokenizer_folder if self.stored else self.folder

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer, which is not read."""
        folder = self.tokenizer_folder
        return folder.is_dir() and preferred(folder.iterdir()) is not None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, with its added tokens; `None` if there is none.

        Raises:
            BadInput: the file is not a tokenizer, or another model's.
        """
        if not self.has_tokenizer:
            return None
        return Tokenizer.beside(self.tokenizer_folder, self.config.vocab_size)

    @property
    def eos_ids(self) -> set[int]:
        """EOS ids that the model's files name, beyond the tokenizer's own.

        Raises:
            BadInput: they are not ids.
        """
        return set(self.stored.eos_ids if self.stored else ends(self.folder))

    def sha256(self, step: int | None = None) -> str:
        """SHA-256 that identifies the weights, of a run those of the checkpoint after a step."""
        if self.stored:
            return self.stored.sha256()
        manifest = Run(self.folder).checkpoints / str(step) / MANIFEST
        return hashlib.sha256(manifest.read_bytes()).hexdigest()

    def not_trained_on(self, data: str | None, name: str, sha256: str) -> str:
        """A warning that a text is not the run's training data; empty if it is or if unknown.

        Its held-out part may have been trained on.

        Args:
            data: the user's `--data`; `None` for the run's own.
            name: name of the text, for display.
            sha256: digest of the text.
        """
        asked = self.run.config["train"] if self.run else {}
        if asked.get("corpus_sha256", sha256) == sha256:
            return ""
        sentence = f"{name} is not the text that {self.folder} was trained on"
        if data is not None and data != asked.get("data"):
            return sentence
        return f"{sentence} any more: some of what is held out of it now was learned"

    @property
    def base(self) -> "SavedModel":
        """The base model of the adapters; the model itself without adapters.

        Raises:
            BadInput: the base model is not in its folder any more.
        """
        if self.run is None or self.adapters is None:
            return self
        folder = self.moved or self.run.config["train"]["init_from"]
        try:
            return SavedModel.open(folder)
        except BadInput as error:
            raise BadInput(
                f"{self.folder} holds adapters, for the weights in {folder}: {error}; if those "
                f'were moved, write where they are now as "init_from" into '
                f"{self.folder / CONFIG}, or say it with --init-from beside --resume"
            ) from None

    @property
    def quantization(self) -> Form | None:
        """Quantization scheme on disk, or of the adapters' base in training; `None` for floats."""
        if self.stored:
            return self.stored.form
        if self.run is None or self.adapters is None:
            return None
        quantize = self.run.config["train"].get("quantize")
        return self.base.quantization or scheme_for(quantize, self.config)

    def form(self, quantize: Format | None) -> Form | None:
        """Quantization scheme after loading: the stored one, else the requested one."""
        return self.quantization or scheme_for(quantize, self.config)

    def weights_bytes(self, dtype: DTypeLike | None = None, quantize: Format | None = None) -> int:
        """Bytes of memory that `load` takes, but for one tensor in transit.

        A run's float32 weights are all read before they are cast or quantised.
        """
        if self.adapters is not None:
            return self.base.weights_bytes(dtype, self.of_base(quantize))
        how = self.form(quantize)
        if self.stored and how is None and dtype is None:
            return self.stored.nbytes
        wanted = weights_bytes(self.config, dtype or np.float32, how)
        return max(wanted, weights_bytes(self.config, np.float32)) if self.run else wanted

    def load(
        self,
        dtype: DTypeLike | None = None,
        quantize: Format | None = None,
        mesh: Mesh | None = None,
        placing: Placing = shardings,
    ) -> Loaded:
        """Loads the weights, cast to `dtype` if given; a run's from its last good checkpoint.

        Quantised weights, stored or by `quantize`, are not cast, so mostly the norms are.

        With a mesh the weights are sharded over its devices, as `placing` says.

        Raises:
            BadInput: there is no good checkpoint, or as `load_weights`.
        """
        if self.stored:
            shapes = weight_shapes(self.config, self.form(quantize))
            places = placing(mesh, shapes) if mesh else None
            _, weights = load_weights(self.stored, dtype=dtype, quantize=quantize, shardings=places)
            return Loaded(weights)
        if self.adapters is not None:
            base, learned = self.load_base(dtype, quantize, mesh, placing), self.load_adapters()
            arrays = {
                name: leaf.astype(base.weights[name].dtype) if name in base.weights else leaf
                for name, leaf in learned.weights.items()
            }
            weights = base.weights | arrays | self.adapters.scales(self.config)
            return Loaded(weights, learned.step, base.refused + learned.refused)
        from lechat_jax.checkpoint.training_state import (
            Checkpoints,  # Orbax takes 0.2 s, and only runs need it
        )

        form, checkpoints = scheme_for(quantize, self.config), Run(self.folder).checkpoints
        template = {"model": described(mesh, weight_shapes(self.config), placing)}
        restored = Checkpoints(checkpoints).restore(template)
        weights = restored.items["model"]
        if form is not None:
            try:
                weights = quantize_weights(weights, form)
            except BadInput as error:
                raise BadInput(f"{checkpoints / str(restored.step)}: {error}") from None
        for name in weights:  # one by one, so that there are not two models in memory
            if dtype is not None and not (form and form.is_fixed(name)):
                weights[name] = weights[name].astype(dtype)
        return Loaded(weights, restored.step, restored.refused)

    def load_base(
        self,
        dtype: DTypeLike | None = None,
        quantize: Format | None = None,
        mesh: Mesh | None = None,
        placing: Placing = shardings,
    ) -> Loaded:
        """Loads the base weights of a run's adapters, quantised as in training.

        Raises:
            BadInput: they are not the weights of that training, or as `load`.
        """
        loaded = self.base.load(dtype, self.of_base(quantize), mesh, placing)
        self.check_base(loaded.step)
        return loaded

    def of_base(self, quantize: Format | None) -> Format | None:
        """Quantization scheme of the base: the requested one, else that of adapter training."""
        return quantize or (self.quantization.format if self.quantization else None)

    def check_base(self, step: int | None) -> None:
        """Raises `BadInput` if the adapters were trained on other base weights than these.

        Args:
            step: of the checkpoint that was loaded, if the base is a run.
        """
        if self.run is None or self.adapters is None:
            return
        if self.base.sha256(step) != self.run.config["train"]["init_from_sha256"]:
            raise BadInput(
                f"the adapters of {self.folder} were learned beside other weights than those that "
                f"are in {self.base.folder} now (their SHA-256 differs); restore them"
            )

    def load_adapters(self) -> Loaded:
        """Loads only what the last good checkpoint learned, adapters and projector, in float32.

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
        return Loaded(restored.items["model"], restored.step, restored.refused)
