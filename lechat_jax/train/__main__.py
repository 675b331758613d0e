"""`python -m lechat_jax.train`."""

from lechat_jax.cli.flags import run
from lechat_jax.train.command import main

if __name__ == "__main__":
    run(main)
