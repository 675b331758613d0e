"""`python -m lechat_jax.eval`."""

from lechat_jax.cli.flags import run
from lechat_jax.eval.command import main

if __name__ == "__main__":
    run(main)
