"""What a folder holds that is to be a model: a training run, lechat's weights, or another's.

Told by its config alone, without JAX and without a look at the weights.
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
    """Whether a model's folder is that of a training run or of lechat's weights.

    Raises:
        BadInput: it is neither; for Hugging Face's format and Mistral's the message is the
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
    """The command that makes lechat's weights of a folder in another format, for a shell."""
    named = folder if folder.name.strip(".") else folder.resolve()  # `.` and `..` have no name
    return command("parity.convert", named, f"{named}-lechat", to="lechat")


def fault_of(folder: Path) -> str | None:
    """The first thing wrong with the files of lechat's weights, or None; see `manifest.fault`.

    Where no tokenizer was saved, one may be put in.
    """
    return fault(folder, folders=(), is_read=_is_read)


def _is_read(name: str, saved: Collection[str]) -> bool:
    """Whether a file that was not saved with a model would change what is read."""
    if OF_TEXT.fullmatch(name):
        return any(FILES.fullmatch(one) for one in saved)
    return bool(OF_WEIGHTS.fullmatch(name))


def read_config(folder: Path) -> MistralConfig:
    """The model whose weights lie in a folder in lechat's format.

    Raises:
        BadInput: they do not, or the config is none.
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
    """How the weights of a folder in lechat's format are quantised, or `None` if they are not.

    Raises:
        BadInput: in a way that is not known.
    """
    path = folder / CONFIG
    return pop_format(parse_json(path.read_bytes(), path), path)
