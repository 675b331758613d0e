"""How fast a run learns, and how much of its devices that needs."""

import jax
from jax.sharding import Mesh

from lechat_jax.config import MistralConfig
from lechat_jax.train.flops import flops_per_token, peak_flops


class Speed:
    """Of the last steps.

    Attributes:
        rate: tokens a second.
        peak: FLOP a second that the devices could do, if known; else 0.
    """

    def __init__(self, config: MistralConfig, block: int, dtype: str, mesh: Mesh | None) -> None:
        self.config, self.block, self.dtype, self.mesh = config, block, dtype, mesh
        self.rate, self.peak = 0.0, 0.0

    def look_at_the_device(self) -> None:
        """How fast it could be, with those beside it: once, while nothing else is done here.

        A CPU is measured, so a later look would be another denominator of the same MFU.
        """
        devices = self.mesh.size if self.mesh else 1
        n = jax.process_count() if jax.default_backend() == "cpu" else devices
        self.peak = n * (peak_flops(self.dtype) or 0.0)

    def mfu(self, has_frozen: bool) -> float | None:
        """The part of the devices' FLOP/s that the model needed at the last rate, if known."""
        frozen = self.config.n_products if has_frozen else 0
        needed = self.rate * flops_per_token(self.config, self.block, frozen)
        return needed / self.peak if self.peak else None
