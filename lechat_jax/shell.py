"""Shell quoting of the commands that lechat prints, so that they run as printed."""

import os
import shlex
import subprocess
from pathlib import Path


def command(module: str, *folders: Path | str, **flags: Path | str | float | None) -> str:
    """Command line `python -m MODULE FOLDERS --flag VALUE`, quoted for a POSIX shell or cmd.exe.

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
    """Joins arguments to one line, quoted for the user's shell (POSIX, or cmd.exe on Windows)."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _path(path: Path | str) -> str:
    text = str(path)
    return os.path.join(os.curdir, text) if text.startswith("-") else text
