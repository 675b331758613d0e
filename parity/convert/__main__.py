"""`python -m parity.convert`."""

from lechat_jax.cli.flags import run
from parity.convert.command import main

if __name__ == "__main__":
    run(main)
