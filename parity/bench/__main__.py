"""`python -m parity.bench`."""

from lechat_jax.cli.flags import run
from parity.bench.command import main

if __name__ == "__main__":
    run(main)
