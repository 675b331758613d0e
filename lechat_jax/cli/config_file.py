"""YAML config files for `--config`: keys are flags without their leading dashes."""

import difflib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import yaml

from lechat_jax.errors import BadInput
from lechat_jax.files.text import read_text


def with_recipe(argv: Sequence[str], names: Sequence[str], switches: Set[str]) -> list[str]:
    """Inserts the flags of the `--config` file, if there is one, in front of those of `argv`.

    The last of two equal flags counts, so the command line wins. `switches` are the flags among
    `names` that take no value: true gives them. For any other flag true and false mean the words
    on and off, which YAML parses as booleans.

    Raises:
        BadInput: the file cannot be read, or has a key that is not in `names`.
    """
    path = _value("--config", argv)
    return [*(_flags_of(Path(path), names, switches) if path else []), *argv]


def to_yaml(fields: Mapping[str, Any]) -> str:
    """Writes options as YAML for `--config`; fields that are `None` are left out.

    >>> print(to_yaml({"max_tokens": 9, "steps": None, "prompt": ("a", "b")}), end="")
    max-tokens: 9
    prompt:
    - a
    - b
    """
    given = {name.replace("_", "-"): value for name, value in fields.items() if value is not None}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _value(flag: str, argv: Sequence[str]) -> str | None:
    """The value of `--flag value` or `--flag=value`."""
    for place, word in enumerate(argv):
        if word == flag and place + 1 < len(argv):
            return argv[place + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def _flags_of(path: Path, names: Sequence[str], switches: Set[str]) -> list[str]:
    try:
        found = yaml.safe_load(read_text(path))
    except RecursionError:
        raise BadInput(f"--config {path} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # a date may have no such day
        raise BadInput(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise BadInput(f"--config {path} is no list of options such as `steps: 100`, one a line")
    flags: list[str] = []
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in names or name == "config":
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0].replace('_', '-')!r}?" if near else ""
            raise BadInput(f"--config {path} has {key!r}, which is no option{hint}")
        flag = f"--{name.replace('_', '-')}"
        if name in switches:
            flags += [flag] if value else []
        elif isinstance(value, list):
            flags += [flag, *map(str, value)] if value else []
        elif value is not None:
            word = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
            flags.append(f"{flag}={word}")
    return flags
