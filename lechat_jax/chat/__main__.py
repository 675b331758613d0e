"""Entry point of `python -m lechat_jax.chat`."""

from lechat_jax.chat.command import main
from lechat_jax.cli.flags import run

if __name__ == "__main__":
    run(main)
