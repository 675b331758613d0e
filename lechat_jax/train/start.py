"""Start of a run, new or resumed: its options, model, tokenizer and initial weights."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lechat_jax.checkpoint.bucket_run import new_run, run_to_resume
from lechat_jax.checkpoint.load import shapes_to_compute
from lechat_jax.checkpoint.peft import read_adapter
from lechat_jax.checkpoint.run import Run
from lechat_jax.checkpoint.saved_model import Loaded, SavedModel
from lechat_jax.checkpoint.weights import weight_shapes
from lechat_jax.cli.display import Display
from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import is_projector
from lechat_jax.devices.platform import platform
from lechat_jax.devices.processes import from_first
from lechat_jax.errors import BadInput
from lechat_jax.files.buckets import uri_of
from lechat_jax.files.find import located
from lechat_jax.model.adapters import Adapters, target_words
from lechat_jax.model.binding import Weights
from lechat_jax.shell import command
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.tokenizer.vocabulary import no_tokenizer
from lechat_jax.train.memory_plan import Parts
from lechat_jax.train.options import DEFAULT_PRESET, Dtype, TrainConfig


class TrainableAdapters(NamedTuple):
    """LoRA adapters to train, and the projector beside them if there are images.

    Attributes:
        adapters: targets, ranks and scales.
        arrays: initial weights that were read; `None` to draw the adapters.
    """

    adapters: Adapters
    arrays: Mapping[str, np.ndarray] | None = None

    def beside(self, has_images: bool) -> "TrainableAdapters":
        """These adapters for rows with images or without; a projector that was read stays."""
        projector = has_images or any(map(is_projector, self.arrays or ()))
        return self._replace(adapters=dataclasses.replace(self.adapters, projector=projector))

    def first(self, config: MistralConfig, seed: int, base: Weights) -> Weights:
        """Initial weights in float32, in which a projector that was not read is the base's."""
        weights = self.adapters.draw(config, seed) if self.arrays is None else self.arrays
        return {
            name: jnp.asarray(weights[name] if name in weights else base[name], jnp.float32)
            for name in self.adapters.shapes(config)
        }


class Start(NamedTuple):
    """What a run starts or resumes with.

    Attributes:
        options: of the command line, or of the run that is resumed.
        model: the model's config.
        tokenizer: of the folder of the initial weights, or Mistral's v1.
        source: the initial weights, instead of random ones; or the run that is resumed, if it
            trains adapters of a base model elsewhere.
        learning: the adapters to train, if not all weights are.
    """

    options: TrainConfig
    model: MistralConfig
    tokenizer: Tokenizer
    source: SavedModel | None = None
    learning: TrainableAdapters | None = None

    @property
    def parts(self) -> Parts:
        """Shapes of the trainable and of the frozen weights."""
        if self.learning is None or self.source is None:
            return Parts(weight_shapes(self.model), {})
        adapters = self.learning.adapters
        dtype = self.options.shape(platform()).dtype
        described = adapters.described(self.model)
        names = adapters.shapes(self.model)
        quantized = self.source.of_base(self.options.quantize)
        base = shapes_to_compute(self.source.base, dtype, quantized)
        frozen = {name: x for name, x in {**described, **base}.items() if name not in names}
        return Parts({name: described[name] for name in names}, frozen)


def run_of(asked: TrainConfig) -> Run:
    """The run to resume, or a new one whose folder does not exist yet.

    All processes share its folder.

    Raises:
        BadInput: there is no such run, or it could not honour the flags beside --resume.
    """
    if uri_of(asked.resume or asked.out or "") and jax.process_count() > 1:
        raise BadInput(
            "several processes write one run together, each its own part, so its folder is on a "
            "disk that they share; copy it into the bucket in the end"
        )
    if asked.resume is None:
        name = asked.name or f"{asked.model_name}-{time.strftime('%Y%m%d-%H%M%S')}"
        return new_run(Path(from_first(lambda: str(asked.out or Path("runs") / name))))
    if flags := asked.contradictions():
        raise BadInput(f"--resume goes on with the run's own options; leave out {', '.join(flags)}")
    return run_to_resume(asked.resume)


