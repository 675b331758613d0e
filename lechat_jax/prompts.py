"""Prompts from a file: a text a line, or JSON objects."""

import json
import sys
from pathlib import Path

from lechat_jax.errors import BadInput

Prompt = str | list[int]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in order: texts, or token ids; `-` is stdin.

    Of a .jsonl file each line is an object with `prompt`, a text, or `ids`. Of any other file
    each line is a text, without its end; an empty line is none.

    Raises:
        BadInput: the file cannot be read or holds no prompt, or a line is not as it must be; its
            number is named.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read the prompts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start})") from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise BadInput(f"there is no prompt in {path}")
    if path.suffix != ".jsonl":
        return [line.removesuffix("\r") for _, line in lines]
    return [_parsed(line, f"line {n} of {path}") for n, line in lines]


def _parsed(line: str, where: str) -> Prompt:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise BadInput(f"{where} is not JSON: {error}") from error
    prompt = found.get("prompt", found.get("ids")) if isinstance(found, dict) else None
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(id_) is int for id_ in prompt):
        return prompt
    raise BadInput(f'{where} must be an object with "prompt", a text, or "ids", integers')
