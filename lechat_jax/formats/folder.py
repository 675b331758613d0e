"""Detects what a model's path holds: a training run, weights in a format, or a GGUF file.

By its config and the names of its files alone, without JAX and without reading the weights.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.files.checksums import fault
from lechat_jax.files.safetensors_header import parse_json
from lechat_jax.quantize.scheme import Form, pop_format
from lechat_jax.shell import command
from lechat_jax.tokenizer.tokenizer import FILES
from lechat_jax.tokenizer.vocabulary import BESIDE

CONFIG, PARAMS = "config.json", "params.json"
GGUF = ".gguf"
PICKLED = "model.pt"  # a state dict of lechat_torch, beside a config like lechat's
ADAPTERS = ("adapter_model.safetensors", "lora.safetensors")  # of PEFT, and of mistral-finetune
OF_WEIGHTS = re.compile(r"config\.json|model.*\.safetensors(\.index\.json)?")
OF_TEXT = re.compile(rf"{FILES.pattern}|{BESIDE.pattern}")

Kind = Literal["run", "lechat", "torch", "hf", "mistral", "gguf"]


def kind_of(path: Path) -> Kind:
    """Detects what a path holds.

    A repository often holds the same weights twice: Hugging Face's are preferred to Mistral's.

    Raises:
        BadInput: it is nothing that is read, or adapters alone.
    """
    if path.is_file() and path.suffix == GGUF:
        return "gguf"
    if not path.is_dir():
        what = "is a file; name its folder" if path.exists() else "is not there"
        raise BadInput(f"{path} {what}")
    _refuse_adapter(path)
    config, params = path / CONFIG, path / PARAMS
    fields = parse_json(config.read_bytes(), config) if config.is_file() else {}
    if "model" in fields and "train" in fields:
        return "run"
    if "dim" in fields and "model_type" not in fields:  # Hugging Face calls it hidden_size
        is_pickled = (path / PICKLED).is_file() and not has_safetensors(path, "model")
        return "torch" if is_pickled else "lechat"
    if "model_type" in fields and (has_safetensors(path, "model") or not params.is_file()):
        return "hf"
    if params.is_file():
        return "mistral"
    raise BadInput(
        f"{path} holds no model: it is no training run, and has neither a {CONFIG} of lechat's or "
        f"Hugging Face's nor Mistral's {PARAMS}"
    )


def _refuse_adapter(folder: Path) -> None:
    """Raises `BadInput` for a folder of adapters alone, with the command that merges them."""
    found = [name for name in ADAPTERS if (folder / name).is_file()]
    has_weights = has_safetensors(folder, "model") or has_safetensors(folder, "consolidated")
    if found and not has_weights and not (folder / "consolidated.00.pth").is_file():
        merge = command("parity.convert", "BASE", f"{folder}-merged", adapter=folder, to="lechat")
        raise BadInput(
            f"{folder} holds an adapter alone, {found[0]}; merge it into the model BASE that it "
            f"was trained on with: {merge}"
        )


def has_safetensors(folder: Path, stem: str) -> bool:
    """Whether a folder has `<stem>.safetensors`, or the index of its shards."""
    ends = ("", ".index.json")
    return any((folder / f"{stem}.safetensors{end}").exists() for end in ends)


def fault_of(folder: Path) -> str | None:
    """Verifies a folder of weights in lechat's format: the first damage or `None`; see `checksums`.

    A tokenizer may be added to a folder that was saved without one.
    """
    return fault(folder, folders=(), is_read=_is_read)


def _is_read(name: str, saved: Collection[str]) -> bool:
    """Whether a file that the manifest lacks would change what is loaded."""
    if OF_TEXT.fullmatch(name):
        return any(FILES.fullmatch(one) for one in saved)
    return bool(OF_WEIGHTS.fullmatch(name))


def read_config(folder: Path) -> tuple[MistralConfig, Form | None]:
    """Reads the config of a folder in lechat's format, and how its kernels are quantised, if so.

    Raises:
        BadInput: there is no such config, or it is invalid, or the scheme is not known.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise BadInput(f"{path} is missing; name a folder in lechat's format")
    fields = parse_json(path.read_bytes(), path)
    form = pop_format(fields, path)
    try:
        return MistralConfig.from_dict(fields), form
    except BadInput as error:
        raise BadInput(f"{path} is not the config of a model: {error}") from error
