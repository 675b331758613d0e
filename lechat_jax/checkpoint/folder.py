"""Detects a model folder's format: a training run, lechat's weights, or another format.

By its config alone, without JAX and without reading the weights.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from lechat_jax.checkpoint.run import CONFIG
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.files.checksums import fault
from lechat_jax.files.safetensors_header import parse_json
from lechat_jax.quantize.scheme import Form, pop_format
from lechat_jax.shell import command
from lechat_jax.tokenizer.tokenizer import FILES
from lechat_jax.tokenizer.vocabulary import BESIDE

OF_WEIGHTS = re.compile(r"config\.json|model.*\.safetensors(\.index\.json)?")
OF_TEXT = re.compile(rf"{FILES.pattern}|{BESIDE.pattern}")


def kind_of(folder: Path) -> Literal["run", "weights"]:
    """Detects whether a folder is a training run or has weights in lechat's format.

    Raises:
        BadInput: it is neither; for Hugging Face's and Mistral's formats the message gives the
            command that converts it.
    """
    if not folder.is_dir():
        what = "is a file; name its folder" if folder.exists() else "is not there"
        raise BadInput(f"{folder} {what}")
    path = folder / CONFIG
    config = parse_json(path.read_bytes(), path) if path.is_file() else {}
    if "model" in config and "train" in config:
        return "run"
    if "dim" in config and "model_type" not in config:  # Hugging Face calls it hidden_size
        return "weights"
    if "model_type" in config or (folder / "params.json").is_file():
        theirs = "Hugging Face's" if "model_type" in config else "Mistral's"
        raise BadInput(
            f"{folder} is in {theirs} format, which is not read here; convert it with: "
            f"{_conversion(folder)}"
        )
    raise BadInput(
        f"{folder} is not a training run and holds no weights of lechat's: its {CONFIG} "
        f"{'describes no model' if path.is_file() else 'is missing'}"
    )


def _conversion(folder: Path) -> str:
    """The shell command that converts a folder to lechat's format."""
    named = folder if folder.name.strip(".") else folder.resolve()  # `.` and `..` have no name
    return command("parity.convert", named, f"{named}-lechat", to="lechat")


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


def read_config(folder: Path) -> MistralConfig:
    """Reads the model config of a folder in lechat's format.

    Raises:
        BadInput: the folder has no such config, or it is invalid.
    """
    if kind_of(folder) == "run":
        raise BadInput(f"{folder} is a training run, whose weights are in its checkpoints")
    path = folder / CONFIG
    fields = parse_json(path.read_bytes(), path)
    pop_format(fields, path)
    try:
        return MistralConfig.from_dict(fields)
    except BadInput as error:
        raise BadInput(f"{path} is not the config of a model: {error}") from error


def stored_format(folder: Path) -> Form | None:
    """The quantization scheme of a folder in lechat's format; `None` for float weights.

    Raises:
        BadInput: the scheme is not known.
    """
    path = folder / CONFIG
    return pop_format(parse_json(path.read_bytes(), path), path)
