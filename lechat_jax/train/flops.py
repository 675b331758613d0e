"""Model FLOPs utilisation (MFU): FLOPs of a training step over what the device could do.

Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B) counts what the model needs and
not what was done, so that computing something twice does not look like work.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from lechat_jax.config import MistralConfig
from lechat_jax.devices.platform import platform

SIZE, RUNS = 1024, 30  # of the product that a CPU is measured by


class Peak(NamedTuple):
    """Peak FLOP/s of dense matrix products, without structured sparsity.

    Attributes:
        bfloat16: with float32 sums.
        float32: as XLA multiplies float32 by default, in TensorFloat-32 on a GPU and in
            bfloat16 on a TPU.
    """

    bfloat16: float
    float32: float


# By `jax.Device.device_kind`.
PEAKS = {
    # https://www.nvidia.com/en-us/data-center/a100/
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 156e12),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 156e12),
    "NVIDIA A100-PCIE-40GB": Peak(312e12, 156e12),
    "NVIDIA A100 80GB PCIe": Peak(312e12, 156e12),
    # https://www.nvidia.com/en-us/data-center/h100/ (SXM), half of the figures with sparsity
    "NVIDIA H100 80GB HBM3": Peak(989e12, 494e12),
    # https://www.nvidia.com/en-us/data-center/h200/
    "NVIDIA H200": Peak(989e12, 494e12),
    # https://www.nvidia.com/en-us/data-center/l40s/
    "NVIDIA L40S": Peak(362e12, 183e12),
    # https://www.nvidia.com/en-us/data-center/l4/
    "NVIDIA L4": Peak(121e12, 60e12),
    # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    "NVIDIA GeForce RTX 4090": Peak(165e12, 82.6e12),
    # https://cloud.google.com/tpu/docs/v4
    "TPU v4": Peak(275e12, 275e12),
    # https://cloud.google.com/tpu/docs/v5e
    "TPU v5 lite": Peak(197e12, 197e12),
    # https://cloud.google.com/tpu/docs/v5p
    "TPU v5": Peak(459e12, 459e12),
    # https://cloud.google.com/tpu/docs/v6e
    "TPU v6 lite": Peak(918e12, 918e12),
}


class Speed:
    """Throughput of the last steps: tokens per second and MFU.

    Attributes:
        rate: tokens a second.
        peak: FLOP a second that the devices could do, if known; else 0.
    """

    def __init__(self, config: MistralConfig, block: int, dtype: str, mesh: Mesh | None) -> None:
        self.config, self.block, self.dtype, self.mesh = config, block, dtype, mesh
        self.rate, self.peak = 0.0, 0.0

    def look_at_the_device(self) -> None:
        """Measures or looks up the devices' peak FLOP/s, once, while nothing else runs here.

        A CPU is measured, so a later look would be another denominator of the same MFU.
        """
        devices = self.mesh.size if self.mesh else 1
        n = jax.process_count() if platform() == "cpu" else devices
        self.peak = n * (peak_flops(self.dtype) or 0.0)

    def mfu(self, has_frozen: bool) -> float | None:
        """MFU at the last rate, as a fraction; `None` if the peak is unknown."""
        frozen = self.config.n_products if has_frozen else 0
        needed = self.rate * flops_per_token(self.config, self.block, frozen)
        return needed / self.peak if self.peak else None


def flops_per_token(config: MistralConfig, T: int, n_frozen: int = 0) -> float:
    """Training FLOPs per token, in a row of T.

        6 * (parameters that are multiplied) + 6 * N * (H + U) * (keys that a query sees,
        summed over the layers)

    A multiplication and an addition are two, and backward is twice as much as forward: the
    gradients of what came in and of the weights. The embedding is looked up and not multiplied,
    and of experts only those are that were chosen. A query at position i sees min(i + 1, W)
    keys, on average over the T of a row; what lies outside the window is not counted, whoever
    computes it. Of frozen weights there is no gradient: 4 instead of 6.

    >>> from lechat_jax.config import preset
    >>> f"{flops_per_token(preset('lechat-15m'), T=128):.3g}"
    '5.48e+07'
    """
    seen = sum(_mean_keys(T, window or T) for window in config.windows)
    products = 6 * config.n_products - 2 * n_frozen
    N, H, U = config.shape("NHU")
    return products + 6 * N * (H + U) * seen


def _mean_keys(T: int, window: int) -> float:
    first = min(T, window)  # queries whose window is not full before they come
    return (first * (first + 1) / 2 + (T - first) * window) / T


def peak_flops(dtype: str) -> float | None:
    """Peak FLOP/s of one device: what its vendor states, or measured on a CPU.

    `None` for a device that nobody has looked up. A CPU's is measured anew each time, in less
    than a second, as the fastest of some float32 products: clocks and vector units are not
    what a table could tell, and XLA multiplies bfloat16 in float32 there. Of so many one finds
    a moment in which other programs rest.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _best_product()
    peak = PEAKS.get(device.device_kind)
    return peak and (peak.bfloat16 if dtype == "bfloat16" else peak.float32)


def _best_product() -> float:
    """Measured FLOP/s: the fastest of a few float32 products of square matrices."""
    x = jnp.full((SIZE, SIZE), 0.5, jnp.float32)
    product = _product()
    times = []
    for _ in range(RUNS + 1):  # the first compiles
        began = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * SIZE**3 / min(times)


@functools.cache
def _product() -> Callable[[Array, Array], Array]:
    return jax.jit(jnp.matmul)
