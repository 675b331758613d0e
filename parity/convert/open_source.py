"""Opens a checkpoint of any format and checks that its tensors are there and fit its config.

A repository often holds the same weights twice; Hugging Face's index is preferred to
Mistral's consolidated file, and safetensors to a pickle. Files are never looked for by a
pattern, which would mix them.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lechat_jax.checkpoint.folder import OF_TEXT, fault_of
from lechat_jax.checkpoint.run import Run
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.files.checksums import MANIFEST
from lechat_jax.files.safetensors_header import check_inside, parse_json
from lechat_jax.quantize.scheme import pop_format
from lechat_jax.shell import command
from lechat_jax.tokenizer.vocabulary import control_ids
from parity.convert.configs.hugging_face import from_hugging_face
from parity.convert.configs.mistral import contradiction, from_params
from parity.convert.configs.vision import SEEING, without_vision
from parity.convert.files import first_mixtral, hub
from parity.convert.files.stores import (
    Store,
    Stored,
    array_store,
    dequantized_store,
    safetensors_store,
)
from parity.convert.files.torch_files import pickle_store
from parity.convert.gguf.read import Opened, open_gguf
from parity.convert.merge_adapters import Product, rounded
from parity.convert.names import match, names, shapes, tied_head
from parity.convert.quantized.detect import Quantization, take_quantization
from parity.convert.source import Source, SourceFormat, format_of

DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32), np.dtype(float))
ADAPTERS = ("adapter_model.safetensors", "lora.safetensors")
POSITIONS = "max_position_embeddings"
KEPT = ("source", "revision", "step", POSITIONS)  # of the metadata, from copy to copy
SLAB = 1 << 22  # elements compared at once


def open_source(
    path: Path | str,
    *,
    rope_theta: float | None = None,
    revision: str | None = None,
    verify: bool = True,
    dequantize: bool = False,
    adapter: Path | None = None,
    dtype: np.dtype | None = None,
) -> Source:
    """Opens the checkpoint in a folder or a GGUF file, or on the Hugging Face Hub by its name.

    Args:
        path: a folder in any format, also a training run's; a file NAME.gguf; or the Hub's name of
            a model, such as `org/name`.
        rope_theta: for a `params.json` that does not say it.
        revision: of the model on the Hub: a branch, a tag or a commit.
        verify: compare what has checksums with them, at half a second a GB; without, the
            caller does it with `check_complete`.
        dequantize: read weights that are quantised as the numbers they stand for, instead of
            refusing them.
        adapter: a folder of adapters in PEFT's format, which are merged into the model.
        dtype: of kernels that adapters are merged into; by default what they had.

    Raises:
        BadInput: there is nothing there that can be read, or it is damaged, or its config
            and its weights do not fit.
    """
    folder, metadata = Path(path), {}
    try:
        if not folder.exists() and hub.is_name(str(path)):
            folder, metadata = hub.download(str(path), revision)
        elif revision is not None:
            raise BadInput(f"--revision is for models of the Hub, and {path} is a folder")
        if folder.is_file() and folder.suffix == ".gguf":
            source = _gguf(folder)
        elif not folder.is_dir():
            kind = "a file; name the folder it is in" if folder.exists() else "not there"
            raise BadInput(f"{path} is {kind}")
        else:
            source = _open(folder, rope_theta, metadata, verify, dtype)
        if adapter is not None:
            source = source.merged(_read_products(adapter, source.config), dtype)
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


def _open(
    folder: Path,
    rope_theta: float | None,
    metadata: dict[str, str],
    verify: bool,
    dtype: np.dtype | None,
) -> Source:
    """The checkpoint in a folder, by what its config looks like."""
    _refuse_adapter(folder)
    config, params = folder / "config.json", folder / "params.json"
    fields = parse_json(config.read_bytes(), config) if config.is_file() else {}
    if "model" in fields and "train" in fields:
        run = _adapted(folder, dtype) if fields.get("adapters") else _run(folder, fields)
        return dataclasses.replace(run, taught_to_chat=bool(fields["train"].get("chat")))
    if "dim" in fields:
        return _lechat(folder, fields, verify)
    if "model_type" in fields and (_has(folder, "model") or not params.is_file()):
        return _hugging_face(folder, fields, metadata)
    if params.is_file():
        fields = parse_json(params.read_bytes(), params)
        return _mistral(folder, fields, rope_theta, metadata)
    raise BadInput(
        f"{folder} holds no checkpoint: neither a config.json of Hugging Face's or lechat's, "
        "nor Mistral's params.json"
    )


def _refuse_adapter(folder: Path) -> None:
    """Raises `BadInput` for a folder of adapters alone, with the command that merges them."""
    found = [name for name in ADAPTERS if (folder / name).is_file()]
    is_model = _has(folder, "model") or _has(folder, "consolidated")
    if found and not is_model and not (folder / "consolidated.00.pth").is_file():
        merge = command("parity.convert", "BASE", f"{folder}-merged", adapter=folder, to="lechat")
        raise BadInput(
            f"{folder} holds an adapter alone, {found[0]}; merge it into the model BASE that it "
            f"was trained on with: {merge}"
        )


def _hugging_face(folder: Path, fields: dict[str, Any], metadata: dict[str, str]) -> Source:
    quantization = take_quantization(fields, folder / "config.json")
    config = from_hugging_face(fields, folder / "config.json")
    if not _has(folder, "model"):
        for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
            if (folder / name).is_file():
                raise BadInput(
                    f"{folder} has its weights in {name}, a pickle; save the model as safetensors"
                )
    text = fields["text_config"] if fields["model_type"] == SEEING else fields
    if type(positions := text.get(POSITIONS)) is int:
        metadata = {**metadata, POSITIONS: str(positions)}
    store = safetensors_store(folder, "model")
    if fields["model_type"] == SEEING:
        store = without_vision(store, folder)
        if tied_head(config, "hf") in store.tensors:  # transformers believes the weights, too
            config = dataclasses.replace(config, tied_embeddings=False)
    if (params := folder / "params.json").is_file():
        said = contradiction(config, parse_json(params.read_bytes(), params), params)
        store = dataclasses.replace(store, notes=(*store.notes, *([said] if said else ())))
    source = _source("hf", folder, config, _as_weights(store, quantization), metadata)
    said = fields | {key: value for key, value in text.items() if value is not None}
    return dataclasses.replace(source, control_ids=control_ids(folder, said))


def _mistral(
    folder: Path, fields: dict[str, Any], rope_theta: float | None, metadata: dict[str, str]
) -> Source:
    quantization = take_quantization(fields, folder / "params.json")
    config = from_params(fields, folder / "params.json", rope_theta)
    old = folder / "consolidated.00.pth"
    first = first_mixtral.files_of(folder)
    if first and not _has(folder, "consolidated") and not old.is_file():
        store = first_mixtral.read(first, config)
    elif _has(folder, "consolidated") or not old.is_file():
        if old.is_file():
            print(f"{folder} has {old.name} too; the safetensors are read", file=sys.stderr)
        store = safetensors_store(folder, "consolidated")
    elif (folder / "consolidated.01.pth").exists():
        raise BadInput(f"{folder} has its weights cut into consolidated.00.pth, .01.pth and so on")
    else:
        check_inside(folder, old)
        store = pickle_store(old)
    if fields.get("vision_encoder"):
        store = without_vision(store, folder)
    if (folder / ADAPTERS[1]).is_file():
        said = f"{ADAPTERS[1]} beside it is not merged; for that say --adapter {folder}"
        store = dataclasses.replace(store, notes=(*store.notes, said))
    return _source("mistral", folder, config, _as_weights(store, quantization), metadata)


def _gguf(path: Path) -> Source:
    """A file of llama.cpp's, whose kernels may be quantised."""
    opened = open_gguf(path)
    metadata = {} if opened.positions is None else {POSITIONS: str(opened.positions)}
    return _source("gguf", path, opened.config, opened.store, metadata, opened)


