"""Entry point of `python -m lechat_jax.report`."""

from lechat_jax.cli.flags import run
from lechat_jax.report.command import main

if __name__ == "__main__":
    run(main)
