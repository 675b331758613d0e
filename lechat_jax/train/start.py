"""What a run begins with when its weights are trained already: all of them, or adapters."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lechat_jax.checkpoint.peft import read_adapter
from lechat_jax.checkpoint.saved_model import Loaded, Trained
from lechat_jax.cli.display import Display
from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import MAPS
from lechat_jax.errors import BadInput
from lechat_jax.model.adapters import Adapters
from lechat_jax.model.mistral import Weights
from lechat_jax.shell import command
from lechat_jax.train.options import Dtype, TrainConfig


class Asked(NamedTuple):
    """The adapters that are to learn.

    Attributes:
        adapters: which maps have one.
        arrays: what they are at first; `None` for fresh ones.
    """

    adapters: Adapters
    arrays: Mapping[str, np.ndarray] | None = None

    def first(self, config: MistralConfig, seed: int) -> Weights:
        """The weights of step 0."""
        if self.arrays is None:
            return self.adapters.draw(config, seed)
        return {name: jnp.asarray(array) for name, array in self.arrays.items()}


def adapters_asked(options: TrainConfig, config: MistralConfig) -> Asked | None:
    """The adapters that the flags ask for, if they do.

    Raises:
        BadInput: they do not fit the model, or the folder of --lora-from cannot be read.
    """
    if options.lora_from:
        return Asked(*read_adapter(options.lora_from, config))
    if options.lora_rank is None:
        return None
    alpha = 2.0 * options.lora_rank if options.lora_alpha is None else options.lora_alpha
    adapters = Adapters(options.lora_rank, alpha, options.lora_targets or tuple(MAPS))
    adapters.parts(config)
    return Asked(adapters)


def check_source(source: Trained, options: TrainConfig) -> None:
    """Raises `BadInput` for weights that cannot learn, or have nothing beside them that could."""
    if source.adapters is not None:
        merge = command("parity.convert", source.folder, f"{source.folder}-merged", to="lechat")
        adapter = source.folder / "adapter"
        alone = command("lechat_jax.train", init_from=source.base.folder, lora_from=adapter)
        raise BadInput(
            f"{source.folder} holds adapters beside other weights; merge them first with: {merge}, "
            f"or go on with them alone: {alone}"
        )
    if source.quantization and not options.learns_adapters:
        raise BadInput(
            f"--init-from needs floating-point weights, since training changes them by less "
            f"than int8 can tell, and those of {source.folder} are {source.quantization}; "
            "start from what they were converted from (python -m parity.convert without "
            "--quantize), or learn adapters beside them (--lora-rank)"
        )


def load_base(
    source: Trained, options: TrainConfig, dtype: Dtype, mesh: Mesh | None, display: Display
) -> Loaded:
    """The weights of --init-from: in the float32 that they learn in, or as adapters need them.

    Args:
        source: where they are; of a run that is resumed, the run itself.
        options: of the run.
        dtype: that is computed in.
        mesh: of the devices that they go to.
        display: says what is damaged.

    Raises:
        BadInput: they are not finite, or as `Trained.load` says.
    """
    display.wait("loading weights")
    kept = dtype if options.learns_adapters else "float32"
    loaded = source.load_base(kept, options.quantize, mesh)
    for sentence in loaded.refused:
        display.say(f"warning: {sentence}", style="yellow")
    if bad := [name for name, leaf in loaded.weights.items() if not jnp.isfinite(leaf).all()]:
        raise BadInput(
            f"weights of {source.base.folder} are not finite, {', '.join(bad)}, and no training "
            "would mend them; convert them again, or start from another folder"
        )
    return loaded
