"""Entry point of `python -m lechat_jax.serve`."""

from lechat_jax.cli.flags import run
from lechat_jax.serve.command import main

if __name__ == "__main__":
    run(main)