def _as_weights(store: Store, quantization: Quantization | None) -> Store:
    """The numbers that quantised tensors stand for, each when it is read."""
    if quantization is None:
        return store
    return dataclasses.replace(quantization.read(store), quantization=quantization.name)


def check_complete(folder: Path) -> None:
    """Compares a folder of lechat's with its checksums; nothing is returned.

    Raises:
        BadInput: one is not; it is named.
    """
    if reason := fault_of(folder):
        raise BadInput(f"{folder} is damaged: {reason}; make or download it again")


def _lechat(folder: Path, fields: dict[str, Any], verify: bool) -> Source:
    """Lechat's own folder, or that of a state dict of lechat_torch with the same config."""
    quantization = pop_format(fields, folder / "config.json")
    try:
        config = MistralConfig.from_dict(fields)
    except BadInput as error:
        raise BadInput(f"{folder / 'config.json'}: {error}") from None
    pickled = folder / "model.pt"
    if pickled.is_file() and not _has(folder, "model"):
        check_inside(folder, pickled)
        return _source("torch", folder, config, pickle_store(pickled), {})
    if verify:
        check_complete(folder)
    store = safetensors_store(folder, "model")
    if quantization:
        store = dequantized_store(store, quantization)
    return _source("lechat", folder, config, store, {})


def _run(folder: Path, fields: dict[str, Any]) -> Source:
    """The last good checkpoint of a training run."""
    import jax

    from lechat_jax.checkpoint.training_state import Checkpoints

    config = MistralConfig.from_dict(fields["model"])
    run = Run.open(folder)
    template = {
        name: jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in shapes(config, "lechat").items()
    }
    restored = Checkpoints(run.checkpoints).restore({"model": template})
    for sentence in restored.refused:
        print(f"warning: {sentence}", file=sys.stderr)
    arrays = {name: np.asarray(leaf) for name, leaf in restored.items["model"].items()}
    store = array_store(run.checkpoints / str(restored.step), arrays)
    return _source("run", folder, config, store, {"step": str(restored.step)})


