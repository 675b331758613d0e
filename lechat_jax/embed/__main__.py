"""Entry point of `python -m lechat_jax.embed`."""

from lechat_jax.cli.flags import run
from lechat_jax.embed.command import main

if __name__ == "__main__":
    run(main)
