"""The exception for bad user input, whose message a user reads. Standard library only."""


class BadInput(Exception):
    """Bad user input: a flag, file or value that cannot be used; the message is all that they see.

    It says what is wrong, where, and what to do instead. Command lines print it after
    `error:` and exit with code 2. No `ValueError`, since those have other causes too, and
    the parser of the flags would put one that a dataclass raises into a box of its own.
    """
