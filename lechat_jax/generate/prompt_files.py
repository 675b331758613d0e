"""Prompt files: a text a line, or JSON Lines of texts or ids."""

import re
from pathlib import Path
from typing import Any

from lechat_jax.errors import BadInput
from lechat_jax.files.records import Complaints, holds_records, records_of
from lechat_jax.files.text import read_stdin, read_text

Prompt = str | list[int]


def read_prompts(path: Path) -> list[Prompt]:
    """Reads a prompt file, in order: texts or token ids; `-` is stdin.

    In a JSON file (see `records_of`) each object has `prompt`, a text, or `ids`. In any other
    file each line is a text and an empty line an empty text: prompt i is line i, so that samples
    can be matched.

    Raises:
        BadInput: the file cannot be read or has no prompt, or a record is invalid; its line is
            named.
    """
    prompts: list[Prompt] = []
    if str(path) == "-":
        prompts += _lines(read_stdin())
    elif not holds_records(path):
        prompts += _lines(read_text(path))
    else:
        complaints = Complaints(str(path))
        for record in records_of(path, complaints):
            if (prompt := _prompt(record.fields)) is None:
                complaints.add(record.where, "has no text in `prompt`, nor integers in `ids`")
            else:
                prompts.append(prompt)
        complaints.raise_any()
    if not prompts:
        raise BadInput(f"there is no prompt in {path}")
    return prompts


def _lines(text: str) -> list[str]:
    """All lines, or none if all are blank; they end in LF, CR LF or CR."""
    lines = re.split(r"\r\n|\n|\r", re.sub(r"(\r\n|\n|\r)\Z", "", text))
    return lines if text.strip() else []


def _prompt(fields: dict[str, Any]) -> Prompt | None:
    """The prompt of a JSON object; `None` if it has none."""
    prompt = fields.get("ids") if fields.get("prompt") is None else fields["prompt"]
    if isinstance(prompt, str):
        return prompt
    ids = isinstance(prompt, list) and all(type(id_) is int for id_ in prompt)
    return prompt if ids else None
