"""Files that are written whole or not at all."""

import contextlib
import os
from pathlib import Path

from lechat_jax.errors import BadInput


def write_whole(path: Path, text: str) -> None:
    """The file has all of the text, or is what it was.

    Raises:
        BadInput: it cannot be written there.
    """
    beside = path.parent / f".{path.name}.partial"
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise BadInput(f"cannot write {path} ({error.strerror}); name another file") from error
