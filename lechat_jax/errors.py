"""The one exception that a user is meant to read. Standard library only."""


class BadInput(Exception):
    """Something the user gave cannot be used; the message is the one line they see.

    It says what is wrong, where, and what to do instead. Command lines print it after
    `error:` and exit with code 2. No `ValueError`, since those have other causes too, and
    the parser of the flags would put one that a dataclass raises into a box of its own.
    """
