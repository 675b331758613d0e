"""Entry point of `python -m lechat_jax.generate`."""

from lechat_jax.cli.flags import run
from lechat_jax.generate.command import main

if __name__ == "__main__":
    run(main)