def _adapted(folder: Path, dtype: np.dtype | None) -> Source:
    """The adapters of a run's last good checkpoint, merged into the weights they are for."""
    from lechat_jax.checkpoint.saved_model import SavedModel

    trained = SavedModel.open(folder)
    learned = trained.load_adapters()
    base = open_source(trained.base.folder, dequantize=True)
    trained.check_base(_manifest(base))
    for sentence in learned.refused:
        print(f"warning: {sentence}", file=sys.stderr)
    if trained.quantization and not base.quantization:  # they learned beside what that makes of it
        base = dataclasses.replace(base, stored=rounded(base.stored, trained.quantization))
    arrays = {name: np.asarray(leaf) for name, leaf in learned.weights.items()}
    merged = base.merged(_products(trained.adapters, arrays, base.config), dtype)
    return dataclasses.replace(
        merged,
        format="run",
        path=folder,
        tokenizer_files=_tokenizer(folder),
        metadata={**merged.metadata, "step": learned.manifest.parent.name},
        quantization=None,
    )


def _read_products(folder: Path, config: MistralConfig) -> dict[str, Product]:
    """What the adapters of a folder add, by the kernel's name."""
    from lechat_jax.checkpoint.peft import read_adapter

    return _products(*read_adapter(folder, config), config)


def _products(
    adapters: Any, arrays: Mapping[str, np.ndarray], config: MistralConfig
) -> dict[str, Product]:
    return {
        f"{name}.kernel": Product(arrays[f"{name}.lora.a"], arrays[f"{name}.lora.b"], part.scale)
        for name, part in adapters.parts(config).items()
    }


def _manifest(source: Source) -> Path:
    """What proves which weights a folder of lechat's or a run's checkpoint holds."""
    if source.format == "run":
        return Run(source.path).checkpoints / source.metadata["step"] / MANIFEST
    return source.path / MANIFEST


def _source(
    kind: SourceFormat,
    folder: Path,
    config: MistralConfig,
    store: Store,
    metadata: dict[str, str],
    opened: Opened | None = None,
) -> Source:
    """The source, once every weight has been found in the shape and dtype it must have.

    A GGUF that was `opened` has tokenizer and ids in itself, and not in files beside it.
    """
    fmt = format_of(kind)
    keys = match(config, fmt, store.tensors.keys(), folder)
    by_key = {key: name for name, key in keys.items()}
    stored = {by_key[key]: one for key, one in store.tensors.items() if key in by_key}
    sizes = shapes(config, fmt)
    for name, one in stored.items():
        if one.shape != (wanted := sizes[name]):
            raise BadInput(f"{one.where} has the shape {list(one.shape)} instead of {list(wanted)}")
        if one.dtype not in DTYPES:
            raise BadInput(
                f"{one.where} is {one.dtype}; a weight must be bfloat16, float16 or float32"
            )
    if (head := store.tensors.get(tied_head(config, fmt) or "")) is not None:
        _check_equal(head, store.tensors[names(config, fmt)["embed.kernel"]])
    tokenizer = opened.tokenizer_files if opened else _tokenizer(folder)
    metadata = {key: store.metadata[key] for key in KEPT if key in store.metadata} | metadata
    return Source(
        kind,
        folder,
        config,
        tokenizer,
        metadata,
        stored,
        store,
        store.quantization,
        opened.control_ids if opened else control_ids(folder),
    )


def _tokenizer(folder: Path) -> tuple[Path, ...]:
    """The tokenizer's files beside the weights."""
    paths = folder.iterdir()
    found = tuple(sorted(path for path in paths if OF_TEXT.fullmatch(path.name)))
    for path in found:
        check_inside(folder, path)
    return found


def _check_equal(head: Stored, embedding: Stored) -> None:
    """Raises `BadInput` if the head of a model that claims to be tied is not its embedding."""
    if (head.shape, head.dtype) == (embedding.shape, embedding.dtype):
        a, b = (x.read().reshape(-1).view(np.uint8) for x in (head, embedding))
        parts = (slice(start, start + SLAB) for start in range(0, a.size, SLAB))
        if np.may_share_memory(a, b) or all(np.array_equal(a[part], b[part]) for part in parts):
            return
    raise BadInput(f"{head.where} differs from the embedding, though the config says they are tied")


def _has(folder: Path, stem: str) -> bool:
    """Whether there are safetensors of that stem."""
    single = folder / f"{stem}.safetensors"
    return single.exists() or (folder / f"{stem}.safetensors.index.json").exists()
