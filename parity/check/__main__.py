"""`python -m parity.check`."""

from lechat_jax.cli.flags import run
from parity.check.command import main

if __name__ == "__main__":
    run(main)
