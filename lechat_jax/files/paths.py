"""The cache folder of lechat, and which names are valid file names on every system."""

import os
import re
from pathlib import Path

# Windows opens a device for these, whatever the suffix.
DEVICES = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10)),
}
LONGEST = 200  # bytes; file systems take 255, and a suffix may be put behind it


def cache_home() -> Path:
    """The user's cache folder for lechat, created private (mode 0700).

    `LECHAT_CACHE` names it; without it, it is `lechat` below `XDG_CACHE_HOME` (which counts
    only when absolute, as the XDG specification says), else below `~/.cache`. Private,
    because compiled programs read from there are run.

    Raises:
        OSError: it cannot be created, or there is no home folder.
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


def fault_of_name(name: str) -> str | None:
    """Why a text is not a portable file name, as the end of a sentence; `None` if it is one.

    Path traversal by a name from outside is refused: `../x`, `/x`, `C:x`, devices.

    >>> fault_of_name("../x"), fault_of_name("x-1.2")
    ("has a '/' in it", None)
    """
    if not name.strip(" ."):  # also . and ..
        return "is empty or dots alone"
    if bad := re.search(r'[/\\:*?"<>|]', name):
        return f"has a {bad[0]!r} in it"
    if bad := re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", name):
        return f"has a character in it that cannot be printed, {bad[0]!r}"
    if name != name.strip(" ").rstrip("."):
        return "begins with a space, or ends with one or a dot"
    if name.partition(".")[0].strip().upper() in DEVICES:
        return "is a device's on Windows"
    if len(name.encode()) > LONGEST:
        return f"is longer than {LONGEST} bytes"
    return None
