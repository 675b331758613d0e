"""Writes config, tokenizer and generation settings of a checkpoint in each format."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lechat_jax.config import VisionConfig
from lechat_jax.files.safetensors_header import parse_json
from lechat_jax.formats.configs.hugging_face import to_hugging_face
from lechat_jax.formats.configs.mistral import to_params
from lechat_jax.formats.names import Format
from lechat_jax.formats.open_model import POSITIONS
from lechat_jax.formats.source import Source
from lechat_jax.quantize.scheme import QUANTIZATION, Form
from lechat_jax.tokenizer.jinja_template import chat_template
from lechat_jax.tokenizer.tokenizer import Tokenizer, preferred
from lechat_jax.tokenizer.vocabulary import GENERATION, SETTINGS

BOS, EOS = 1, 2  # of all of Mistral's tokenizers

# With these, transformers' tokenizer gives SentencePiece's own ids: a space before every
# text whatever it begins with (`legacy`), and control pieces spelled in it stay text.
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "legacy": True,
    "split_special_tokens": True,
    "model_max_length": int(1e30),  # no limit, as transformers itself writes it
}


def write_config(
    folder: Path,
    fmt: Format,
    source: Source,
    dtype: np.dtype,
    form: Form | None = None,
) -> None:
    """Writes config.json or params.json into the folder, in the words of the format.

    Only lechat's has words for weights that are quantised.

    Raises:
        BadInput: the format has no words for such a model.
    """
    if fmt == "mistral":
        _write(folder / "params.json", to_params(source.config))
    elif fmt == "hf":
        positions = source.metadata.get(POSITIONS)
        bos_id, eos_id = control_ids_of(source)
        fields = to_hugging_face(source.config, dtype.name, positions, bos_id, eos_id)
        _write(folder / "config.json", fields)
    else:
        said = {QUANTIZATION: form.to_dict()} if form else {}
        _write(folder / "config.json", source.config.to_dict() | said)


def write_tokenizer(folder: Path, fmt: Format, source: Source) -> None:
    """Copies the tokenizer's files into the folder, under the names that the format's readers know.

    All formats have the same files. Mistral's names say the version of a SentencePiece model,
    of which Hugging Face knows one name and has settings beside it.
    """
    model = sentencepiece_model(source)
    for path in source.tokenizer_files:
        if path == model:
            name = "tokenizer.model" if fmt == "hf" else Tokenizer.from_file(path).file_name
            shutil.copyfile(path, folder / name)
        elif not path.name.startswith("tokenizer.model"):
            shutil.copyfile(path, folder / path.name)
    settings = folder / SETTINGS
    said = parse_json(settings.read_bytes(), settings) if settings.exists() else {}
    if model and source.taught_to_chat and not _has_template(folder, said):
        made = chat_template(Tokenizer.from_file(model).version, said.get("legacy") is not False)
        (folder / "chat_template.jinja").write_text(made, encoding="utf-8")
    if fmt == "hf" and model and not settings.exists():
        # Control pieces in what a template makes are no text.
        own = TOKENIZER_CONFIG | {"split_special_tokens": not _has_template(folder, said)}
        _write(settings, own)
    _write_generation(folder, fmt, source)
    if fmt == "hf" and (vision := source.config.vision):
        for name, fields in processor_of(vision).items():
            if not (folder / name).exists():
                _write(folder / name, fields)


def processor_of(vision: VisionConfig) -> dict[str, dict[str, Any]]:
    """Files of transformers' processor of images for a tower, by name.

    Its image processor cuts where Mistral's rounds, so of images that are too large some have a
    row or a column less than lechat gives them.
    """
    from mistral_common.tokens.tokenizers.image import DATASET_MEAN, DATASET_STD

    side = {"height": vision.patch_size, "width": vision.patch_size}
    return {
        "preprocessor_config.json": {
            "image_processor_type": "PixtralImageProcessor",
            "processor_class": "PixtralProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": list(DATASET_MEAN),
            "image_std": list(DATASET_STD),
            "patch_size": side,
            "resample": 3,  # bicubic
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": vision.max_image_size},
        },
        "processor_config.json": {
            "processor_class": "PixtralProcessor",
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
        },
    }


def _has_template(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a chat template is among the tokenizer's files."""
    return bool(settings.get("chat_template")) or any(folder.glob("chat_template.*"))


def _write_generation(folder: Path, fmt: Format, source: Source) -> None:
    """Writes generation_config.json, BOS and EOS, for hf or if they are not the tokenizer's."""
    path, said = folder / GENERATION, source.control_ids
    own = _of_tokenizer(source)
    bos_id, eos_id = control_ids_of(source)
    ids: dict[str, Any] = {"bos_token_id": bos_id, "eos_token_id": eos_id}
    usual: dict[str, Any] = {"bos_token_id": own[0], "eos_token_id": own[1]} if own else {}
    if path.exists():
        fields = parse_json(path.read_bytes(), path)
        if any(fields.get(key, usual.get(key)) != ids[key] for key in said):
            _write(path, fields | ids)
    elif fmt == "hf" or any(usual.get(key) != ids[key] for key in said):
        _write(path, {"_from_model_config": True, **ids})


def sentencepiece_model(source: Source) -> Path | None:
    """The SentencePiece model of the source, its newest version; `None` if it has another kind."""
    return preferred(path for path in source.tokenizer_files if path.suffix != ".json")


def control_ids_of(source: Source) -> tuple[int, int | list[int]]:
    """The ids that start and end a document, as the source says or else as its tokenizer does.

    What was trained here ends its texts as the tokenizer does, whatever its base did.
    """
    bos_id, own = _of_tokenizer(source) or (BOS, EOS)
    eos_id = source.control_ids.get("eos_token_id", own)
    if source.format == "run" and own not in (ends := eos_id if type(eos_id) is list else [eos_id]):
        eos_id = [own, *ends]
    return source.control_ids.get("bos_token_id", bos_id), eos_id


def _of_tokenizer(source: Source) -> tuple[int, int] | None:
    """The ids that start and end a document for the tokenizer that is read of the source."""
    path = preferred(source.tokenizer_files)
    if path is None or path.suffix == ".json":
        return path and (BOS, EOS)
    tokenizer = Tokenizer.from_file(path)
    return tokenizer.bos_id, tokenizer.eos_id


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
