"""Where lechat keeps what it can make again: tokens and compiled programs."""

import os
from pathlib import Path


def cache_home() -> Path:
    """The user's cache folder for lechat, which exists and was made private (mode 0700).

    `LECHAT_CACHE` names it; without it, it is `lechat` below `XDG_CACHE_HOME` (which counts
    only when absolute, as the XDG specification says), else below `~/.cache`. Private,
    because compiled programs read from there are run.

    Raises:
        OSError: it cannot be made, or there is no home folder to make it in.
    """
    named, xdg = os.environ.get("LECHAT_CACHE", ""), os.environ.get("XDG_CACHE_HOME", "")
    try:
        if named:
            folder = Path(named).expanduser().absolute()
        elif os.path.isabs(xdg):
            folder = Path(xdg, "lechat")
        else:
            folder = Path.home() / ".cache" / "lechat"
    except RuntimeError as error:  # what pathlib raises for a user without a home
        raise FileNotFoundError("there is no home folder; set LECHAT_CACHE") from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
