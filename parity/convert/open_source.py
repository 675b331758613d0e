"""Opens a checkpoint of any format, also a training run, a pickle, or with adapters to merge."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lechat_jax.checkpoint.run import Run
from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import is_projector
from lechat_jax.errors import BadInput
from lechat_jax.formats.folder import kind_of
from lechat_jax.formats.hub import local_model
from lechat_jax.formats.names import shapes
from lechat_jax.formats.open_model import open_model, tokenizer_of
from lechat_jax.formats.source import Source
from lechat_jax.formats.stores import Store, array_store
from lechat_jax.tokenizer.vocabulary import control_ids
from parity.convert import first_mixtral
from parity.convert.merge_adapters import Product, rounded, with_adapters
from parity.convert.torch_files import pickle_store


def open_source(
    path: Path | str,
    *,
    rope_theta: float | None = None,
    revision: str | None = None,
    verify: bool = True,
    dequantize: bool = False,
    adapter: Path | None = None,
    dtype: np.dtype | None = None,
    text_only: bool = False,
) -> Source:
    """Opens the checkpoint in a folder or a GGUF file, or on the Hugging Face Hub by its name.

    Args:
        path: a folder in any format, also a training run's; a file NAME.gguf; or the Hub's name of
            a model, such as `org/name`.
        rope_theta: for a `params.json` that does not say it.
        revision: of the model on the Hub: a branch, a tag or a commit.
        verify: as for `open_model`.
        dequantize: read weights that are quantised as the numbers they stand for, instead of
            refusing them.
        adapter: a folder of adapters in PEFT's format, which are merged into the model.
        dtype: of kernels that adapters are merged into; by default what they had.
        text_only: without the vision tower, if there is one.

    Raises:
        BadInput: there is nothing there that can be read, or it is damaged, or its config
            and its weights do not fit.
    """
    here, metadata = local_model(path, revision)
    try:
        if here.is_dir() and kind_of(here) == "run":
            source = _run(here, dtype)
            source = source.text if text_only else source
        else:
            source = open_model(
                here,
                rope_theta=rope_theta,
                metadata=metadata,
                verify=verify,
                read_pickles=_read_pickles,
                text_only=text_only,
            )
        if adapter is not None:
            source = with_adapters(source, _read_products(adapter, source.config), dtype)
    except OSError as error:
        raise BadInput(f"{error.filename or path} cannot be read: {error.strerror}") from error
    if source.quantization and not dequantize:
        raise BadInput(
            f"{path} is {source.quantization}, which differs from what it was made from on "
            "purpose; check an unquantised conversion, and measure what quantising costs with: "
            "python -m parity.quality"
        )
    if rope_theta not in (None, source.config.rope_theta):
        raise BadInput(
            f"{path} says rope_theta {source.config.rope_theta:g}; leave out --rope-theta"
        )
    return source


def _read_pickles(files: Sequence[Path], config: MistralConfig) -> Store:
    """The tensors of PyTorch's files: a state dict, or all files of the first Mixtral."""
    is_first = files[0].name.startswith("consolidated.") and files[0].suffix == ".pt"
    return first_mixtral.read(files, config) if is_first else pickle_store(files[0])


def _run(folder: Path, dtype: np.dtype | None) -> Source:
    """The last good checkpoint of a training run."""
    run = Run.open(folder)
    fields = run.config
    source = _adapted(folder, dtype) if fields.get("adapters") else _trained(run, fields["model"])
    return dataclasses.replace(source, taught_to_chat=bool(fields["train"].get("chat")))


def _trained(run: Run, fields: Mapping[str, Any]) -> Source:
    """The weights of a run that trained all of them."""
    import jax

    from lechat_jax.checkpoint.training_state import Checkpoints

    config = MistralConfig.from_dict(dict(fields))
    template = {
        name: jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in shapes(config, "lechat").items()
    }
    restored = Checkpoints(run.checkpoints).restore({"model": template})
    for sentence in restored.refused:
        print(f"warning: {sentence}", file=sys.stderr)
    arrays = {name: np.asarray(leaf) for name, leaf in restored.items["model"].items()}
    store = array_store(run.checkpoints / str(restored.step), arrays)
    return Source(
        "run",
        run.folder,
        config,
        tokenizer_of(run.folder),
        {"step": str(restored.step)},
        store.tensors,
        store,
        control_ids=control_ids(run.folder),
    )


def _adapted(folder: Path, dtype: np.dtype | None) -> Source:
    """The adapters of a run's last good checkpoint, merged into the weights they are for."""
    from lechat_jax.checkpoint.saved_model import SavedModel

    trained = SavedModel.open(folder)
    learned = trained.load_adapters()
    base = open_source(trained.base.folder, dequantize=True)
    trained.check_base(int(base.metadata["step"]) if base.format == "run" else None)
    for sentence in learned.refused:
        print(f"warning: {sentence}", file=sys.stderr)
    if trained.quantization and not base.quantization:  # they learned beside what that makes of it
        base = dataclasses.replace(base, stored=rounded(base.stored, trained.quantization))
    arrays = {name: np.asarray(leaf) for name, leaf in learned.weights.items()}
    merged = with_adapters(base, _products(trained.adapters, arrays, base.config), dtype)
    return dataclasses.replace(
        merged,
        format="run",
        stored=merged.in_lechats_form.tensors,
        path=folder,
        tokenizer_files=tokenizer_of(folder),
        metadata={**merged.metadata, "step": str(learned.step)},
        quantization=None,
    )


def _read_products(folder: Path, config: MistralConfig) -> dict[str, Product | np.ndarray]:
    """What the adapters of a folder add, by the kernel's name, and the projector's weights."""
    from lechat_jax.checkpoint.peft import read_adapter

    return _products(*read_adapter(folder, config), config)


def _products(
    adapters: Any, arrays: Mapping[str, np.ndarray], config: MistralConfig
) -> dict[str, Product | np.ndarray]:
    added = {
        f"{name}.kernel": Product(arrays[f"{name}.lora.a"], arrays[f"{name}.lora.b"], part.scale)
        for name, part in adapters.parts(config).items()
    }
    return added | {name: array for name, array in arrays.items() if is_projector(name)}
