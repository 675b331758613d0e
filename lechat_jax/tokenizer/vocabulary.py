"""Added tokens, BOS and EOS ids in the JSON files beside a tokenizer.

Fine-tunes grow the vocabulary (ChatML's `<|im_start|>`) and end texts with added tokens. Hugging
Face's files hold these, and keep their names and content in every format.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lechat_jax.errors import BadInput
from lechat_jax.files.safetensors_header import parse_json

GENERATION = "generation_config.json"
SETTINGS = "tokenizer_config.json"
# All that is carried along: the tokenizer's own files, and those that are read here.
BESIDE = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|"
    r"generation_config\.json|chat_template\.(jinja|json)|(pre)?processor_config\.json"
)


class Vocabulary(NamedTuple):
    """A model's ids beyond its tokenizer's: vocabulary size and added tokens.

    Attributes:
        size: number of ids V, the rows of the embedding; more than the tokenizer has, if tokens
            were added or the rows padded.
        added: text of each added token, by id.
        starts_anew: whether the text after an added token is encoded like a text of its own, with
            SentencePiece's leading space; `legacy` in Hugging Face's settings.
    """

    size: int
    added: Mapping[int, str]
    starts_anew: bool = True


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Reads the added tokens of a folder's JSON files, as transformers does.

    A token beyond the model's embedding rows is left out and stays text.

    Raises:
        BadInput: a file is damaged.
    """
    settings, whole = _read(folder / SETTINGS), _read(folder / "tokenizer.json")
    listed = whole.get("added_tokens") or []
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(listed, list) or not isinstance(decoder, dict):
        raise BadInput(f"{folder} has a {SETTINGS} or tokenizer.json whose added tokens are none")
    found: dict[int, str] = {}  # what comes later counts
    for text, id_ in (
        *_read(folder / "added_tokens.json").items(),
        *((_text(one), one.get("id") if isinstance(one, dict) else None) for one in listed),
        *((_text(one), int(id_) if id_.isdecimal() else None) for id_, one in decoder.items()),
    ):
        if type(id_) is not int or not isinstance(text, str) or not text:
            raise BadInput(f"{folder} has an added token {text!r} with the id {id_!r}")
        found[id_] = text
    added = {id_: text for id_, text in sorted(found.items()) if 0 <= id_ < size}
    return Vocabulary(size, added, settings.get("legacy") is not False)


def control_ids(folder: Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads `bos_token_id` and `eos_token_id` (an id or a list) of `generation_config.json`.

    Args:
        folder: the model's folder.
        config: Hugging Face's config, for what that file lacks.

    Raises:
        BadInput: they are no ids.
    """
    said = _read(folder / GENERATION)
    found = {}
    for name in ("bos_token_id", "eos_token_id"):
        value = said.get(name)
        value = (config or {}).get(name) if value is None else value
        if value is None or value == []:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(id_) is int and id_ >= 0 for id_ in ids):
            raise BadInput(f"{folder} says {name} {value!r}, which is no id and no list of ids")
        found[name] = value
    return found


def ends(folder: Path) -> tuple[int, ...]:
    """The EOS ids of the model in a folder; none where `generation_config.json` names none.

    Raises:
        BadInput: they are no ids.
    """
    found = control_ids(folder).get("eos_token_id", [])
    return tuple(found) if isinstance(found, list) else (found,)


def beside(folder: Path) -> list[Path]:
    """The JSON files of added tokens and special ids beside a tokenizer."""
    return sorted(path for path in folder.iterdir() if BESIDE.fullmatch(path.name))


def no_tokenizer(folder: Path, so: str) -> str:
    """The error message for a folder without a tokenizer; `so` says what follows from it."""
    theirs = (folder / "tokenizer.json").is_file()
    why = ", and a tokenizer.json is none that is read here" if theirs else ""
    return (
        f"{folder} has no tokenizer of Mistral's{why}, so {so}; put the model's own into it, "
        "tokenizer.model or tekken.json from where the model comes from"
    )


def _text(token: Any) -> Any:
    """The text of an added token, which is an object or, in old files, a string."""
    return token.get("content") if isinstance(token, dict) else token


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one if there is no file."""
    return parse_json(path.read_bytes(), path) if path.is_file() else {}