def started(asked: TrainConfig) -> Start:
    """Validates the options of a new run, and opens its initial weights.

    Raises:
        BadInput: the model, the weights or their tokenizer cannot be used.
    """
    if asked.init_from is None:
        options = _located(dataclasses.replace(asked, preset=asked.preset or DEFAULT_PRESET))
        model, tokenizer, source = asked.model(), Tokenizer.mistral_v1(), None
        if model.vocab_size != tokenizer.vocab_size:
            raise BadInput(
                f"the model has {model.vocab_size} token ids but the tokenizer {tokenizer.path} "
                f"{tokenizer.vocab_size}; choose another preset"
            )
    else:
        options = _located(asked)
        source = SavedModel.open(asked.init_from)
        check_source(source, options)
        model, tokenizer = source.config, source.tokenizer
        if tokenizer is None:
            raise BadInput(no_tokenizer(asked.init_from, "no text can be read"))
        if flags := asked.contradictions_to(model):
            raise BadInput(
                f"--init-from takes the model from {asked.init_from}, which is another one; "
                f"leave out {', '.join(flags)}"
            )
    learning = trainable_adapters(options, model)
    options = dataclasses.replace(
        options,
        optimizer=options.usual_optimizer,
        beta1=options.usual_beta1,
        unused_ids=options.usual_unused_ids,
    )
    return Start(options, model, tokenizer, source, learning)


def resumed(run: Run, asked: TrainConfig) -> Start:
    """Reads and locks a run to resume it with its own options.

    Raises:
        BadInput: another one does, or the folder is not as the run left it.
    """
    from_first(run.hold)
    config = run.config
    trained = SavedModel.open(run.folder)
    if asked.init_from and not trained.adapters:
        raise BadInput(
            f"{run.folder} has all its weights and needs no others to go on; leave out --init-from"
        )
    trained = dataclasses.replace(trained, moved=asked.init_from and _absolute(asked.init_from))
    tokenizer = trained.tokenizer
    if tokenizer is None:
        raise BadInput(f"{run.folder} has no tokenizer any more; put the run's own back into it")
    return Start(
        options=_located(TrainConfig.from_dict(config["train"]).with_changes_of(asked)),
        model=MistralConfig.from_dict(config["model"]),
        tokenizer=tokenizer,
        source=trained if trained.adapters else None,
        learning=TrainableAdapters(trained.adapters) if trained.adapters else None,
    )


def _located(options: TrainConfig) -> TrainConfig:
    """The options with absolute paths, so that the run can be resumed from any folder."""
    init_from = options.init_from and _absolute(options.init_from)
    return dataclasses.replace(options, data=located(options.data), init_from=init_from)


def _absolute(path: Path) -> Path:
    """The absolute path of what is there; the name of a model on the Hub as it is."""
    return path.absolute() if path.exists() else path


def trainable_adapters(options: TrainConfig, config: MistralConfig) -> TrainableAdapters | None:
    """The LoRA adapters of the flags --lora-rank and --lora-from; `None` without them.

    Until the rows are known, those of a model that sees may have images.

    Raises:
        BadInput: they do not fit the model, or the folder of --lora-from cannot be read.
    """
    if options.lora_from:
        read = TrainableAdapters(*read_adapter(options.lora_from, config))
        return read.beside(has_images=config.vision is not None)
    if options.lora_rank is None:
        return None
    alpha = 2.0 * options.lora_rank if options.lora_alpha is None else options.lora_alpha
    adapters = Adapters(options.lora_rank, alpha, options.lora_targets or target_words(config))
    adapters.parts(config)
    return TrainableAdapters(adapters).beside(has_images=config.vision is not None)


def check_source(source: SavedModel, options: TrainConfig) -> None:
    """Raises `BadInput` for weights that cannot be trained: adapters, or quantised ones alone."""
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
    source: SavedModel, options: TrainConfig, dtype: Dtype, mesh: Mesh | None, display: Display
) -> Loaded:
    """Loads the weights of --init-from: in float32 to train them, or as a frozen base for adapters.

    Args:
        source: where they are; of a run that is resumed, the run itself.
        options: of the run.
        dtype: that is computed in.
        mesh: of the devices that they go to.
        display: says what is damaged.

    Raises:
        BadInput: they are not finite, or as `SavedModel.load` says.
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
