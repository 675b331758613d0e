"""What a step is said to compute is what its products are, and a device's peak is looked up."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lechat_jax.config import MistralConfig
from lechat_jax.model.binding import bind
from lechat_jax.model.mask import window_mask
from lechat_jax.model.mistral import Mistral
from lechat_jax.train import flops
from lechat_jax.train.flops import flops_per_token, peak_flops
from tests.support.jaxprs import equations


def products(config: MistralConfig, T: int) -> float:
    """Operations of all matrix products of a forward pass over one row, as JAX traces them."""
    weights = jax.eval_shape(lambda: _weights(config))
    traced = jax.make_jaxpr(lambda w, x: bind(config, w)(x, "dense"))(
        weights, jax.ShapeDtypeStruct((1, T), jnp.int32)
    )
    total = 0.0
    for equation in equations(traced):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[i] for i in contracted])
            total += 2 * depth * equation.outvars[0].aval.size
    return total


def _weights(config: MistralConfig) -> Any:
    from flax import nnx

    from lechat_jax.model.binding import weights_of

    return weights_of(Mistral(config, rngs=nnx.Rngs(0)))


def test_a_step_is_three_times_the_products_of_its_forward_pass(tiny: MistralConfig) -> None:
    """Dense attention makes T * T scores, of which only those within the window count."""
    T, heads = 80, tiny.n_layers * tiny.n_heads * tiny.head_dim  # so many that none is a sum
    places = jnp.arange(T)[None]
    seen = int(window_mask(places, places, tiny.windows[0]).sum())
    made = products(tiny, T) - 4 * heads * (T * T - seen)
    norms = (2 * tiny.n_layers + 1) * tiny.dim  # which are not multiplied as matrices are
    assert T * flops_per_token(tiny, T) == pytest.approx(3 * made + 6 * T * norms, rel=1e-12)


def test_frozen_weights_have_no_gradient_to_compute(tiny: MistralConfig) -> None:
    assert flops_per_token(tiny, 9) - flops_per_token(tiny, 9, n_frozen=100) == 200


def test_a_known_device_has_the_peak_of_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(platform: str, kind: str) -> None:
        device = types.SimpleNamespace(platform=platform, device_kind=kind)
        monkeypatch.setattr(flops.jax, "devices", lambda: [device])

    on("gpu", "NVIDIA H100 80GB HBM3")
    assert (peak_flops("bfloat16"), peak_flops("float32")) == (989e12, 494e12)
    on("tpu", "TPU v5 lite")
    assert peak_flops("bfloat16") == 197e12
    on("gpu", "NVIDIA H100 PCIe")  # slower, and nobody looked up by how much
    assert peak_flops("bfloat16") is None


def test_a_cpu_is_measured() -> None:
    best = max(peak_flops("float32") or 0.0 for _ in range(3))
    assert 1e9 < best < 1e13
