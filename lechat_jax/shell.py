"""Commands as a user types them: whatever a folder is called, what is printed runs as it stands."""

import os
import shlex
import subprocess
from pathlib import Path


def command(module: str, *folders: Path | str, **flags: Path | str | float | None) -> str:
    """`python -m MODULE FOLDERS --flag VALUE`, quoted for POSIX shells, or on Windows for cmd.

    A path that would be read as a flag gets its folder in front, and another value is joined to
    its flag. Flags without a value (`None`) are left out.

    >>> print(command("lechat_jax.generate", Path("-my run"), prompt="-x", prompt_ids=None))
    python -m lechat_jax.generate './-my run' --prompt=-x
    """
    words = ["python", "-m", module, *map(_path, folders)]
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        text = _path(value) if isinstance(value, Path) else str(value)
        if value is not None:
            words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return quoted(words)


def quoted(words: list[str]) -> str:
    """The words as one line of the user's shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _path(path: Path | str) -> str:
    text = str(path)
    return os.path.join(os.curdir, text) if text.startswith("-") else text
